"""LoHa on one layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ...core.adapter import WeightSide, add_low_rank, weight_form
from ...core.config import AdapterConfig
from ...core.operator import Operator, WeightShape
from ...core.precision import exact_dtype
from . import ops
from .config import LoHaConfig


class LoHa(WeightSide):
    """`W' = W + (alpha / r) (A1 B1) ∘ (A2 B2)`.

    Parameters `hada_w1_a (out, r)`, `hada_w1_b (r, in)`, the same for `w2`. The Tucker form of a convolution has
    `hada_w1_a (r, out)`, `hada_w1_b (r, channels)` and a core `hada_t1 (r, r, k…)`, the same for 2; the core and `w_b`
    together are a flat half's B.

    Small ranks are applied as thin factors of rank r², large ones as `W + ΔW`, whichever costs less for the shapes at
    hand. Source: FedPara, arXiv 2108.06098.
    """

    hada_w1_a: nn.Parameter
    hada_w1_b: nn.Parameter
    hada_w2_a: nn.Parameter
    hada_w2_b: nn.Parameter

    def __init__(self, shape: WeightShape, r: int, scaling: float, tucker: bool = False) -> None:
        super().__init__()
        self.shape, self.r, self.scaling, self.tucker = shape, r, scaling, tucker
        self.rank_dropout = self.module_dropout = 0.0
        n_out, n_in = shape.out_features, shape.in_channels if tucker else shape.in_features
        core = (
            shape.kernel if len(shape.kernel) > 1 else (*shape.kernel, 1)
        )  # PEFT's files hold (r, r, k, 1) for Conv1d
        for i in "12":
            self.register_parameter(f"hada_w{i}_a", nn.Parameter(torch.empty((r, n_out) if tucker else (n_out, r))))
            self.register_parameter(f"hada_w{i}_b", nn.Parameter(torch.empty(r, n_in)))
            if tucker:
                self.register_parameter(f"hada_t{i}", nn.Parameter(torch.empty(r, r, *core)))

    @classmethod
    def create(cls, shape: WeightShape, config: AdapterConfig) -> Self:
        assert isinstance(config, LoHaConfig)
        tucker = config.use_effective_conv2d and math.prod(shape.kernel) > 1
        adapter = cls(shape, config.r, config.alpha / config.r, tucker)
        adapter.rank_dropout, adapter.module_dropout = config.rank_dropout, config.module_dropout
        adapter.reset(config.init_weights)
        return adapter

    @torch.no_grad()
    def reset(self, identity: bool) -> None:
        for p in self.parameters():
            nn.init.kaiming_uniform_(p, a=math.sqrt(5))
        if identity:
            nn.init.zeros_(self.hada_w2_b)

    def _half(self, i: str) -> tuple[Tensor, Tensor]:
        dtype = exact_dtype(self.hada_w1_a.dtype)
        a, b = (self.get_parameter(f"hada_w{i}_{side}").to(dtype) for side in "ab")
        return (a.mT, ops.tucker_rows(self.get_parameter(f"hada_t{i}").to(dtype), b)) if self.tucker else (a, b)

    def _dropped(self, A1: Tensor) -> Tensor:
        """Dropout on ΔW, as a factor on the rows of A1: no branch on a tensor, and none at all at p = 0."""
        if not self.training:
            return A1
        if self.rank_dropout:
            kept = (torch.rand(A1.shape[0], 1, device=A1.device) >= self.rank_dropout).to(A1.dtype)
            A1 = A1 * (kept / kept.mean().clamp_min(1 / A1.shape[0]))
        if self.module_dropout:
            A1 = A1 * (torch.rand((), device=A1.device) >= self.module_dropout).to(A1.dtype)
        return A1

    def transform(self) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        A1, B1 = self._half("1")
        return partial(ops.add_hadamard, s=self.scaling), (A1, B1, *self._half("2"))

    def factors(self, W: Tensor) -> tuple[Tensor, Tensor]:
        return ops.khatri_rao(*self._half("1"), *self._half("2"), s=self.scaling)

    @property
    def dropout(self) -> float:
        return max(self.rank_dropout, self.module_dropout)

    @property
    def rank(self) -> int:
        return self.r

    def forward(self, x: Tensor, op: Operator, scale: float = 1.0) -> Tensor:
        f, (A1, *others) = self.transform()
        θ = (self._dropped(A1), *others)
        tokens = x.numel() // (self.shape.in_channels * self.shape.groups)
        if ops.thin_is_cheaper(tokens, self.shape.out_features, self.shape.in_features, self.r):
            return add_low_rank(x, x, op, ops.khatri_rao(*θ, s=self.scaling), scale)
        return weight_form(x, op, f, θ, scale)
