"""What `halotune inspect` needs to know of LoRA; its delta's own figures say the rest."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ...core.operator import WeightShape
from ..measures import Measures
from .config import LoraConfig


def shape(tensors: Mapping[str, Tensor], config: LoraConfig) -> WeightShape:
    A, B = tensors["lora_A.weight"], tensors["lora_B.weight"]
    return WeightShape(B.shape[0], A[0].numel(), tuple(A.shape[2:]))


MEASURES = Measures(shape)
