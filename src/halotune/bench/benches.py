"""The benchmarks. Each makes one model, lets the contenders take turns on it, and returns a row for each of them.

In training, gradients flow to the embeddings' output for every contender, the frozen model included, so that the ratio
to it is the price of the adapter alone.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import HalotuneError
from . import models
from .config import BenchConfig
from .contenders import FROZEN, LIBRARIES, Contender, Unavailable, quiet, restored
from .race import KERNELS, Entry, Turn, Watch, race
from .rows import Row, hardware, versions
from .timing import Clock, saved_bytes

SILENT = Watch()
INPUTS = 4  # sets of inputs that take turns, so that no step finds its input in a cache
SEED = 0


class Layer(nn.Module):
    """A linear layer in a model, so that every library can find it by name."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n_in, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@dataclass(frozen=True)
class Work:
    """A model, and where the adapters go."""

    config: BenchConfig
    base: nn.Module
    targets: Sequence[str]
    blocks: Sequence[str]  # names of the classes that are compiled with --compile

    @classmethod
    def on_model(cls, config: BenchConfig, device: torch.device | None = None) -> Work:
        """A model on a device, by default the configuration's; on `meta` it is one to be described."""
        torch.manual_seed(SEED)
        family = config.preset.family
        try:
            with quiet():
                base = models.build(config.preset, device or config.torch_device, config.torch_dtype)
        except Unavailable as e:
            raise HalotuneError(f"model: {config.model} needs a library that {e}. Install it, or take another.") from None
        return cls(config, base, models.target_names(base, family, config.targets), family.blocks)

    @classmethod
    def on_layer(cls, config: BenchConfig) -> Work:
        torch.manual_seed(SEED)
        base = Layer(*config.features).to(config.torch_device, config.torch_dtype).requires_grad_(False)
        return cls(config, base, ["linear"], ["Layer"])

    @property
    def clock(self) -> Clock:
        return Clock(self.config.torch_device)

    def setting(self, batch: int | None = None, tokens: int | None = None, **more: Any) -> dict[str, Any]:
        """Everything one has to know to compare a row with another, or to measure it again."""
        config, layer = self.config, isinstance(self.base, Layer)
        return {
            "device": hardware(config.torch_device),
            "versions": versions(),
            "model": "linear layer" if layer else config.model,
            "shape": dict(zip(("in_features", "out_features"), config.features, strict=True)) if layer else config.preset.shape,
            "targets": None if layer else config.targets,
            "adapted_modules": len(self.targets),
            "dtype": config.dtype,
            "batch": batch,
            "tokens": tokens,
            "compiled": list(self.blocks) if config.compile and not layer else config.compile,
            "rounds": config.rounds,
            "steps": config.steps,
            "warmup": config.warmup,
            **more,
        }

    def let_gradients_through(self) -> None:
        """Gradients reach the embeddings' output, of the frozen model too."""
        entry = self.config.preset.family.entry(self.base)
        entry.register_forward_hook(lambda module, args, out: out.requires_grad_(True))

    @contextmanager
    def adapted(self, contender: Contender) -> Iterator[Any]:
        """Inside, the base has an adapter, and its blocks are compiled without a graph break if they are to be."""
        torch.manual_seed(SEED)  # the same inputs and values in every turn
        with contender.on(self.base, self.targets) as model:
            chosen = [m for m in model.modules() if self.config.compile and type(m).__name__ in self.blocks]
            if chosen:  # others' code would be looked at first, and count against the limit of recompilations
                torch.compiler.reset()
            for module in chosen:
                module.compile(fullgraph=True, dynamic=False)
            try:
                yield model
            finally:
                for module in chosen:
                    module._compiled_call_impl = None

    def repeated(self, model: nn.Module, measures: Sequence[str], once: Callable[[int], list[float]], **more: Any) -> Turn:
        """Warm up, then repeat `once`, which gives the laps of each measure; `more` of the turn."""
        for i in range(self.config.warmup):
            once(i)
        self.start()
        laps = zip(*(once(self.config.warmup + i) for i in range(self.config.steps)), strict=True)
        times = {measure: list(of_one) for measure, of_one in zip(measures, laps, strict=True)}
        return Turn(times, **{"trainable": count(model), "peak": self.clock.peak(), **more})

    def steps(self, model: nn.Module, run: Callable[[models.Batch], None], batches: Sequence[models.Batch]) -> Turn:
        """Whole steps, one after the other."""
        order = [batches[i % len(batches)] for i in range(self.config.warmup + self.config.steps)]
        for batch in order[: self.config.warmup]:
            run(batch)
        if not self.config.cuda_graph:  # whose memory is taken when it is captured
            self.start()
        times = self.clock.laps(*(partial(run, batch) for batch in order[self.config.warmup :]))
        return Turn({"step": times}, count(model), self.clock.peak())

    def kernels(self, model: nn.Module, run: Callable[[], object]) -> Turn:
        """What the GPU spends in kernels."""
        for _ in range(self.config.warmup):
            run()
        self.start()
        return Turn({KERNELS: [self.clock.busy(run)]}, count(model), self.clock.peak())

    def start(self) -> None:
        """What follows is timed."""
        gc.collect()  # off while timing; what warming up left in cycles is no part of the peak
        self.clock.forget_peak()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in trained(model))


Race = tuple[dict[str, Any], list[Entry], list[str], Callable[..., Turn]]


def raced(prepare: Callable[[BenchConfig], Race]) -> Callable[..., list[Row]]:
    """The benchmark that `prepare` makes ready: what every row says, the entries, the measures, and the turn of an entry."""

    @wraps(prepare)
    def run(config: BenchConfig, watch: Watch = SILENT) -> list[Row]:
        started = time.monotonic()
        return race(config, *prepare(config), watch, started)

    return run


def everyone(config: BenchConfig) -> list[Entry]:
    return [Entry(c) for c in config.contenders]


# -- a whole training step


@raced
def run_step(config: BenchConfig) -> Race:
    """Forward, backward, AdamW and zero_grad, with the model's own loss, step after step as in training.

    On a GPU also the time of the kernels alone: where a step takes longer than those, the host launches them too slowly.
    With `cuda_graph` the step is captured once and replayed: the same kernels, which nobody launches one by one.
    """
    work, family = Work.on_model(config), config.preset.family
    clock = work.clock
    sizes = config.preset.shape, config.batch, config.sequence, config.torch_device, config.torch_dtype
    batches = [family.batch(*sizes) for _ in range(INPUTS)]
    if config.cuda_graph:
        batches = [family.static(batch) for batch in batches]
    work.let_gradients_through()

    def turn(entry: Entry, profiled: bool = False) -> Turn:
        with work.adapted(entry.contender) as model:
            model.train()
            train = training(model, family, fused=clock.cuda, capturable=config.cuda_graph)
            clock.forget_peak()
            run = captured(train, batches[0]) if config.cuda_graph else train

            if profiled:
                return work.kernels(model, lambda: run(batches[0]))
            return work.steps(model, run, batches)

    about = work.setting(config.batch, config.sequence, cuda_graph=config.cuda_graph)
    return about, everyone(config), ["step", *[KERNELS] * clock.cuda], turn


def training(model: nn.Module, family: models.Family, fused: bool, capturable: bool = False) -> Callable[[models.Batch], None]:
    """A whole step on a batch: forward, backward, AdamW."""
    parameters = trained(model)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=fused, capturable=capturable) if parameters else None

    def train(batch: models.Batch) -> None:
        family.loss(model, batch).backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()

    return train


def captured(train: Callable[[models.Batch], None], example: models.Batch) -> Callable[[models.Batch], None]:
    """`train` as a CUDA graph: a call copies a batch to where the graph reads it, and replays."""
    place = {name: t.clone() for name, t in example.items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # lazy initialisation is no part of a step
            train(place)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train(place)

    def replay(batch: models.Batch) -> None:
        for name, t in batch.items():
            place[name].copy_(t)
        graph.replay()

    return replay


# -- one layer


PASSES = ["forward", "backward", "forward + backward"]


@raced
def run_layer(config: BenchConfig) -> Race:
    """One linear layer: forward, backward, both, and the bytes that are kept between them."""
    work = Work.on_layer(config)

    def turn(entry: Entry) -> Turn:
        return layer_turn(work, entry.contender, config.batch, config.sequence)

    return work.setting(config.batch, config.sequence), everyone(config), PASSES, turn


@raced
def run_scaling(config: BenchConfig) -> Race:
    """Forward and backward of one linear layer: over ranks at one number of tokens, over tokens at one rank."""
    work, tokens = Work.on_layer(config), config.batch * config.sequence
    entries = [Entry(c.with_rank(r), {"rank": r}) for r in config.ranks for c in config.contenders]
    entries += [Entry(c, {"tokens": t}) for t in config.token_counts for c in config.contenders]

    def turn(entry: Entry) -> Turn:
        return layer_turn(work, entry.contender, 1, entry.point.get("tokens", tokens))

    return work.setting(config.batch, config.sequence), entries, PASSES[-1:], turn


def layer_turn(work: Work, contender: Contender, batch: int, tokens: int) -> Turn:
    config, clock = work.config, work.clock
    n_in, n_out = config.features
    with work.adapted(contender) as model:
        options: dict[str, Any] = {"device": config.torch_device, "dtype": config.torch_dtype}
        inputs = [torch.randn(batch, tokens, n_in, **options).requires_grad_() for _ in range(INPUTS)]
        gradients = [torch.randn(batch, tokens, n_out, **options) for _ in range(INPUTS)]
        model.train()
        parameters = trained(model)
        y: list[Tensor] = []

        def once(i: int) -> list[float]:
            x, dy = inputs[i % INPUTS], gradients[i % INPUTS]
            for leaf in (x, *parameters):
                leaf.grad = None
            forward, backward = clock.laps(lambda: y.append(model(x)), lambda: y.pop().backward(dy))
            return [forward, backward, forward + backward]

        turn = work.repeated(model, PASSES, once)
        turn.saved = saved_bytes(lambda: model(inputs[0]), model.parameters())
        return turn


# -- using an adapter


@raced
def run_decode(config: BenchConfig) -> Race:
    """Greedy decoding with a cache, adapters unmerged: milliseconds for one token of the whole batch.

    On a GPU also the time of the kernels alone.
    """
    family = config.preset.family
    if not family.decodes:
        raise HalotuneError(f"decode: {config.model} does not generate text. Use a llama model.")
    work = Work.on_model(config)
    clock = work.clock
    sizes = config.batch, config.prompt, config.torch_device, config.torch_dtype
    prompt = family.batch(config.preset.shape, *sizes)["input_ids"]

    def turn(entry: Entry, profiled: bool = False) -> Turn:
        with work.adapted(entry.contender) as model, torch.inference_mode():
            model.eval()
            if entry.contender.library == "ours":
                model.cache_weights(config.weight_cache)
            state: dict[str, Any] = {"input_ids": prompt, "past_key_values": None}

            def token() -> None:
                out = model(**state, use_cache=True)
                state["past_key_values"] = out.past_key_values
                state["input_ids"] = out.logits[:, -1:].argmax(-1)

            token()  # the prompt
            if profiled:
                return work.kernels(model, token)
            return work.repeated(model, ["token"], lambda i: clock.laps(token))

    about = work.setting(config.batch, config.prompt, weight_cache_gib=config.weight_cache)
    return about, everyone(config), ["token", *[KERNELS] * clock.cuda], turn


@raced
def run_merge(config: BenchConfig) -> Race:
    """Writing the adapter into the weights, and undoing that."""
    work, measures = Work.on_model(config), ["merge", "unmerge"]

    def turn(entry: Entry) -> Turn:
        if entry.contender.library == FROZEN:
            raise Unavailable("has no adapter to merge")
        with work.adapted(entry.contender) as model:
            model.eval()
            return work.repeated(model, measures, lambda i: work.clock.laps(model.merge_adapter, model.unmerge_adapter))

    return work.setting(), everyone(config), measures, turn


@raced
def run_load(config: BenchConfig) -> Race:
    """Putting an adapter that was saved onto the model."""
    work = Work.on_model(config)

    def turn(entry: Entry) -> Turn:
        if entry.contender.library == FROZEN:
            raise Unavailable("has no adapter to load")
        library = LIBRARIES[entry.contender.library]
        with tempfile.TemporaryDirectory() as folder:
            with work.adapted(entry.contender) as model:
                trainable = count(model)
                model.save_pretrained(folder)
            del model

            def once(i: int) -> list[float]:
                loaded: list[Any] = []
                with restored(work.base), quiet():
                    times = work.clock.laps(lambda: loaded.append(library.load(work.base, folder)))
                    loaded[0].unload()
                return times

            return work.repeated(work.base, ["load"], once, trainable=trainable)

    return work.setting(), everyone(config), ["load"], turn


BENCHES: dict[str, Callable[..., list[Row]]] = {
    "step": run_step,
    "layer": run_layer,
    "decode": run_decode,
    "merge": run_merge,
    "load": run_load,
    "scaling": run_scaling,
}
