"""What `halotune inspect` needs to know of LoHa; its delta's own figures say the rest."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from torch import Tensor

from ...core.operator import WeightShape
from ..measures import Measures
from .config import LoHaConfig


def shape(tensors: Mapping[str, Tensor], config: LoHaConfig) -> WeightShape:
    """Complete, but for the kernel of a convolution in the flat form, of which its lengths tell no more than the dimensions."""
    a, b = tensors["hada_w1_a"], tensors["hada_w1_b"]
    if "hada_t1" not in tensors:
        lengths = tensors.get("hada_dora_scale", b)
        size = 1 if config.wd_on_out else b.shape[1] // lengths.shape[1]
        return WeightShape(a.shape[0], b.shape[1], (size, 1, 1)[: lengths.dim() - 2])
    kernel = tuple(tensors["hada_t1"].shape[2:])
    return WeightShape(a.shape[1], b.shape[1] * prod(kernel), kernel)


MEASURES = Measures(shape)
