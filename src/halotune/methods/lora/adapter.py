"""LoRA on one layer."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ...core.config import AdapterConfig
from ...core.kinds import LowRank
from ...core.operator import WeightShape
from ...core.prepared import Tensors, exact_dtype
from .config import LoraConfig


def shape_of(tensors: Mapping[str, Tensor], config: LoraConfig) -> WeightShape:
    """The shape of the weight that an adapter's tensors, under their names in files, are for."""
    A, B = tensors["lora_A.weight"], tensors["lora_B.weight"]
    return WeightShape(B.shape[0], A[0].numel(), tuple(A.shape[2:]))


class Lora(LowRank):
    """`W' = W + s B A`; `lora_A.weight` A: `(r, in)`, `lora_B.weight` B: `(out, r)`, s = alpha / r.

    For a convolution A is a kernel `(r, channels, k…)` and B one of size 1. Source: arXiv 2106.09685.
    """

    def __init__(self, shape: WeightShape, r: int, scaling: float) -> None:
        super().__init__(shape)
        self.scaling = scaling
        A = torch.empty(r, shape.in_channels, *shape.kernel)
        B = torch.empty(shape.out_features, r, *[1] * len(shape.kernel))
        self.lora_A, self.lora_B = (nn.ParameterDict({"weight": nn.Parameter(t)}) for t in (A, B))  # named as in PEFT's files

    @classmethod
    def create(cls, shape: WeightShape, config: AdapterConfig) -> Self:
        assert isinstance(config, LoraConfig)
        adapter = cls(shape, config.r, config.scaling)
        adapter.dropout = config.lora_dropout
        adapter.reset(config.init_weights)
        return adapter

    @torch.no_grad()
    def reset(self, init: bool | str) -> None:
        A, B = self.lora_A["weight"], self.lora_B["weight"]
        if init == "gaussian":
            nn.init.normal_(A, std=1 / A.shape[0])
        else:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        nn.init.zeros_(B) if init else nn.init.kaiming_uniform_(B, a=math.sqrt(5))

    @property
    def rank(self) -> int:
        return self.lora_A["weight"].shape[0]

    @torch.no_grad()
    def set_factors(self, B: Tensor, A: Tensor) -> None:
        """Take over factors `B (out, k)`, `A (k, in)`, k ≤ r; the other ranks become zero."""
        k, own_A, own_B = A.shape[0], self.lora_A["weight"].zero_(), self.lora_B["weight"].zero_()
        own_A.flatten(1)[:k] = A
        own_B.flatten(1)[:, :k] = B / self.scaling

    def batch_key(self) -> Hashable:
        return self.scaling, self.shape

    def prepare(self, *parameters: Tensor) -> Tensors:
        """`s Bᵀ (…, r, out)` and `A (…, r, in)`."""
        A, B = (t.to(exact_dtype(t.dtype)).flatten(-1 - len(self.shape.kernel)) for t in parameters)
        return (self.scaling * B).mT, A

    def parameters_as_factors(self, *parameters: Tensor) -> tuple[Tensor, Tensor, float] | None:
        A, B = parameters
        return (B, A, self.scaling) if self.shape.is_linear else None
