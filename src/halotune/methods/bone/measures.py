"""What `halotune inspect` shows of Bone, BAT and MiSS."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...core.operator import WeightShape
from ..measures import Column, Measures, effective_rank
from .adapter import Bat, Bone
from .config import BlockConfig


def shape(tensors: Mapping[str, Tensor], config: BlockConfig) -> WeightShape:
    """The outputs alone, and not those of the mini form, which has fewer columns."""
    (block,) = tensors.values()
    if config.init_weights == "mini":
        return WeightShape(0, 0)
    return WeightShape(block.shape[0] * block.shape[1] if config.init_weights == "bat" else block.shape[1], 0)


def measure(adapter: Bone | Bat) -> dict[str, float]:
    """The effective rank of D, or the mean over the r×r blocks of BAT."""
    block = adapter.get_parameter(adapter.block).detach().double()
    return {"block_rank": float(effective_rank(torch.linalg.svdvals(block)).mean())}


MEASURES = Measures(
    shape, measure, (Column("block_rank", "block rank", "effective rank of the block (BAT: mean of all)", ".2f"),)
)
