"""LoHa on one layer."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ...core.adapter import Adapter
from ...core.config import AdapterConfig
from ...core.frozen_linear import low_rank_linear
from ...core.kinds import Dense, LowRank, add_low_rank
from ...core.operator import Operator, WeightShape
from ...core.prepared import Tensors, exact_dtype
from ...core.weight_form import weight_form
from ...core.weight_shard import Axis, Shard
from . import ops
from .config import LoHaConfig


class Hadamard(Dense):
    """What has the parameters of `ΔW = (alpha / r) (A1 B1) ∘ (A2 B2)`. Source: FedPara, arXiv 2108.06098.

    `hada_w1_a (out, r)`, `hada_w1_b (r, in)`, the same for `w2`. The Tucker form of a convolution has `hada_w1_a (r, out)`,
    `hada_w1_b (r, channels)` and a core `hada_t1 (r, r, k…)`, the same for 2; the core and `w_b` together are a flat half's B.
    With `use_scalar` ΔW has one more factor, `hada_scalar ()`.
    """

    axes = (("out", -2), ("in", -1), ("out", -2), ("in", -1))

    hada_w1_a: nn.Parameter
    hada_w1_b: nn.Parameter
    hada_w2_a: nn.Parameter
    hada_w2_b: nn.Parameter

    def __init__(self, shape: WeightShape, r: int, scaling: float, tucker: bool = False, scalar: bool = False) -> None:
        super().__init__(shape)
        self.r, self.scaling, self.tucker, self.scalar = r, scaling, tucker, scalar
        self.rank_dropout = self.module_dropout = 0.0
        n_out, n_in = shape.out_features, shape.in_channels if tucker else shape.in_features
        core = shape.kernel if len(shape.kernel) > 1 else (*shape.kernel, 1)  # PEFT's files hold (r, r, k, 1) for Conv1d
        for i in "12":
            self.register_parameter(f"hada_w{i}_a", nn.Parameter(torch.empty((r, n_out) if tucker else (n_out, r))))
            self.register_parameter(f"hada_w{i}_b", nn.Parameter(torch.empty(r, n_in)))
            if tucker:
                self.register_parameter(f"hada_t{i}", nn.Parameter(torch.empty(r, r, *core)))
        if scalar:
            self.hada_scalar = nn.Parameter(torch.ones(()))

    @classmethod
    def create(cls, shape: WeightShape, config: AdapterConfig) -> Self:
        assert isinstance(config, LoHaConfig)
        tucker = config.use_effective_conv2d and math.prod(shape.kernel) > 1
        adapter = cls(shape, config.r, config.scaling, tucker, config.use_scalar)
        adapter.set_dropout(config.rank_dropout, config.module_dropout)
        adapter.reset(config.init_weights)
        return adapter

    def set_dropout(self, of_rows: float, of_all: float) -> None:
        self.rank_dropout, self.module_dropout, self.dropout = of_rows, of_all, max(of_rows, of_all)

    @torch.no_grad()
    def reset(self, identity: bool) -> None:
        for p in self.parameters():
            if p.dim():
                nn.init.kaiming_uniform_(p, a=math.sqrt(5))
        if identity:
            nn.init.zeros_(self.hada_scalar if self.scalar else self.hada_w2_b)

    def batch_key(self) -> Hashable:
        return self.shape, self.tucker, self.scalar, self.scaling

    def halves(self, *θ: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`A1 (…, out, r)`, `B1 (…, r, in)`, `A2`, `B2`, in fp32 or better."""
        dtype = exact_dtype(θ[0].dtype)
        n = len(θ) // 2
        A1, B1 = self._half(*(t.to(dtype) for t in θ[:n]))
        if self.scalar:
            A1 = A1 * θ[-1].to(dtype)[..., None, None]
        return A1, B1, *self._half(*(t.to(dtype) for t in θ[n : 2 * n]))

    def _half(self, a: Tensor, b: Tensor, core: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (a, b) if core is None else (a.mT, ops.tucker_rows(core, b, len(self.shape.kernel)))

    def _drop_rows(self, B: Tensor) -> Tensor:
        """Dropout on ΔW, as a factor on the rows of a left factor: no branch on a tensor, and none at all at p = 0."""
        if not self.training:
            return B
        if self.rank_dropout:
            n_out = self.whole_shape.out_features
            kept = (torch.rand(*B.shape[:-2], n_out, 1, device=B.device) >= self.rank_dropout).to(B.dtype)
            B = B * self.cut_mask("out", kept / kept.mean(-2, keepdim=True).clamp_min(1 / n_out), -2)
        if self.module_dropout:
            B = B * (torch.rand((), device=B.device) >= self.module_dropout).to(B.dtype)
        return B

    @property
    def rank(self) -> int:
        return self.r

    def run(self, x: Tensor, op: Operator, factors: Tensors, scale: float) -> Tensor:
        first, *others = factors
        return weight_form(x, op, self, (self._drop_rows(first), *others), scale, self.dither(x.dtype))


class LoHa(Hadamard):
    """`W' = W + (alpha / r) (A1 B1) ∘ (A2 B2)`.

    Small ranks are applied as low-rank factors of rank r², large ones as `W + ΔW`, whichever costs less for the shapes at hand.
    """

    @property
    def is_small(self) -> bool:
        """Whether low-rank factors of rank r² win for any number of tokens."""
        shape = self.whole_shape
        return ops.low_rank_is_cheaper(1 << 40, shape.out_features, shape.in_features, self.r)

    def prepare(self, *parameters: Tensor) -> Tensors:
        """The low-rank factors `Bᵀ (…, r², out)` and `A (…, r², in)`, or the halves."""
        halves = self.halves(*parameters)
        return self._low_rank(*halves) if self.is_small else halves

    def weight_factors(self, *parameters: Tensor) -> Tensors:
        return self.halves(*parameters)

    def cut(self, shard: Shard, *factors: Tensor) -> Tensors:
        return shard.cut_all(factors, LowRank.axes if len(factors) == 2 else self.axes)

    def adapt(self, W: Tensor, *factors: Tensor) -> Tensor:
        return ops.add_hadamard(W, *factors, s=self.scaling)  # type: ignore[call-arg]

    def build(self, W: Tensor, *factors: Tensor, noise: Tensor | None = None, again: bool = False) -> Tensor:
        return ops.build.call(again, W, *factors, self.scaling, noise)

    def pull(self, G: Tensor, W: Tensor, *factors: Tensor) -> Sequence[Tensor | None]:
        return ops.pull(G, *factors, self.scaling)

    def factors(self, W: Tensor) -> tuple[Tensor, Tensor] | None:
        return ops.khatri_rao(*self.halves(*self.tensors()), s=self.scaling)

    def reads_weight(self, op: Operator) -> bool:
        return not self.is_small and op.bare.takes_weight

    def replaces_weight(self, op: Operator) -> bool:
        return False

    def run(self, x: Tensor, op: Operator, factors: Tensors, scale: float) -> Tensor:
        if self.is_small:
            Bt, A = factors
            return add_low_rank(x, x, op, (self._drop_rows(Bt.mT), A), scale)
        if not op.bare.takes_weight or self._low_rank_for(x):
            A1, *others = factors
            return add_low_rank(x, x, op, ops.khatri_rao(self._drop_rows(A1), *others, s=self.scaling), scale)
        return super().run(x, op, factors, scale)

    def _low_rank_for(self, x: Tensor) -> bool:
        tokens = x.numel() // max(1, self.shape.in_channels * self.shape.groups)  # a shard may be empty
        return ops.low_rank_is_cheaper(tokens, self.shape.out_features, self.shape.in_features, self.r)

    def run_plain(self, x: Tensor, W: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
        if self.is_small or self._low_rank_for(x):
            return low_rank_linear(x, W, bias, *(factors if self.is_small else self._low_rank(*factors)))
        return super().run_plain(x, W, bias, *factors)

    def _low_rank(self, *halves: Tensor) -> tuple[Tensor, Tensor]:
        """`Bᵀ (…, r², out)`, `A (…, r², in)`."""
        B, A = ops.khatri_rao(*halves, s=self.scaling)  # type: ignore[call-arg]
        return B.mT.contiguous(), A


class DecomposedLoHa(Hadamard):
    """`W' = m ∘ V / ‖V‖`, `V = W + (alpha / r) (A1 B1) ∘ (A2 B2)`: the rows of V, or its input channels, take the length m.

    One parameter more than LoHa has: `hada_dora_scale` m, `(out, 1 …)`, or `(1, channels, 1 …)` for lengths of channels, with
    a dimension for each of the kernel's. It starts at the lengths of W. Gradients flow through `‖V‖` too.
    """

    hada_dora_scale: nn.Parameter

    scale_free = ("hada_dora_scale",)  # W itself would decay with it
    on_out = True

    @classmethod
    def create(cls, shape: WeightShape, config: AdapterConfig) -> Self:
        assert isinstance(config, LoHaConfig)
        adapter = super().create(shape, config)
        adapter.on_out = config.wd_on_out
        size = (shape.out_features, 1) if adapter.on_out else (1, shape.in_channels)
        adapter.hada_dora_scale = nn.Parameter(torch.ones(*size, *(1 for _ in shape.kernel)))
        return adapter

    @torch.no_grad()
    def start_from(self, op: Operator) -> None:
        m = self.hada_dora_scale
        W = op.weight().to(exact_dtype(m.dtype)).unflatten(1, (self.shape.in_channels, -1))
        m.copy_(torch.linalg.vector_norm(W, dim=(1, 2) if self.on_out else (0, 2)).view_as(m))

    def batch_key(self) -> Hashable:
        return self.on_out, super().batch_key()

    def unit(self, axis: Axis) -> int:
        return 0 if (axis == "in") is self.on_out else 1  # along which lengths are summed

    def cut(self, shard: Shard, *factors: Tensor) -> Tensors:
        return shard.cut_all(factors, (*self.axes, ("out", -2) if self.on_out else ("in", -1)))

    def prepare(self, *parameters: Tensor) -> Tensors:
        return *self.halves(*parameters[:-1]), parameters[-1].to(exact_dtype(parameters[-1].dtype))

    def adapt(self, W: Tensor, *factors: Tensor) -> Tensor:
        return ops.decomposed_hadamard(W, *factors, self.scaling, self.shape.in_channels, self.on_out)  # type: ignore[arg-type]

    def run_plain(self, x: Tensor, W: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # which does not see into the gradients of autograd's own
            return nn.functional.linear(x, self.adapt(W, *factors), bias)
        return super().run_plain(x, W, bias, *factors)


def shape_of(tensors: Mapping[str, Tensor], config: LoHaConfig) -> WeightShape:
    """The shape of the weight that an adapter's tensors are for, but for the kernel of a convolution in the flat form, of which
    its lengths tell no more than the dimensions."""
    a, b = tensors["hada_w1_a"], tensors["hada_w1_b"]
    if "hada_t1" not in tensors:
        lengths = tensors.get("hada_dora_scale", b)
        size = 1 if config.wd_on_out else b.shape[1] // lengths.shape[1]
        return WeightShape(a.shape[0], b.shape[1], (size, 1, 1)[: lengths.dim() - 2])
    kernel = tuple(tensors["hada_t1"].shape[2:])
    return WeightShape(a.shape[1], b.shape[1] * math.prod(kernel), kernel)


def create_loha(shape: WeightShape, config: AdapterConfig) -> Adapter:
    assert isinstance(config, LoHaConfig)
    return (DecomposedLoHa if config.weight_decompose else LoHa).create(shape, config)
