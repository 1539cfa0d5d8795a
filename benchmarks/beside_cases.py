"""What `beside.py` measures: its suites, each of a few tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

FORMS = ("auto", "activations", "weights")


@dataclass(frozen=True)
class Case:
    """One table.

    Attributes:
        title: its heading; `--only` looks into it.
        contenders: `frozen`, or `ours|peft:method-rRANK`.
        job: what a worker has to know beside the contender.
        once: one round is enough: nothing is timed.
    """

    title: str
    contenders: tuple[str, ...]
    job: dict[str, Any]
    once: bool = False


def training(
    title: str,
    model: str,
    contenders: str,
    *,
    batch: tuple[int, int],
    targets: str = "all-linear",
    steps: int = 5,
    **special: Any,
) -> Case:
    """Whole training steps in bf16; `special`: layers, captured, checkpointing, quantized."""
    job = {"kind": "step", "model": model, "targets": targets, "dtype": "bf16", "batch": batch[0], "tokens": batch[1]}
    job |= {"layers": None, "captured": False, "checkpointing": None, "quantized": False, "warmup": 2, "steps": steps}
    job |= {"trace": not special.get("captured"), **special}
    return Case(f"{title}, {batch[0]} × {batch[1]}", ("frozen", *contenders.split()), job)


def captured_3b() -> Iterator[Case]:
    ours = "ours:hra-r8 ours:hra-r32 ours:loha-r8 ours:loha-r32 ours:bone-r64 ours:bat-r64 ours:lora-r32"
    for targets in ("all-linear", "qv"):
        title = f"3B, captured, {targets}"
        yield training(title, "llama-3b", f"{ours} peft:lora-r32", batch=(4, 768), targets=targets, captured=True)


def small() -> Iterator[Case]:
    who = "ours:hra-r8 ours:loha-r8 ours:bone-r64 ours:bat-r64 ours:lora-r8 peft:lora-r8"
    for batch in ((32, 512), (8, 256)):
        yield training("135M, eager", "llama-135m", who, batch=batch, steps=10)


def one_b() -> Iterator[Case]:
    yield training("1B, eager", "llama-1b", "ours:hra-r8 ours:lora-r32 peft:lora-r32", batch=(4, 768), steps=10)


def checkpointed() -> Iterator[Case]:
    for model in ("llama-1b", "llama-3b"):
        for how in ("non-reentrant", "reentrant"):
            title = f"{model[6:].upper()}, eager, {how} checkpoints"
            yield training(title, model, "ours:hra-r8 ours:lora-r8", batch=(4, 768), checkpointing=how)


def decode() -> Iterator[Case]:
    who = ("frozen", "ours:hra-r8", "ours:loha-r8", "ours:bone-r64", "ours:bat-r64", "ours:lora-r8", "peft:lora-r8")
    options = {"model": "llama-3b", "dtype": "bf16", "batch": 8, "prompt": 16, "steps": 16, "weight_cache": 8.0}
    yield Case("3B, decoding with a budget of 8 GiB for adapted weights, batch 8", who, {"kind": "decode", "options": options})


def nf4() -> Iterator[Case]:
    who = "ours:hra-r8 ours:loha-r8 ours:bone-r64 ours:lora-r8 peft:lora-r8"
    yield training("1B of 8 layers in nf4, eager", "llama-1b", who, batch=(4, 512), steps=10, layers=8, quantized=True)


def oft() -> Iterator[Case]:
    who = "ours:oft-r32 peft:oft-r32 ours:lora-r32"
    for captured in (True, False):
        title = f"3B, OFT of block 32, {'captured' if captured else 'eager'}"
        yield training(title, "llama-3b", who, batch=(4, 768), captured=captured)


def cpu_layer() -> Iterator[Case]:
    who = ("frozen", "ours:hra-r8", "ours:loha-r8", "ours:bone-r64", "ours:lora-r8")
    for dtype in ("bf16", "fp32"):
        options = {"dtype": dtype, "batch": 1, "tokens": 256, "features": (4096, 4096), "steps": 5, "warmup": 2}
        yield Case(f"one layer of 4096 × 4096, 256 tokens, {dtype}", who, {"kind": "layer", "options": options})


def deadzone() -> Iterator[Case]:
    methods = ("hra-r8", "loha-r8", "loha-r32", "bone-r64", "bat-r64", "lora-r32", "oft-r32")
    job = {
        "kind": "deadzone",
        "dtype": "bf16",
        "features": (3072, 3072),
        "rows": 2048,
        "targets": (1e-4, 3e-4, 1e-3, 1e-2, 1e-1),
    }
    for form in FORMS:
        who = tuple(f"{library}:{m}" for m in methods for library in ("ours", *["peft"] * (form == "auto")))
        yield Case(f"what of a change is seen, form {form}", who, {**job, "form": form}, once=True)


SUITES: dict[str, Callable[[], Iterator[Case]]] = {
    "captured-3b": captured_3b,
    "small": small,
    "1b": one_b,
    "checkpointed": checkpointed,
    "decode": decode,
    "nf4": nf4,
    "deadzone": deadzone,
    "cpu-layer": cpu_layer,
    "oft": oft,
}


TINY: dict[str, dict[str, Any]] = {
    "step": {"model": "llama-tiny", "layers": 1, "batch": 1, "tokens": 8, "warmup": 0, "steps": 2},
    "decode": {"model": "llama-tiny", "layers": 1, "batch": 1, "prompt": 2, "steps": 2, "warmup": 0},
    "layer": {"features": (128, 128), "tokens": 8, "steps": 2, "warmup": 0},
    "deadzone": {"features": (128, 128), "rows": 64, "targets": (1e-3, 1e-1)},
}


def chosen(suite: str, only: str | None, contenders: str | None, tiny: bool) -> Iterator[Case]:
    """The cases of a suite that are asked for.

    Args:
        only: a part of their titles.
        contenders: parts of the contenders' names, with commas; the bare model is always there.
        tiny: at a size for a test: the same code, and figures that mean nothing.
    """
    for case in SUITES[suite]():
        if only and only not in case.title:
            continue
        if tiny:
            job, change = case.job, TINY[case.job["kind"]]
            case = replace(
                case, job={**job, "options": {**job["options"], **change}} if "options" in job else {**job, **change}
            )
        if contenders:
            named = tuple(c for c in case.contenders if c == "frozen" or any(text in c for text in contenders.split(",")))
            case = replace(case, contenders=named)
        yield case
