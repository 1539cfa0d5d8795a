"""A live MiSS layer of peft's, or Bone layer of older versions, as ours.

The block's own shape tells its kind: peft keeps one kind per layer, which is wrong for a second adapter of another kind.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from ...core.base import Base
from ...core.operator import WeightShape
from ..registry import FromPeft
from .adapter import Bat, Bone, Miss, MissBat


def _adapter(layer: Any, name: str, shape: WeightShape, *, affine: type[Bone], bat: type[Bat]) -> Bone | Bat:
    block = getattr(layer, affine.block)[name]
    if block.dim() == 3:
        return bat(shape, block.shape[-1])
    adapter = affine(shape, *block.shape)
    adapter.dropout = _dropout(layer, name)
    return adapter


def _dropout(layer: Any, name: str) -> float:
    """The chance; peft holds a module, `nn.Identity` for none, and Bone knew no dropout."""
    dropouts = getattr(layer, "miss_dropout", None)
    return 0.0 if dropouts is None else getattr(dropouts[name], "p", 0.0)


def _differs(layer: Any, name: str, base: Base, *, block: str) -> list[str]:
    if getattr(layer, block)[name].dim() == 3 and _dropout(layer, name):
        return ["miss_dropout is not defined for BAT, which acts on the weight; neither peft nor halotune applies it"]
    return []


BONE_FROM_PEFT = FromPeft(partial(_adapter, affine=Bone, bat=Bat), partial(_differs, block=Bone.block))
MISS_FROM_PEFT = FromPeft(partial(_adapter, affine=Miss, bat=MissBat), partial(_differs, block=Miss.block))
