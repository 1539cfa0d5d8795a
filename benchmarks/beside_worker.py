"""What a worker of `beside.py` measures: one contender's turn at a time, with the halotune that PYTHONPATH names.

A job is a dict that arrives through a pipe, `{"kind": one of KINDS, …}`; the answer is a dict again:

    times     measure -> milliseconds of each repetition
    peak      the most memory that was allocated, weights included, in bytes; None on a CPU
    launches  CUDA kernels of one step
    layers    adapted layers
    problem   why nothing was measured; `skipped` where that is no fault, such as a library that is not installed
"""

from __future__ import annotations

import copy
import gc
import importlib
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn

import halotune
from halotune.bench.benches import Layer, captured, run_decode, run_layer
from halotune.bench.config import DTYPES, BenchConfig, parse_contenders
from halotune.bench.contenders import fill, quiet, restored
from halotune.bench.models import PRESETS, Llama, default_dtype, target_names
from halotune.bench.rows import hardware, versions
from halotune.bench.timing import Clock, no_collection

Job = dict[str, Any]
PACKAGES = {"ours": "halotune", "peft": "peft"}
INPUTS = 4  # batches that take turns
LLAMA = Llama()

# method -> the name of its configuration, and its options at a rank
CONFIGS: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
    "hra": ("HRAConfig", lambda r: {"r": r}),
    "loha": ("LoHaConfig", lambda r: {"r": r, "alpha": r}),
    "bone": ("MissConfig", lambda r: {"r": r}),
    "bat": ("MissConfig", lambda r: {"r": r, "init_weights": "bat"}),
    "lora": ("LoraConfig", lambda r: {"r": r, "lora_alpha": r}),
    "oft": ("OFTConfig", lambda r: {"r": 0, "oft_block_size": r}),  # r is the block's size
}


class Skip(Exception):
    """There is nothing to measure here; the message says why."""


def wrapped(base: nn.Module, contender: str, targets: list[str], form: str = "auto") -> nn.Module:
    """`base` with the adapter that `library:method-rRANK` names."""
    library, _, rest = contender.partition(":")
    method, _, r = rest.partition("-r")
    api, (name, options) = importlib.import_module(PACKAGES[library]), CONFIGS[method]
    if not hasattr(api, name):
        raise Skip(f"{PACKAGES[library]} has no {name}")
    with quiet():
        model = api.get_peft_model(base, getattr(api, name)(target_modules=targets, **options(int(r))))
    if form != "auto":
        if not hasattr(model, "set_adapter_form"):
            raise Skip("the form cannot be chosen")
        try:
            model.set_adapter_form(form)
        except halotune.HalotuneError as e:
            raise Skip(str(e)) from None
    return model


@contextmanager
def adapted(base: nn.Module, job: Job, targets: list[str]) -> Iterator[nn.Module]:
    """Inside, `base` has the job's adapter, if any, with small random values."""
    torch.manual_seed(0)  # the same values and inputs in every turn
    if job["contender"] == "frozen":
        yield base
        return
    with restored(base):
        model: Any = wrapped(base, job["contender"], targets, job.get("form", "auto"))
        try:
            fill(model)
            yield model
        finally:
            with quiet():
                model.unload()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def traced(work: Callable[[], object]) -> tuple[float, int]:
    """Milliseconds that the GPU spends on `work`, copies included, and the number of kernels."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    events: list[Any] = [e for e in profile.events() or () if e.device_type.name == "CUDA"]
    events = [
        e for e in events if not getattr(e, "is_user_annotation", False)
    ]  # ranges around kernels, such as the optimizer's
    kernels = [e for e in events if not e.name.startswith(("Memcpy", "Memset"))]
    return sum(e.self_device_time_total for e in events) / 1e3, len(kernels)


# -- a training step


class Models:
    """The base model of the jobs at hand; another one takes its place."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.key, self.model = device, "", None

    def drop(self) -> None:
        self.key, self.model = "", None
        Clock(self.device).clean()

    def get(self, job: Job) -> nn.Module:
        key = repr((job["shape"], job["dtype"], job["quantized"]))
        if key != self.key:
            self.drop()
            self.model = build(job["shape"], self.device, DTYPES[job["dtype"]], job["quantized"])
            self.key = key
        assert self.model is not None
        return self.model


def build(shape: dict[str, Any], device: torch.device, dtype: torch.dtype, quantized: bool) -> nn.Module:
    """A frozen Llama with random weights, made on the device; its linear layers but the head in nf4 where asked."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with quiet(), default_dtype(dtype), device:
        model: Any = LlamaForCausalLM(LlamaConfig(**{"tie_word_embeddings": False, **shape}))
    model = model.to(device, dtype).requires_grad_(False)
    if not quantized:
        return model
    bnb: Any = importlib.import_module("bitsandbytes")
    for name in target_names(model, LLAMA, "all-linear"):
        linear = model.get_submodule(name)
        small = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4")
        small.weight = bnb.nn.Params4bit(linear.weight.detach(), requires_grad=False, quant_type="nf4")
        model.set_submodule(name, small.to(device))
    model.is_loaded_in_4bit = True  # how peft knows
    return model


@contextmanager
def checkpointed(base: Any, how: str | None) -> Iterator[None]:
    """Inside, every decoder layer is checkpointed; `how` is "reentrant", "non-reentrant", or None: not at all."""
    if how is None:
        yield
        return
    with quiet():  # new names are announced for both
        base.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
    try:
        yield
    finally:
        with quiet():
            base.gradient_checkpointing_disable()


def step(job: Job, models: Models) -> Job:
    """Forward, backward, AdamW and zero_grad; gradients reach the embeddings' output whoever is measured."""
    base, device = models.get(job), models.device
    clock, graph = Clock(device), job["captured"] and device.type == "cuda"
    targets = target_names(base, LLAMA, job["targets"])
    flowing = LLAMA.entry(base).register_forward_hook(lambda module, args, out: out.requires_grad_(True))
    try:
        with checkpointed(base, job["checkpointing"]), adapted(base, job, targets) as model:
            batches = [
                LLAMA.batch(job["shape"], job["batch"], job["tokens"], device, DTYPES[job["dtype"]]) for _ in range(INPUTS)
            ]
            if job["captured"]:
                batches = [LLAMA.static(batch) for batch in batches]
            model.train()
            parameters = trained(model)
            options: dict[str, Any] = {"fused": clock.cuda, "capturable": graph}
            optimizer = torch.optim.AdamW(parameters, lr=1e-4, **options) if parameters else None

            def train(batch: dict[str, Tensor]) -> None:
                LLAMA.loss(model, batch).backward()
                if optimizer:
                    optimizer.step()
                    optimizer.zero_grad()

            clock.forget_peak()
            run = captured(train, batches[0]) if graph else train
            for i in range(job["warmup"]):
                run(batches[i % INPUTS])
            if not graph:  # whose memory is taken when it is captured
                gc.collect()  # off while timing; what the first steps left in cycles is no part of the peak
                clock.forget_peak()
            ms = [clock.laps(lambda i=i: run(batches[i % INPUTS]))[0] for i in range(job["steps"])]
            answer = {"times": {"step": ms}, "peak": clock.peak(), "layers": len(targets)}
            if clock.cuda and job["trace"]:
                busy, answer["launches"] = traced(lambda: run(batches[0]))
                answer["times"] = {"kernels": [busy]}
            return answer
    finally:
        flowing.remove()


# -- decoding, and one layer: as `halotune bench` does


def bench(job: Job, models: Models) -> Job:
    models.drop()
    measure = {"decode": run_decode, "layer": run_layer}[job["kind"]]
    config = BenchConfig(contenders=parse_contenders(job["contender"]), device=str(models.device), rounds=1, **job["options"])
    rows = measure(config)
    problem = next((row.problem for row in rows if row.problem), None)
    return {"times": {row.measure: row.times for row in rows}, "peak": rows[0].peak, "problem": problem}


# -- what of a small change of the output is seen


def deadzone(job: Job, models: Models) -> Job:
    """Projection of the observed change of a layer's output on the true one, `⟨Δy, Δ⟩ / ⟨Δ, Δ⟩`, in training mode.

    The parameters move from where they are along one random direction, until `|Δ| = target · |y|`. The true change Δ is
    that of the same adapter with the same parameters on the same weights in float64; it is the library's own, whose
    agreement with the definition is for the tests. "trained" starts where such a move has changed the output by 0.03.
    """
    models.drop()
    torch.manual_seed(0)
    device, dtype, (n_in, n_out) = models.device, DTYPES[job["dtype"]], job["features"]
    base = Layer(n_in, n_out).to(device, dtype).requires_grad_(False)
    exact = copy.deepcopy(base).double()
    model = wrapped(base, job["contender"], ["linear"], job["form"]).train()
    reference = wrapped(exact, job["contender"], ["linear"]).double().eval()
    parameters, copies = trained(model), trained(reference)
    x = torch.randn(job["rows"], n_in, device=device, dtype=dtype)
    few = x[:64].double()  # enough to find how far to go

    @torch.no_grad()
    def put(values: list[Tensor]) -> None:
        for p, q, value in zip(parameters, copies, values, strict=True):
            p.copy_(value)
            q.copy_(p)  # rounded as the parameter is

    @torch.no_grad()
    def truth(x: Tensor) -> Tensor:
        return reference(x)

    @torch.no_grad()
    def moved(start: list[Tensor], way: list[Tensor], far: float) -> list[Tensor]:
        return [value + far * d for value, d in zip(start, way, strict=True)]

    def distance(start: list[Tensor], way: list[Tensor], target: float) -> float:
        """How far to go: a secant search in logarithms, in which the change is nearly a straight line."""
        put(start)
        before, far, slope, last = truth(few), 1e-3, 1.0, None
        for _ in range(40):
            put(moved(start, way, far))
            reached = max(float((truth(few) - before).norm() / before.norm()), 1e-12)
            if abs(reached / target - 1) < 0.02:
                break
            if last is not None:
                slope = min(4.0, max(0.5, math.log(reached / last[1]) / math.log(far / last[0])))
            last = far, reached
            far *= (target / reached) ** (1 / slope)
        return far

    def direction() -> list[Tensor]:
        return [torch.randn_like(p) for p in parameters]

    first = [p.detach().clone() for p in parameters]
    way = direction()
    later = moved(first, way, distance(first, way, 0.03))
    seen: dict[str, dict[str, Any]] = {}
    for name, start in {"start": first, "trained": later}.items():
        way, seen[name] = direction(), {}
        for target in job["targets"]:
            far = distance(start, way, target)
            put(start)
            y, observed = truth(x.double()), model(x).detach().double()
            put(moved(start, way, far))
            true, observed = truth(x.double()) - y, model(x).detach().double() - observed
            projection = float((observed * true).sum() / (true * true).sum())
            seen[name][f"{target:g}"] = {"projection": projection, "reached": float(true.norm() / y.norm())}
    return {"times": {}, "seen": seen, "outputs": job["rows"] * n_out}


KINDS: dict[str, Callable[[Job, Models], Job]] = {"step": step, "decode": bench, "layer": bench, "deadzone": deadzone}


def attempt(job: Job, models: Models) -> Job:
    """The answer, or the reason why there is none. A contender that breaks is a result, not the end of the run."""
    try:
        return KINDS[job["kind"]](job, models)
    except (Skip, ImportError) as e:
        return {"problem": str(e), "skipped": True}
    except torch.OutOfMemoryError:
        return {"problem": "out of memory"}
    except Exception as e:
        return {"problem": f"{type(e).__name__}: {' '.join(str(e).split())}"[:500]}


def serve(pipe: Connection, device: str) -> None:
    """Answer jobs until the other end of the pipe is closed."""
    models, clock = Models(torch.device(device)), Clock(torch.device(device))
    shapes = {name: dict(preset.shape) for name, preset in PRESETS.items()}
    pipe.send({"file": halotune.__file__, "hardware": hardware(models.device), "versions": versions(), "shapes": shapes})
    with no_collection():
        while True:
            try:
                job = pipe.recv()
            except EOFError:
                return
            answer = attempt(job, models)
            clock.clean()  # after the exception is gone, and with it the frames that held the tensors
            pipe.send(answer)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), sys.argv[2])
