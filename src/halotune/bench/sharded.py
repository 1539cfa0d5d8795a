"""`halotune bench step --nproc N`: the step of one process beside that of N, which share the model by FSDP2.

Every block is a unit of `fully_shard`, for the frozen model and for every contender alike; our adapters are one more
(`halotune.shard_adapters`), those of others belong to their blocks. Each process has a batch of its own: N processes do N times
the work of one.

The contenders take turns as in the other benchmarks. The workers stay for the whole run; where one fails, all are started
anew, since the others may wait for it for ever.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from typing_extensions import Self

from ..core.errors import HalotuneError
from ..engine.gathering import shard_adapters
from .benches import INPUTS, SEED, SILENT, Work, training
from .config import BenchConfig
from .contenders import Unavailable
from .race import OUT_OF_TIME, Entry, Turn, Watch, attempt, race
from .rows import PROCESSES, Row
from .timing import Clock, no_collection


def run_sharded_step(config: BenchConfig, watch: Watch = SILENT) -> list[Row]:
    """A row for every contender in one process and in `config.nproc`, with tokens per second and the speed-up of the latter."""
    assert config.nproc is not None
    if config.device != "cpu" and config.nproc > torch.cuda.device_count():
        raise HalotuneError(
            f"nproc: expected at most the {torch.cuda.device_count()} GPUs that are here; got {config.nproc}. Give fewer."
        )
    started = time.monotonic()
    about = Work.on_model(config, torch.device("meta")).setting(config.batch, config.sequence, nproc=config.nproc)
    entries = [Entry(c, {PROCESSES: n}) for c in config.contenders for n in (1, config.nproc)]
    with Workers(config, started) as workers:
        return race(config, about, entries, ["step"], workers.turn, watch, started)


class Workers:
    """Processes of one group, which measure what they are told."""

    def __init__(self, config: BenchConfig, started: float) -> None:
        self.config, self.started = config, started
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    @property
    def left(self) -> float | None:
        """Seconds until the time limit and a minute; None where there is none."""
        limit = self.config.time_limit
        return None if limit is None else max(0.0, self.started + limit + 60 - time.monotonic())

    def start(self) -> None:
        assert self.config.nproc is not None
        context = multiprocessing.get_context("spawn")
        self.store = tempfile.TemporaryDirectory()
        for rank in range(self.config.nproc):
            near, far = context.Pipe()
            job = (rank, self.config, f"file://{self.store.name}/group", far)
            self.processes.append(context.Process(target=_work, args=job, daemon=True))
            self.processes[-1].start()
            far.close()
            self.pipes.append(near)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        if self.processes:
            self.store.cleanup()
        self.pipes.clear()
        self.processes.clear()

    def turn(self, entry: Entry) -> Turn:
        """What the slowest process gave.

        Raises:
            Unavailable: a process could not measure it; its message says why.
        """
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send(entry)
        open_ones, turns = list(self.pipes), []
        while open_ones:
            ready = wait(open_ones, self.left)
            if not ready:  # they may wait for each other
                self.stop()
                raise Unavailable(OUT_OF_TIME)
            for pipe in ready:
                assert isinstance(pipe, Connection)
                open_ones.remove(pipe)
                try:
                    turn, problem = pipe.recv()
                except EOFError:
                    turn, problem = Turn(), "a worker ended"
                if problem:
                    self.stop()
                    raise Unavailable(problem)
                turns.append(turn)
        slowest = [max(laps) for laps in zip(*(t.times["step"] for t in turns if t.times), strict=True)]
        peak = max((t.peak for t in turns if t.peak is not None), default=None)
        return Turn({"step": slowest}, max(t.trainable or 0 for t in turns), peak)


def _work(rank: int, config: BenchConfig, store: str, pipe: Connection) -> None:
    """A worker: a turn for every entry that comes."""
    cuda = config.torch_device.type == "cuda"
    config = replace(config, device=f"cuda:{rank}" if cuda else "cpu")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(config.nproc))
    if cuda:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // (config.nproc or 1)))
    torch.distributed.init_process_group("nccl" if cuda else "gloo", init_method=store, rank=rank, world_size=config.nproc or 1)
    while True:
        entry = pipe.recv()
        alone = entry.point[PROCESSES] == 1
        if alone and rank > 0:
            pipe.send((Turn(), None))
        else:
            pipe.send(attempt(partial(_turn, config, rank), entry, Clock(config.torch_device)))


def _turn(config: BenchConfig, rank: int, entry: Entry) -> Turn:
    work, family = Work.on_model(config), config.preset.family
    with no_collection():
        torch.manual_seed(SEED)
        model = entry.contender.wrap(work.base, work.targets)
        _prepare(model, work, entry)
        torch.manual_seed(SEED + rank)
        sizes = config.preset.shape, config.batch, config.sequence, config.torch_device, config.torch_dtype
        batches = [family.batch(*sizes) for _ in range(INPUTS)]
        return work.steps(model, training(model, family, work.clock.cuda), batches)


def _prepare(model: Any, work: Work, entry: Entry) -> None:
    """Gradients to the embeddings, blocks compiled if they are to be, and, in several processes, shards."""
    from torch.distributed.fsdp import fully_shard

    model.train()
    work.let_gradients_through()
    blocks: dict[Any, Any] = {m: m for m in model.modules() if type(m).__name__ in work.blocks}
    if work.config.compile:  # by a module around each, as the hooks of FSDP2, which are not compiled, have to be outside
        torch.compiler.reset()
        blocks = {block: torch.compile(block, fullgraph=True, dynamic=False) for block in blocks}
        for parent in [m for m in model.modules() if m not in blocks]:
            for name, child in parent.named_children():
                setattr(parent, name, blocks.get(child, child))
    if entry.point[PROCESSES] > 1:
        if entry.contender.library == "ours":
            shard_adapters(model)
        for block in blocks.values():
            fully_shard(block)
        fully_shard(model)
