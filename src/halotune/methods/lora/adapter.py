"""LoRA on one layer."""

from __future__ import annotations

import math
from collections.abc import Hashable

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ...core.config import AdapterConfig
from ...core.kinds import LowRank
from ...core.operator import WeightShape
from ...core.prepared import Tensors, exact_dtype
from .config import LoraConfig


class Factor(nn.Module):
    """A matrix named as in PEFT's files, `lora_A.weight`; for convolutions in the layout of a kernel."""

    def __init__(self, *size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))


class Lora(LowRank):
    """`W' = W + s B A`; `lora_A.weight` A: `(r, in)`, `lora_B.weight` B: `(out, r)`, s = alpha / r.

    For a convolution A is a kernel `(r, channels, k…)` and B one of size 1. Source: arXiv 2106.09685.
    """

    def __init__(self, shape: WeightShape, r: int, scaling: float) -> None:
        super().__init__(shape)
        self.scaling = scaling
        ones = [1] * len(shape.kernel)
        self.lora_A = Factor(r, shape.in_channels, *shape.kernel)
        self.lora_B = Factor(shape.out_features, r, *ones)

    @classmethod
    def create(cls, shape: WeightShape, config: AdapterConfig) -> Self:
        assert isinstance(config, LoraConfig)
        adapter = cls(shape, config.r, config.scaling)
        adapter.dropout = config.lora_dropout
        adapter.reset(config.init_weights)
        return adapter

    @torch.no_grad()
    def reset(self, init: bool | str) -> None:
        A, B = self.lora_A.weight, self.lora_B.weight
        if init == "gaussian":
            nn.init.normal_(A, std=1 / A.shape[0])
        else:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        nn.init.zeros_(B) if init else nn.init.kaiming_uniform_(B, a=math.sqrt(5))

    @property
    def rank(self) -> int:
        return self.lora_A.weight.shape[0]

    @torch.no_grad()
    def set_factors(self, B: Tensor, A: Tensor) -> None:
        """Take over factors `B (out, k)`, `A (k, in)`, k ≤ r; the other ranks become zero."""
        k = A.shape[0]
        for factor in (self.lora_A, self.lora_B):
            factor.weight.zero_()
        self.lora_A.weight.flatten(1)[:k] = A
        self.lora_B.weight.flatten(1)[:, :k] = B / self.scaling

    def batch_key(self) -> Hashable:
        return self.scaling, self.shape

    def prepare(self, *parameters: Tensor) -> Tensors:
        """`s Bᵀ (…, r, out)` and `A (…, r, in)`."""
        A, B = (t.to(exact_dtype(t.dtype)).flatten(-1 - len(self.shape.kernel)) for t in parameters)
        return (self.scaling * B).mT, A
