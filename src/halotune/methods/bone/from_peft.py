"""A live MiSS layer of peft's, as ours.

The block's own shape tells its kind: peft keeps one kind per layer, which is wrong for a second adapter of another kind.
"""

from __future__ import annotations

from typing import Any

from ...core.base import Base
from ...core.operator import WeightShape
from ..registry import FromPeft
from .adapter import Miss, MissBat


def _adapter(layer: Any, name: str, shape: WeightShape) -> Miss | MissBat:
    block = layer.miss_block[name]
    if block.dim() == 3:
        return MissBat(shape, block.shape[-1])
    adapter = Miss(shape, *block.shape)
    adapter.dropout = _dropout(layer, name)
    return adapter


def _dropout(layer: Any, name: str) -> float:
    """The chance; peft holds a module, `nn.Identity` for none."""
    return getattr(layer.miss_dropout[name], "p", 0.0)


def _differs(layer: Any, name: str, base: Base) -> list[str]:
    if layer.miss_block[name].dim() == 3 and _dropout(layer, name):
        return ["miss_dropout is not defined for BAT, which acts on the weight; neither peft nor halotune applies it"]
    return []


FROM_PEFT = FromPeft(_adapter, _differs)
