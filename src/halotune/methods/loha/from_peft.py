"""A live LoHa layer of peft's, as ours."""

from __future__ import annotations

from typing import Any

from ...core.base import Base
from ...core.operator import WeightShape
from ..registry import FromPeft
from .adapter import LoHa


def _adapter(layer: Any, name: str, shape: WeightShape) -> LoHa:
    adapter = LoHa(shape, layer.r[name], layer.scaling[name], tucker=name in layer.hada_t1)
    adapter.set_dropout(layer.rank_dropout[name], layer.module_dropout[name])
    return adapter


def _differs(layer: Any, name: str, base: Base) -> list[str]:
    out = []
    if name in layer.hada_t1:
        out.append("peft's backward of the Tucker form (use_effective_conv2d) is wrong for hada_w1_a and hada_w2_a")
    if not base.shape.is_linear and base.module.padding_mode != "zeros":
        out.append("peft's LoHa pads with zeros where the convolution itself pads otherwise, so its outputs are wrong")
    return out


FROM_PEFT = FromPeft(_adapter, _differs)
