"""The grid of the laws: every way to configure a method, on every kind of base layer.

A new method is one or more `Variant`s; `test_grid.py` fails as long as a registered method has none.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from halotune import BoneConfig, HRAConfig, LoHaConfig, LoraConfig, MissConfig, OFTConfig, PeftModel, get_peft_model
from halotune.core.adapter import Adapter
from halotune.core.config import AdapterConfig
from halotune.core.layer import AdaptedLayer
from halotune.core.operator import WeightShape
from halotune.methods.registry import method_of


@dataclass(frozen=True)
class Variant:
    """One way to configure a method.

    Attributes:
        rank: the rank of its exact low-rank factors; None where only a full-rank delta is.
        dense: a forward pass builds W', in place of two low-rank products beside the base layer.
        needs_kernel: only a convolution with a kernel larger than 1 has it.
    """

    name: str
    config: AdapterConfig
    rank: int | None
    dense: bool = False
    needs_kernel: bool = False


@dataclass(frozen=True)
class Base:
    """One kind of base layer, and the size of an input for it. Its matrix has odd sizes, multiples of 3 for BAT."""

    name: str
    build: Callable[[], nn.Module]
    size: tuple[int, ...]
    memory_format: torch.memory_format = torch.contiguous_format


VARIANTS = [
    Variant("hra-r4", HRAConfig(r=4, target_modules=["layer"]), 4),
    Variant("hra-r3", HRAConfig(r=3, target_modules=["layer"]), 3),
    Variant("hra-gs-r3", HRAConfig(r=3, apply_GS=True, target_modules=["layer"]), 3),
    Variant("loha-r2", LoHaConfig(r=2, alpha=3, target_modules=["layer"]), 4),
    Variant("loha-r5", LoHaConfig(r=5, alpha=2, target_modules=["layer"]), 25, dense=True),
    Variant(
        "loha-tucker-r2",
        LoHaConfig(r=2, alpha=3, use_effective_conv2d=True, target_modules=["layer"]),
        4,
        needs_kernel=True,
    ),
    Variant("loha-rs-r2", LoHaConfig(r=2, alpha=3, use_rslora=True, target_modules=["layer"]), 4),
    Variant("loha-scalar-r2", LoHaConfig(r=2, alpha=3, use_scalar=True, target_modules=["layer"]), 4),
    Variant("loha-dora-r5", LoHaConfig(r=5, alpha=2, weight_decompose=True, target_modules=["layer"]), None, dense=True),
    Variant(
        "loha-dora-in-r5",
        LoHaConfig(r=5, alpha=2, weight_decompose=True, wd_on_out=False, use_scalar=True, target_modules=["layer"]),
        None,
        dense=True,
    ),
    Variant(
        "loha-dora-tucker-r5",
        LoHaConfig(r=5, alpha=2, weight_decompose=True, use_effective_conv2d=True, target_modules=["layer"]),
        None,
        dense=True,
        needs_kernel=True,
    ),
    Variant("bone-r3", BoneConfig(r=3, target_modules=["layer"]), 3),
    Variant("bone-r7", BoneConfig(r=7, target_modules=["layer"]), 7),  # divides no input: the remainder
    Variant("bat-r3", BoneConfig(r=3, init_weights="bat", target_modules=["layer"]), None, dense=True),
    Variant("miss-r7", MissConfig(r=7, target_modules=["layer"]), 7),
    Variant("miss-bat-r3", MissConfig(r=3, init_weights="bat", target_modules=["layer"]), None, dense=True),
    Variant("miss-mini-r7", MissConfig(r=7, mini_r=3, init_weights="mini", target_modules=["layer"]), 3),
    Variant("lora-r2", LoraConfig(r=2, lora_alpha=5, target_modules=["layer"]), 2),
    Variant("rslora-r3", LoraConfig(r=3, lora_alpha=4, use_rslora=True, target_modules=["layer"]), 3),
    Variant("oft-b3", OFTConfig(oft_block_size=3, use_cayley_neumann=False, target_modules=["layer"]), None),
    Variant("oft-neumann-b5", OFTConfig(oft_block_size=5, target_modules=["layer"]), None),
    Variant("oft-shared-b3", OFTConfig(oft_block_size=3, block_share=True, target_modules=["layer"]), None),
    Variant(
        "coft-b3", OFTConfig(oft_block_size=3, coft=True, eps=1.5, use_cayley_neumann=False, target_modules=["layer"]), None
    ),
]

BASES = [
    Base("linear", lambda: nn.Linear(15, 21), (3, 5, 15)),
    Base("linear-nobias", lambda: nn.Linear(27, 15, bias=False), (7, 27)),
    Base("gpt2-conv1d", lambda: Conv1D(21, 15), (2, 5, 15)),
    Base("conv1d", lambda: nn.Conv1d(9, 15, 3, stride=2, padding=1), (2, 9, 11)),
    Base(
        "conv2d-strided",
        lambda: nn.Conv2d(6, 15, (3, 2), stride=(2, 1), padding=(2, 0), dilation=2),
        (2, 6, 7, 5),
    ),
    Base(
        "conv2d-grouped",
        lambda: nn.Conv2d(12, 18, (3, 2), groups=2, padding="same", padding_mode="circular"),
        (2, 12, 5, 4),
    ),
    Base("conv2d-reflect", lambda: nn.Conv2d(6, 15, (2, 3), padding=(1, 2), padding_mode="reflect"), (2, 6, 4, 5)),
    Base("conv2d-channels-last", lambda: nn.Conv2d(6, 15, (3, 2), padding=1), (2, 6, 5, 4), torch.channels_last),
    Base("conv2d-unbatched", lambda: nn.Conv2d(6, 15, (2, 3), bias=False), (6, 5, 4)),
    Base("conv3d", lambda: nn.Conv3d(3, 15, (1, 2, 3), stride=(1, 2, 1)), (1, 3, 2, 4, 4)),
]


@dataclass(frozen=True)
class Case:
    """One cell of the grid."""

    variant: Variant
    base: Base
    dtype: torch.dtype

    @property
    def id(self) -> str:
        return f"{self.variant.name}/{self.base.name}/{str(self.dtype).removeprefix('torch.')}"

    def module(self) -> nn.Module:
        """A frozen base layer with random weights."""
        module = self.base.build().to(self.dtype)
        with torch.no_grad():
            for p in module.parameters():
                p.normal_(std=0.5)
        return module.requires_grad_(False)

    def input(self, *, requires_grad: bool = False) -> Tensor:
        x = torch.randn(self.base.size, dtype=self.dtype)
        return x.contiguous(memory_format=self.base.memory_format).requires_grad_(requires_grad)

    def adapter(self, shape: WeightShape, *, trained: bool = True) -> Adapter:
        return make_adapter(self.variant, shape, self.dtype, trained=trained)

    def layer(self, *, trained: bool = True) -> AdaptedLayer:
        """A base with one active adapter, somewhere in training or (`trained=False`) at its start."""
        layer = AdaptedLayer(self.module())
        layer.add("default", self.adapter(layer.base.shape, trained=trained))
        if not trained:
            layer.adapters["default"].start_from(layer.base)
        layer.active_adapters = ["default"]
        return layer


def make_adapter(variant: Variant, shape: WeightShape, dtype: torch.dtype, *, trained: bool = True) -> Adapter:
    """An adapter as the engine makes it: masters in fp32, in fp64 over a base in fp64."""
    adapter = method_of(variant.config.peft_type).create(shape, variant.config)
    adapter.to(torch.float64 if dtype == torch.float64 else torch.float32)
    return train(adapter) if trained else adapter


@torch.no_grad()
def train(module: nn.Module) -> nn.Module:
    """Parameters as if trained for a while: all random, none zero."""
    for p in module.parameters():
        p.normal_(std=0.6)
    return module


def fits(variant: Variant, base: Base) -> bool:
    return not variant.needs_kernel or math.prod(getattr(base.build(), "kernel_size", ())) > 1


def grid(*dtypes: torch.dtype, variants: Iterable[Variant] = VARIANTS, bases: Iterable[Base] = BASES) -> pytest.MarkDecorator:
    """Parametrise a test with the cases of the grid."""
    cases = [Case(v, b, d) for v, b, d in itertools.product(variants, bases, dtypes) if fits(v, b)]
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.id)


def pairs(dtype: torch.dtype, bases: Iterable[Base]) -> pytest.MarkDecorator:
    """Parametrise a test with a case and the variant of a second adapter: every ordered pair."""
    cells = [
        pytest.param(Case(a, base, dtype), b, id=f"{a.name}-then-{b.name}/{base.name}")
        for a, b, base in itertools.product(VARIANTS, VARIANTS, bases)
        if fits(a, base) and fits(b, base)
    ]
    return pytest.mark.parametrize(("case", "second"), cells)


def some_bases(*names: str) -> list[Base]:
    return [base for base in BASES if base.name in names]


# -- the oracle: nothing here is halotune's


def matrix(module: nn.Module) -> Tensor:
    """The weight of a base layer as a matrix `(out, in)`."""
    return module.weight.t() if isinstance(module, Conv1D) else module.weight.flatten(1)


def run_with(module: nn.Module, W: Tensor, x: Tensor) -> Tensor:
    """The base layer with another matrix for its weight."""
    weight = W.t() if isinstance(module, Conv1D) else W.reshape(module.weight.shape)
    return functional_call(module, {"weight": weight}, (x,))


def trained_parameters(module: nn.Module) -> list[Tensor]:
    return [p for p in module.parameters() if p.requires_grad]


def arrays(*tensors: Tensor) -> list[Tensor]:
    """Without lone numbers, whose gradient is one sum that may cancel to next to nothing: no measure of rounding."""
    return [t for t in tensors if t.dim()]


def relative(a: Tensor, b: Tensor) -> float:
    """`‖a − b‖ / ‖b‖`, in float64."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


class Model(nn.Module):
    """The smallest model with a layer in it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def wrap(model: nn.Module, config: AdapterConfig) -> PeftModel:
    """`get_peft_model`, which warns of the configuration's notices and of nothing else."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)  # ours; pytest's filters keep others' warnings at import
        wrapped = get_peft_model(model, config)
    assert [str(w.message) for w in caught] == config.notices()
    return wrapped
