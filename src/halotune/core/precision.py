"""Which dtype the arithmetic runs in.

Parameters of an adapter are masters (fp32 unless asked otherwise). Products with activations run in the model's
dtype; what depends on parameters alone (norms, Gram matrices, triangular solves) runs in fp32 or better.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype a matrix product of `x` runs in: autocast's where it is on, else `x`'s own."""
    if not torch._C._is_any_autocast_enabled():
        return x.dtype
    kind = x.device.type
    if kind == "meta" or not x.is_floating_point() or x.dtype == torch.float64:  # autocast knows no meta device
        return x.dtype
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def exact_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """fp32, or fp64 where one of the dtypes is."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def exact(t: Tensor) -> torch.autocast:
    """A context in which autocast leaves products on the device of `t` alone."""
    return torch.autocast("cpu" if t.is_meta else t.device.type, enabled=False)
