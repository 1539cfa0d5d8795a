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
    def adapted(self, contender: Contender) -> Iterator[Any]:
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


def start_timing(clock: Clock) -> None:
    gc.collect()  # off while timing; what warming up left in cycles is no part of the peak
    clock.forget_peak()


def repeated(
    config: BenchConfig, model: nn.Module, measures: Sequence[str], once: Callable[[int, Clock], list[float]], **more: Any
) -> Turn:
    """Warm up, then repeat `once`, which gives the laps of each measure; `more` of the turn."""
    clock = Clock(config.torch_device)
    for i in range(config.warmup):
        once(i, clock)
    start_timing(clock)
    laps = [once(config.warmup + i, clock) for i in range(config.steps)]
    times = {measure: list(of_one) for measure, of_one in zip(measures, zip(*laps, strict=True), strict=True)}
    return Turn(times, **{"trainable": sum(p.numel() for p in trained(model)), "peak": clock.peak(), **more})


Race = tuple[dict[str, Any], list[Entry], list[str], Callable[[Entry], Turn]]


def raced(prepare: Callable[[BenchConfig], Race]) -> Callable[..., list[Row]]:
    """The benchmark that `prepare` makes ready: what every row says, the entries, the measures, and the turn of an entry."""

    @wraps(prepare)
    def run(config: BenchConfig, watch: Watch = SILENT) -> list[Row]:
        started = time.monotonic()
        return race(config, *prepare(config), watch, started)

    return run


# -- a whole training step


@raced
def run_step(config: BenchConfig) -> Race:
    """Forward, backward, AdamW and zero_grad, with the model's own loss, step after step as in training.

    On a GPU also the time of the kernels alone: where a step takes longer than those, the host launches them too slowly.
    With `cuda_graph` the step is captured once and replayed: the same kernels, which nobody launches one by one.
    """
    work, clock, family = Work.of(config), Clock(config.torch_device), config.preset.family
    sizes = config.preset.shape, config.batch, config.sequence, config.torch_device, config.torch_dtype
    batches = [family.batch(*sizes) for _ in range(INPUTS)]
    if config.cuda_graph:
        batches = [family.static(batch) for batch in batches]
    family.entry(work.base).register_forward_hook(lambda module, args, out: out.requires_grad_(True))

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
                start_timing(clock)
            measured = {"step": clock.laps(*(partial(step, config.warmup + i) for i in range(config.steps)))}
            peak = clock.peak()
            if clock.cuda:
                measured[KERNELS] = [clock.busy(lambda: step(0))]
            return Turn(measured, sum(p.numel() for p in parameters), peak)

    about = {**setting(config, work, config.batch, config.sequence), "cuda_graph": config.cuda_graph}
    return about, everyone(config), ["step", *[KERNELS] * clock.cuda], turn


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


class Layer(nn.Module):
    """A linear layer in a model, so that every library can find it by name."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n_in, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


PASSES = ["forward", "backward", "forward + backward"]


@raced
def run_layer(config: BenchConfig) -> Race:
    """One linear layer: forward, backward, both, and the bytes that are kept between them."""
    work = layer_work(config)

    def turn(entry: Entry) -> Turn:
        return layer_turn(config, work, entry.contender, config.batch, config.sequence)

    return setting(config, work, config.batch, config.sequence), everyone(config), PASSES, turn


@raced
def run_scaling(config: BenchConfig) -> Race:
    """Forward and backward of one linear layer: over ranks at one number of tokens, over tokens at one rank."""
    work, tokens = layer_work(config), config.batch * config.sequence
    entries = [Entry(c.with_rank(r), {"rank": r}) for r in config.ranks for c in config.contenders]
    entries += [Entry(c, {"tokens": t}) for t in config.token_counts for c in config.contenders]

    def turn(entry: Entry) -> Turn:
        return layer_turn(config, work, entry.contender, 1, entry.point.get("tokens", tokens))

    return setting(config, work, config.batch, config.sequence), entries, PASSES[-1:], turn


def layer_work(config: BenchConfig) -> Work:
    torch.manual_seed(SEED)
    base = Layer(*config.features).to(config.torch_device, config.torch_dtype).requires_grad_(False)
    return Work(base, ["linear"], ["Layer"] if config.compile else ())


def layer_turn(config: BenchConfig, work: Work, contender: Contender, batch: int, tokens: int) -> Turn:
    n_in, n_out = config.features
    with work.adapted(contender) as model:
        options: dict[str, Any] = {"device": config.torch_device, "dtype": config.torch_dtype}
        inputs = [torch.randn(batch, tokens, n_in, **options).requires_grad_() for _ in range(INPUTS)]
        gradients = [torch.randn(batch, tokens, n_out, **options) for _ in range(INPUTS)]
        model.train()
        parameters = trained(model)
        y: list[Tensor] = []

        def once(i: int, clock: Clock) -> list[float]:
            x, dy = inputs[i % INPUTS], gradients[i % INPUTS]
            for leaf in (x, *parameters):
                leaf.grad = None
            forward, backward = clock.laps(lambda: y.append(model(x)), lambda: y.pop().backward(dy))
            return [forward, backward, forward + backward]

        turn = repeated(config, model, PASSES, once)
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
    work, clock = Work.of(config), Clock(config.torch_device)
    sizes = config.batch, config.prompt, config.torch_device, config.torch_dtype
    prompt = family.batch(config.preset.shape, *sizes)["input_ids"]

    def turn(entry: Entry) -> Turn:
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
            turn = repeated(config, model, ["token"], lambda i, clock: clock.laps(token))
            if clock.cuda:
                turn.times[KERNELS] = [clock.busy(token)]
            return turn

    about = {**setting(config, work, config.batch, config.prompt), "weight_cache_gib": config.weight_cache}
    return about, everyone(config), ["token", *[KERNELS] * clock.cuda], turn


@raced
def run_merge(config: BenchConfig) -> Race:
    """Writing the adapter into the weights, and undoing that."""
    work, measures = Work.of(config), ["merge", "unmerge"]

    def turn(entry: Entry) -> Turn:
        if entry.contender.library == FROZEN:
            raise Unavailable("has no adapter to merge")
        with work.adapted(entry.contender) as model:
            model.eval()
            return repeated(config, model, measures, lambda i, clock: clock.laps(model.merge_adapter, model.unmerge_adapter))

    return setting(config, work), everyone(config), measures, turn


@raced
def run_load(config: BenchConfig) -> Race:
    """Putting an adapter that was saved onto the model."""
    work = Work.of(config)

    def turn(entry: Entry) -> Turn:
        if entry.contender.library == FROZEN:
            raise Unavailable("has no adapter to load")
        library = LIBRARIES[entry.contender.library]
        with tempfile.TemporaryDirectory() as folder:
            with work.adapted(entry.contender) as model:
                trainable = sum(p.numel() for p in trained(model))
                model.save_pretrained(folder)
            del model

            def once(i: int, clock: Clock) -> list[float]:
                loaded: list[Any] = []
                with restored(work.base), quiet():
                    times = clock.laps(lambda: loaded.append(library.load(work.base, folder)))
                    loaded[0].unload()
                return times

            return repeated(config, work.base, ["load"], once, trainable=trainable)

    return setting(config, work), everyone(config), ["load"], turn


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
