"""What can be measured of a saved adapter: figures of every delta, and each method's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.operator import WeightShape


@dataclass(frozen=True)
class Column:
    """One figure of a layer, as it is shown."""

    key: str  # its name in JSON
    head: str  # in tables
    meaning: str  # in charts, in full
    form: str = "#.3g"


@dataclass(frozen=True)
class Measures:
    """How adapters of one method are looked at."""

    # of the adapted weight, as tensors (under their names in files) and configuration tell it: a side they do not tell is 0
    shape: Callable[[Mapping[str, Tensor], Any], WeightShape]
    of: Callable[[Any], Mapping[str, float | list[float]]] = lambda adapter: {}  # figures, from an adapter's parameters alone
    columns: tuple[Column, ...] = ()  # those of the figures that tables show; a chart shows the first


def singular_values(B: Tensor, A: Tensor) -> Tensor:
    """Those of `B A`, for `B (out, k)` and `A (k, in)`, without forming it: of `R_B R_Aᵀ`, at most k×k."""
    R_B, R_A = (torch.linalg.qr(t, mode="r").R for t in (B, A.mT))
    return torch.linalg.svdvals(R_B @ R_A.mT)


def effective_rank(values: Tensor) -> Tensor:
    """`exp(−Σ p log p)` with `p = σ / Σσ` over the last dimension, σ singular values: k for k equal ones, 0 for none.

    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007.
    """
    total = values.sum(-1, keepdim=True)
    p = values / torch.where(total > 0, total, 1)
    return torch.special.entr(p).sum(-1).exp() * (total.squeeze(-1) > 0)
