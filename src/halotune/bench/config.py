"""What to measure, on what, and how often."""

from __future__ import annotations

import re
from argparse import ArgumentTypeError
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from ..cli.options import integer, integers
from ..core.errors import HalotuneError
from .contenders import Contender, spelling
from .models import PRESETS, TARGETS, Preset

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
CONTENDERS = (
    "frozen,ours:hra-r8,ours:hra-r32,ours:loha-r8,ours:bone-r64,ours:bat-r64,ours:lora-r32,"
    "peft:hra-r8,peft:lora-r32,lycoris:loha-r8"
)


def parse_contenders(text: str) -> tuple[Contender, ...]:
    """From a list with commas; each once."""
    return tuple(dict.fromkeys(Contender.parse(part.strip()) for part in text.split(",")))


def _features(text: str) -> tuple[int, ...]:
    if text.lower().count("x") != 1:
        raise ArgumentTypeError(f"expected two sizes such as 4096x11008; got {text!r}")
    return integers("x")(text.lower())


def _option(help: str, **flag: Any) -> Any:
    """A field that is a flag of `halotune bench` too: `flag` is what argparse is told of it, its default the field's."""
    default = {"default": flag.pop("default")} if "default" in flag else {}
    return field(**default, metadata={"help": help, **flag})


def _number(help: str, default: int | None, least: int = 1, **flag: Any) -> Any:
    return _option(help, default=default, type=integer(least), metavar="N", **flag)


def _list(help: str, default: tuple[int, ...]) -> Any:
    return _option(help, default=default, type=integers(","), metavar="LIST")


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """One run. What a field means is its help on the command line."""

    contenders: tuple[Contender, ...] = _option(f"{spelling()}; with commas (default: %(default)s)", metavar="LIST")
    model: str = _option("(default: %(default)s)", default="llama-tiny", choices=list(PRESETS))
    layers: int | None = _number("another number of layers (of a UNet: in each block)", None)
    targets: str = _option("adapted modules; all: convolutions too", default="all-linear", choices=TARGETS)
    batch: int = _number("samples of a batch (default: 4; for decode 8)", 4)
    tokens: int | None = _number("of a sample; for a UNet, pixels of the latent (default: the model's)", None)
    dtype: str = _option("of weights and activations (default: %(default)s)", default="bf16", choices=list(DTYPES))
    device: str = _option("cpu or cuda (default: %(default)s)", default="cpu")
    rounds: int = _number("turns of every contender (default: %(default)s)", 5)
    steps: int = _number("timed repetitions of a turn (default: 5; for decode 16)", 5, flag="--steps-per-round")
    warmup: int = _number("repetitions before, not timed (default: %(default)s)", 2, least=0)
    compile: bool = _option("compile every layer of the model in full", default=False, action="store_true")
    cuda_graph: bool = _option("of step: capture it once and replay it", default=False, action="store_true")
    nproc: int | None = _number("of step: also in so many processes, which share the model by FSDP2", None, least=2)
    time_limit: float | None = _option(
        "start no turn after that, and report what was measured", default=None, type=float, metavar="SECONDS"
    )
    features: tuple[int, int] = _option(
        "of the layer (default: 4096x4096)", default=(4096, 4096), type=_features, metavar="INxOUT"
    )
    prompt: int = _number("tokens before decoding (default: %(default)s)", 16)
    weight_cache: float = _option(
        "for our adapted weights, to decode (default: 8; 0: none)", default=8.0, type=float, metavar="GIB"
    )
    ranks: tuple[int, ...] = _list("of scaling (default: 2,4 … 256)", tuple(2**i for i in range(1, 9)))
    token_counts: tuple[int, ...] = _list("of scaling (default: 64,256 … 16384)", tuple(4**i for i in range(3, 8)))

    def __post_init__(self) -> None:
        for f in fields(self):
            choices, value = f.metadata.get("choices"), getattr(self, f.name)
            if choices and value not in choices:
                raise HalotuneError(f"{f.name}: expected one of {', '.join(choices)}; got {value!r}.")
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise HalotuneError(f"device: expected cpu, cuda or cuda:N; got {self.device!r}.")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise HalotuneError(f"device: {self.device} was asked for, but torch finds no CUDA device. Use cpu.")
        if self.cuda_graph and self.device == "cpu":
            raise HalotuneError("cuda_graph: a CPU has none. Use device cuda, or leave it out.")
        if self.nproc and self.cuda_graph:
            raise HalotuneError("nproc: steps of several processes are launched one by one. Leave out cuda_graph.")

    @property
    def preset(self) -> Preset:
        return PRESETS[self.model].with_layers(self.layers)

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def sequence(self) -> int:
        """Tokens of a sample."""
        return self.preset.tokens if self.tokens is None else self.tokens
