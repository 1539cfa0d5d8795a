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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import HalotuneError
from . import models
from .config import BenchConfig
from .contenders import LIBRARIES, Contender, Unavailable, quiet, restored
from .race import Entry, Turn, Watch, race
from .rows import Row, hardware, versions
from .timing import Clock, saved_bytes

SILENT = Watch()
KERNELS = "kernels"
INPUTS = 4  # sets of inputs that take turns, so that no step finds its input in a cache
SEED = 0


@dataclass(frozen=True)
class Work:
    """A model, and where the adapters go."""

    base: nn.Module
    targets: Sequence[str]
    blocks: Sequence[str]  # names of the classes to be compiled, if any

    @classmethod
    def of(cls, config: BenchConfig) -> Work:
        torch.manual_seed(SEED)
        family = config.preset.family
        try:
            with quiet():
                base = models.build(config.preset, config.torch_device, config.torch_dtype)
        except Unavailable as e:
            raise HalotuneError(f"model: {config.model} needs a library that {e}. Install it, or take another.") from None
        return cls(base, models.target_names(base, family, config.targets), family.blocks if config.compile else ())

    @contextmanager
    def adapted(self, contender: Contender) -> Iterator[nn.Module]:
        torch.manual_seed(SEED)  # the same inputs and values in every turn
        with contender.on(self.base, self.targets) as model, compiled(model, self.blocks):
            yield model


@contextmanager
def compiled(model: nn.Module, blocks: Sequence[str]) -> Iterator[None]:
    """Inside, every module of these classes is compiled without a graph break."""
    chosen = [m for m in model.modules() if type(m).__name__ in blocks]
    if not chosen:
        yield
        return
    torch.compiler.reset()  # others' code would be looked at first, and count against the limit of recompilations
    for module in chosen:
        module.compile(fullgraph=True, dynamic=False)
    try:
        yield
    finally:
        for module in chosen:
            module._compiled_call_impl = None


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def count(parameters: Sequence[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


# -- a whole training step


def run_step(config: BenchConfig, watch: Watch = SILENT) -> list[Row]:
    """Forward, backward, AdamW and zero_grad, with the model's own loss, step after step as in training.

    On a GPU also the time of the kernels alone: where a step takes longer than those, the host launches them too slowly.
    With `cuda_graph` the step is captured once and replayed: the same kernels, which nobody launches one by one.
    """
    started = time.monotonic()
    work, clock, family = Work.of(config), Clock(config.torch_device), config.preset.family
    measures = ["step", KERNELS] if clock.cuda else ["step"]
    sizes = config.preset.shape, config.batch, config.sequence, config.torch_device, config.torch_dtype
    batches = [family.batch(*sizes) for _ in range(INPUTS)]
    if config.cuda_graph:
        batches = [family.static(batch) for batch in batches]

    def turn(entry: Entry) -> Turn:
        with work.adapted(entry.contender) as model:
            model.train()
            parameters = trained(model)
            options: dict[str, Any] = {"fused": clock.cuda, "capturable": config.cuda_graph}
            optimizer = torch.optim.AdamW(parameters, lr=1e-4, **options) if parameters else None

            def train(batch: models.Batch) -> None:
                family.loss(model, batch).backward()
                if optimizer:
                    optimizer.step()
                    optimizer.zero_grad()

            clock.forget_peak()
            run = captured(train, batches[0]) if config.cuda_graph else train

            def step(i: int) -> None:
                run(batches[i % INPUTS])

            for i in range(config.warmup):
                step(i)
            if not config.cuda_graph:  # whose memory is taken when it is captured
                gc.collect()  # off while timing; what the first steps left in cycles is no part of the peak
                clock.forget_peak()
            times = clock.laps(*(partial(step, config.warmup + i) for i in range(config.steps)))
            peak, measured = clock.peak(), {"step": times}
            if clock.cuda:
                measured[KERNELS] = [clock.busy(lambda: step(0))]
            return Turn(measured, count(parameters), peak)

    flowing = family.entry(work.base).register_forward_hook(lambda module, args, out: out.requires_grad_(True))
    try:
        return race(
            config,
            {**setting(config, work, config.batch, config.sequence), "cuda_graph": config.cuda_graph},
            everyone(config),
            measures,
            turn,
            watch,
            started,
        )
    finally:
        flowing.remove()


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


def repeated(config: BenchConfig, clock: Clock, once: Callable[[int], list[float]]) -> tuple[list[list[float]], int | None]:
    """Warm up, then repeat; the laps of each repetition, and the peak memory of the timed ones."""
    for i in range(config.warmup):
        once(i)
    gc.collect()  # off while timing; what the first repetitions left in cycles is no part of the peak
    clock.forget_peak()
    times = [once(config.warmup + i) for i in range(config.steps)]
    return times, clock.peak()


# -- one layer


class Layer(nn.Module):
    """A linear layer in a model, so that every library can find it by name."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n_in, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


PASSES = ["forward", "backward", "forward + backward"]


def run_layer(config: BenchConfig, watch: Watch = SILENT) -> list[Row]:
    """One linear layer: forward, backward, both, and the bytes that are kept between them."""
    started = time.monotonic()
    work = layer_work(config)

    def turn(entry: Entry) -> Turn:
        return layer_turn(config, work, entry.contender, config.batch, config.sequence)

    return race(config, setting(config, work, config.batch, config.sequence), everyone(config), PASSES, turn, watch, started)


def run_scaling(config: BenchConfig, watch: Watch = SILENT) -> list[Row]:
    """Forward and backward of one linear layer: over ranks at one number of tokens, over tokens at one rank."""
    started = time.monotonic()
    work, tokens = layer_work(config), config.batch * config.sequence
    entries = [Entry(c.with_rank(r), {"rank": r}) for r in config.ranks for c in config.contenders]
    entries += [Entry(c, {"tokens": t}) for t in config.token_counts for c in config.contenders]

    def turn(entry: Entry) -> Turn:
        return layer_turn(config, work, entry.contender, 1, entry.point.get("tokens", tokens))

    return race(config, setting(config, work, config.batch, config.sequence), entries, PASSES[-1:], turn, watch, started)


def layer_work(config: BenchConfig) -> Work:
    torch.manual_seed(SEED)
    base = Layer(*config.features).to(config.torch_device, config.torch_dtype).requires_grad_(False)
    return Work(base, ["linear"], ["Layer"] if config.compile else ())


def layer_turn(config: BenchConfig, work: Work, contender: Contender, batch: int, tokens: int) -> Turn:
    clock, (n_in, n_out) = Clock(config.torch_device), config.features
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
            return clock.laps(lambda: y.append(model(x)), lambda: y.pop().backward(dy))

        times, peak = repeated(config, clock, once)
        forward, backward = [a for a, _ in times], [b for _, b in times]
        both = [a + b for a, b in times]
        saved = saved_bytes(lambda: model(inputs[0]), model.parameters())
        return Turn(dict(zip(PASSES, (forward, backward, both), strict=True)), count(parameters), peak, saved)


# -- using an adapter


def run_decode(config: BenchConfig, watch: Watch = SILENT) -> list[Row]:
    """Greedy decoding with a cache, adapters unmerged: milliseconds for one token of the whole batch.

    On a GPU also the time of the kernels alone.
    """
    started = time.monotonic()
    family = config.preset.family
    if not family.decodes:
        raise HalotuneError(f"decode: {config.model} does not generate text. Use a llama model.")
    work, clock = Work.of(config), Clock(config.torch_device)
    measures = ["token", KERNELS] if clock.cuda else ["token"]
    sizes = config.batch, config.prompt, config.torch_device, config.torch_dtype
    prompt = family.batch(config.preset.shape, *sizes)["input_ids"]

    def turn(entry: Entry) -> Turn:
        with work.adapted(entry.contender) as model, torch.inference_mode():
            model.eval()
            LIBRARIES[entry.contender.library].cache(model, config.weight_cache)
            parameters = trained(model)
            state: dict[str, Any] = {"input_ids": prompt, "past_key_values": None}

            def token() -> None:
                out = model(**state, use_cache=True)
                state["past_key_values"] = out.past_key_values
                state["input_ids"] = out.logits[:, -1:].argmax(-1)

            token()  # the prompt
            times, peak = repeated(config, clock, lambda i: clock.laps(token))
            measured = {"token": [t for (t,) in times]}
            if clock.cuda:
                measured[KERNELS] = [clock.busy(token)]
            return Turn(measured, count(parameters), peak)

    about = {**setting(config, work, config.batch, config.prompt), "weight_cache_gib": config.weight_cache}
    return race(config, about, everyone(config), measures, turn, watch, started)


def run_merge(config: BenchConfig, watch: Watch = SILENT) -> list[Row]:
    """Writing the adapter into the weights, and undoing that."""
    started = time.monotonic()
    work, clock = Work.of(config), Clock(config.torch_device)

    def turn(entry: Entry) -> Turn:
        library = LIBRARIES[entry.contender.library]
        with work.adapted(entry.contender) as model:
            model.eval()
            laps = lambda i: clock.laps(lambda: library.merge(model), lambda: library.unmerge(model))  # noqa: E731
            times, peak = repeated(config, clock, laps)
            merge, unmerge = [a for a, _ in times], [b for _, b in times]
            return Turn({"merge": merge, "unmerge": unmerge}, count(trained(model)), peak)

    return race(config, setting(config, work), everyone(config), ["merge", "unmerge"], turn, watch, started)


def run_load(config: BenchConfig, watch: Watch = SILENT) -> list[Row]:
    """Putting an adapter that was saved onto the model."""
    started = time.monotonic()
    work, clock = Work.of(config), Clock(config.torch_device)

    def turn(entry: Entry) -> Turn:
        library = LIBRARIES[entry.contender.library]
        with tempfile.TemporaryDirectory() as folder:
            with work.adapted(entry.contender) as model:
                parameters = count(trained(model))
                library.save(model, Path(folder))
            del model

            def once(i: int) -> list[float]:
                loaded: list[nn.Module] = []
                with restored(work.base), quiet():
                    times = clock.laps(lambda: loaded.append(library.load(work.base, Path(folder))))
                    library.unload(loaded[0])
                return times

            times, peak = repeated(config, clock, once)
            return Turn({"load": [t for (t,) in times]}, parameters, peak)

    return race(config, setting(config, work), everyone(config), ["load"], turn, watch, started)


# -- common parts


def everyone(config: BenchConfig) -> list[Entry]:
    return [Entry(c) for c in config.contenders]


def setting(config: BenchConfig, work: Work, batch: int | None = None, tokens: int | None = None) -> dict[str, Any]:
    """Everything one has to know to compare a row with another, or to measure it again."""
    layer = isinstance(work.base, Layer)
    family = config.preset.family
    shape: dict[str, Any] = dict(config.preset.shape)
    if layer:
        shape = {"in_features": config.features[0], "out_features": config.features[1]}
    return {
        "device": hardware(config.torch_device),
        "versions": versions(),
        "model": "linear layer" if layer else config.model,
        "shape": shape,
        "targets": None if layer else config.targets,
        "adapted_modules": len(work.targets),
        "dtype": config.dtype,
        "batch": batch,
        "tokens": tokens,
        "compiled": list(family.blocks) if config.compile and not layer else config.compile,
        "rounds": config.rounds,
        "steps": config.steps,
        "warmup": config.warmup,
    }


BENCHES: dict[str, Callable[..., list[Row]]] = {
    "step": run_step,
    "layer": run_layer,
    "decode": run_decode,
    "merge": run_merge,
    "load": run_load,
    "scaling": run_scaling,
}
