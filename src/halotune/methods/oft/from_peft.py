"""A live OFT layer of peft's, as ours."""

from __future__ import annotations

from typing import Any

from ...core.base import Base
from ...core.operator import WeightShape
from ..registry import FromPeft
from .adapter import OFT


def _adapter(layer: Any, name: str, shape: WeightShape) -> OFT:
    R = layer.oft_R[name]
    terms = R.num_cayley_neumann_terms if R.use_cayley_neumann else 0
    return OFT(shape, R.block_size, R.block_share, terms, R.eps if R.coft else None)


def _differs(layer: Any, name: str, base: Base) -> list[str]:
    overlaps = base.shape.in_features > base.shape.in_channels
    return ["peft's OFT adds overlapping patches, so its outputs are not those of its merged weight"] if overlaps else []


FROM_PEFT = FromPeft(_adapter, _differs, "peft's OFT applies several active adapters in the order opposite to its merge's")
