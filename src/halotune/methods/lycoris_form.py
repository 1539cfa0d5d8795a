"""How LyCORIS and kohya's scripts write an adapter: what a method says of its own tensors, for `halotune.convert`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.operator import WeightShape


@dataclass(frozen=True)
class LycorisForm:
    """One module of a method in a LyCORIS file, where its tensors stand as `{prefix}_{path with _ for .}.{name}`."""

    required: tuple[str, ...]  # names of the tensors that every module has
    optional: tuple[str, ...]  # of those that it may have
    by_row: tuple[str, ...]  # of those whose first dimension is the output: what one file stacks differs in these alone
    # their tensors and the layer's shape -> fields of the configuration, and our tensors
    read: Callable[[Mapping[str, Tensor], WeightShape], tuple[dict[str, Any], dict[str, Tensor]]]
    # a configuration resolved for the layer, our tensors, and the layer's shape where it is known -> their tensors
    write: Callable[[Any, Mapping[str, Tensor], WeightShape | None], dict[str, Tensor]]
    alpha: str = "alpha"  # the configuration's field for the numerator of the scale


def read_alpha(tensors: Mapping[str, Tensor], r: int) -> int | float:
    """The scale's numerator; absent or 0 means r. Whole numbers come as int."""
    alpha = float(tensors["alpha"]) if "alpha" in tensors else 0.0
    alpha = alpha or float(r)
    return int(alpha) if alpha.is_integer() else alpha


def with_alpha(tensors: Mapping[str, Tensor], alpha: float, factor: str, r: int) -> dict[str, Tensor]:
    """A module's tensors with its alpha, in their dtype or the first wider one that holds it exactly.

    Some readers take 0 for r, so there it is r, and the factor of this name is 0.
    """
    t = tensors[factor]
    if alpha == 0:
        tensors, alpha = {**tensors, factor: torch.zeros_like(t)}, r
    candidates = (torch.tensor(alpha, dtype=d) for d in (t.dtype, torch.float32, torch.float64))
    return {**tensors, "alpha": next(c for c in candidates if float(c) == alpha)}
