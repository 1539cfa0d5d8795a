"""What to measure, on what, and how often."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from ..core.errors import HalotuneError
from .contenders import Contender
from .models import TARGETS, Preset, preset_of

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
CONTENDERS = (
    "frozen,ours:hra-r8,ours:hra-r32,ours:loha-r8,ours:bone-r64,ours:bat-r64,ours:lora-r32,"
    "peft:hra-r8,peft:lora-r32,lycoris:loha-r8"
)


def parse_contenders(text: str) -> tuple[Contender, ...]:
    """From a list with commas; each once."""
    return tuple(dict.fromkeys(Contender.parse(part.strip()) for part in text.split(",")))


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """One run.

    Args:
        contenders: who is compared.
        model: a name in `PRESETS`.
        layers: a different number of layers than the preset's.
        targets: which modules get an adapter: `"qv"`, `"all-linear"`, or `"all"`, convolutions included.
        batch: samples of a batch.
        tokens: tokens of a sample (for a UNet, pixels of the latent); None is the preset's own number.
        dtype: of the base model and the activations: a key of `DTYPES`.
        device: where to run.
        rounds: how often every contender takes its turn.
        steps: timed repetitions of a turn; of decoding, new tokens.
        warmup: repetitions before, not timed.
        compile: compile each block of the model, in full.
        cuda_graph: capture a whole training step, and replay it.
        time_limit: seconds after which no turn starts.
        features: inputs and outputs of the single layer.
        prompt: tokens in the cache before decoding starts.
        weight_cache: GiB in which ours may keep W' while decoding.
        ranks, token_counts: the points of the curves.
    """

    contenders: tuple[Contender, ...]
    model: str = "llama-tiny"
    layers: int | None = None
    targets: str = "all-linear"
    batch: int = 4
    tokens: int | None = None
    dtype: str = "bf16"
    device: str = "cpu"
    rounds: int = 5
    steps: int = 5
    warmup: int = 2
    compile: bool = False
    cuda_graph: bool = False
    time_limit: float | None = None
    features: tuple[int, int] = (4096, 4096)
    prompt: int = 16
    weight_cache: float = 8.0
    ranks: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128, 256)
    token_counts: tuple[int, ...] = (64, 256, 1024, 4096, 16384)

    def __post_init__(self) -> None:
        for name, choices in {"dtype": tuple(DTYPES), "targets": TARGETS}.items():
            if getattr(self, name) not in choices:
                raise HalotuneError(f"{name}: expected one of {', '.join(choices)}; got {getattr(self, name)!r}.")
        preset_of(self.model)
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise HalotuneError(f"device: expected cpu, cuda or cuda:N; got {self.device!r}.")
        if self.device != "cpu" and not torch.cuda.is_available():
            raise HalotuneError(f"device: {self.device} was asked for, but torch finds no CUDA device. Use cpu.")
        if self.cuda_graph and self.device == "cpu":
            raise HalotuneError("cuda_graph: a CPU has none. Use device cuda, or leave it out.")

    @property
    def preset(self) -> Preset:
        return preset_of(self.model).with_layers(self.layers)

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
