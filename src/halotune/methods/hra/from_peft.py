"""A live HRA layer of peft's, as ours."""

from __future__ import annotations

from typing import Any

import torch

from ...core.base import Base
from ...core.operator import WeightShape
from ..registry import FromPeft
from .adapter import HRA


def _adapter(layer: Any, name: str, shape: WeightShape) -> HRA:
    return HRA(shape, layer.hra_r[name], layer.hra_apply_GS[name])


def _differs(layer: Any, name: str, base: Base) -> list[str]:
    out, module = [], base.module
    if not base.shape.is_linear:
        uneven = len(set(module.stride)) > 1 or len(set(module.padding)) > 1
        if uneven or set(module.dilation) != {1} or module.padding_mode != "zeros":
            out.append(
                "peft's HRA gives a convolution's first stride and padding to all its dimensions and drops its dilation and "
                "padding mode, so its outputs are wrong"
            )
    if getattr(getattr(module, "weight", None), "dtype", None) is torch.int8:
        out.append("peft's HRA takes the codes of 8-bit weights for the weights, so its outputs are wrong")
    vectors = layer.hra_u[name].detach()
    if not vectors.is_meta and bool((vectors == 0).all(0).any()):
        out.append("a zero column of hra_u makes peft's outputs NaN; here it is no reflection")
    return out


FROM_PEFT = FromPeft(_adapter, _differs)
