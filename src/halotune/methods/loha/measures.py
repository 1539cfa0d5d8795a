"""What `halotune inspect` needs to know of LoHa; its delta's own figures say the rest."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from torch import Tensor

from ...core.measures import Measures
from ...core.operator import WeightShape
from .config import LoHaConfig


def shape(tensors: Mapping[str, Tensor], config: LoHaConfig) -> WeightShape:
    """Whole, but for the kernel of a convolution in the flat form, which is like a linear layer's weight."""
    a, b = tensors["hada_w1_a"], tensors["hada_w1_b"]
    if "hada_t1" not in tensors:
        return WeightShape(a.shape[0], b.shape[1])
    kernel = tuple(tensors["hada_t1"].shape[2:])
    return WeightShape(a.shape[1], b.shape[1] * prod(kernel), kernel)


MEASURES = Measures(shape)
