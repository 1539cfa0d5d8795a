"""The grid of quantized layers: every one that can be had on the CPU, and a substitute for those that cannot.

The methods are those of `tests/laws`. The oracle is the quantized layer itself, run on the identity.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from halotune import LoHaConfig
from halotune.core.layer import AdaptedLayer

from ..laws.cases import VARIANTS as FLOAT_VARIANTS
from ..laws.cases import Variant, make_adapter

OUT, IN = 96, 192  # multiples of what the kernels want (32 and 64), and of 3 for BAT
TOKENS = (3, 5)


@dataclass(frozen=True)
class Base:
    """One format.

    Attributes:
        build: the quantized layer with a given weight and bias.
        step: the size of its rounding, `‖W − quantized(W)‖ / ‖W‖` for normal W.
        eval_error: how far its own kernel is off in eval mode, where activations are rounded too.
        dtype: of its outputs and inputs.
    """

    name: str
    build: Callable[[Tensor, Tensor], nn.Module]
    step: float
    eval_error: float = 0.0
    dtype: torch.dtype = torch.float32


def linear(W: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(W.shape[1], W.shape[0], dtype=W.dtype)
    layer.weight.data = W.clone()
    layer.bias.data = bias.clone()
    return layer.requires_grad_(False)


def four_bits(kind: str, double: bool) -> Callable[[Tensor, Tensor], nn.Module]:
    def build(W: Tensor, bias: Tensor) -> nn.Module:
        from bitsandbytes.nn import Linear4bit, Params4bit

        layer = Linear4bit(W.shape[1], W.shape[0], quant_type=kind, compress_statistics=double)
        layer.weight = Params4bit(W.clone(), quant_type=kind, compress_statistics=double, module=layer)
        layer.bias = nn.Parameter(bias.clone())
        return layer.to("cpu")

    return build


def eight_bits(W: Tensor, bias: Tensor) -> nn.Module:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    layer = Linear8bitLt(W.shape[1], W.shape[0], has_fp16_weights=False)
    layer.weight = Int8Params(W.clone(), requires_grad=False)
    layer.bias = nn.Parameter(bias.clone())
    return layer.to("cpu")


def torchao(config: str) -> Callable[[Tensor, Tensor], nn.Module]:
    def build(W: Tensor, bias: Tensor) -> nn.Module:
        import torchao.quantization as q

        model = nn.Sequential(linear(W, bias))
        q.quantize_(model, getattr(q, config)())
        return model[0]

    return build


def hqq(bits: int) -> Callable[[Tensor, Tensor], nn.Module]:
    def build(W: Tensor, bias: Tensor) -> nn.Module:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        config = BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
        return HQQLinear(linear(W, bias), config, compute_dtype=W.dtype, device="cpu")

    return build


class PackedLinear(nn.Module):
    """Layers that need a GPU or a compiled kernel (GPTQ, AWQ, EETQ), imitated: eight 4-bit codes in an int32, a scale per
    row. Like theirs it has sizes and packed buffers, no `weight`, and can only be called.
    """

    def __init__(self, W: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = W.shape
        scales = W.abs().amax(1, keepdim=True) / 7
        codes = ((W / scales).round().int() + 8).view(W.shape[0], -1, 8)
        self.register_buffer("qweight", (codes << torch.arange(0, 32, 4, dtype=torch.int32)).sum(-1, dtype=torch.int32))
        self.register_buffer("scales", scales)
        self.bias = nn.Parameter(bias.clone())

    def forward(self, x: Tensor) -> Tensor:
        codes = (self.qweight.unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15
        W = (codes.flatten(1) - 8).to(self.scales.dtype) * self.scales
        return nn.functional.linear(x, W, self.bias)


READABLE = [
    Base("bnb-nf4", four_bits("nf4", False), 0.1, 0.01),
    Base("bnb-nf4-double", four_bits("nf4", True), 0.1, 0.01),
    Base("bnb-nf4-bf16", four_bits("nf4", True), 0.1, 0.02, torch.bfloat16),
    Base("bnb-fp4", four_bits("fp4", False), 0.13, 0.01),
    Base("bnb-int8", eight_bits, 0.01, 0.02),
    Base("ao-int8", torchao("Int8WeightOnlyConfig"), 0.01),
    Base("ao-int8-bf16", torchao("Int8WeightOnlyConfig"), 0.01, 0.02, torch.bfloat16),
    Base("ao-fp8", torchao("Float8WeightOnlyConfig"), 0.03),
    Base("hqq-4bit", hqq(4), 0.11),
    Base("hqq-8bit", hqq(8), 0.01),
]
OPAQUE = Base("packed", PackedLinear, 0.2)
BASES = [*READABLE, OPAQUE]

VARIANTS = [
    *(v for v in FLOAT_VARIANTS if not v.needs_kernel),
    Variant("loha-r16", LoHaConfig(r=16, alpha=4, target_modules=["layer"]), 256, dense=True),
]
NEED_WEIGHT = {
    v.name for v in VARIANTS if v.name == "loha-r16" or (v.rank is None and v.dense)
}  # at this size, for these inputs
ONE_EACH = [v for v in VARIANTS if v.name in ("hra-r4", "loha-r5", "bone-r7", "bat-r3", "miss-mini-r7", "lora-r2", "oft-b3")]


@dataclass(frozen=True)
class Case:
    """One cell of the grid."""

    variant: Variant
    base: Base

    @property
    def id(self) -> str:
        return f"{self.variant.name}/{self.base.name}"

    def module(self) -> nn.Module:
        """A frozen quantized layer, in training mode, where kernels do not round activations."""
        W = torch.randn(OUT, IN, dtype=self.base.dtype) / IN**0.5
        return self.base.build(W, torch.randn(OUT, dtype=self.base.dtype)).requires_grad_(False).train()

    def layer(self) -> AdaptedLayer:
        layer = AdaptedLayer(self.module())
        layer.add("default", self.adapter())
        layer.active_adapters = ["default"]
        return layer

    def adapter(self) -> nn.Module:
        """Trained for a while: its delta is about as large as the weight."""
        adapter = make_adapter(self.variant, AdaptedLayer(self.module()).base.shape, torch.float32)
        with torch.no_grad():
            for p in adapter.parameters():
                p.mul_(0.5) if p.dim() else p.fill_(1)
        return adapter

    def input(self, *, requires_grad: bool = False) -> Tensor:
        return torch.randn(*TOKENS, IN, dtype=self.base.dtype, requires_grad=requires_grad)


def grid(bases: Iterable[Base] = BASES, variants: Iterable[Variant] = VARIANTS) -> pytest.MarkDecorator:
    """Every method on every format; maps on the weight on a layer that can only be called are refused, and not here."""
    cells = itertools.product(variants, bases)
    cases = [Case(v, b) for v, b in cells if b is not OPAQUE or v.rank is not None]
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.id)


def each_base(bases: Iterable[Base] = BASES) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("base", bases, ids=lambda base: base.name)


def some(*names: str) -> list[Base]:
    return [b for b in BASES if b.name in names]


# -- the oracle


@torch.no_grad()
def matrix(module: nn.Module) -> Tensor:
    """The weight that a quantized layer applies, `(out, in)` in fp32, as its own kernel says; not after an evaluation."""
    duplicate = copy.deepcopy(module).train()
    duplicate.bias = None
    return duplicate(torch.eye(IN, dtype=module.bias.dtype)).detach().float().t().contiguous()


def stored_tensors(module: nn.Module) -> list[Tensor]:
    """Everything that makes up the quantized weight and the bias, copied; in one order from the first call on."""
    found: list[Tensor] = []
    seen: set[int] = set()

    def collect(value: object) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, Tensor):
            parts = getattr(value, "tensor_data_names", None)
            found.extend(getattr(value, n).clone() for n in parts) if parts else found.append(value.detach().clone())
            for part in ("quant_state", "CB", "SCB"):
                collect(getattr(value, part, None))
        elif isinstance(value, dict):
            for v in value.values():
                collect(v)
        elif type(value).__name__ in ("QuantState", "MatmulLtState"):
            collect(vars(value))

    for value in (module._parameters, module._buffers, getattr(module, "meta", None), getattr(module, "state", None)):
        collect(value)
    return found


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))
