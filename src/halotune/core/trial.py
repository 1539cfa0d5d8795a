"""Calling a layer to see what it does, where its class does not tell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .generators import forked_generators
from .prepared import exact_dtype

if TYPE_CHECKING:
    from .base import Base


def agrees(base: Base, written: bool) -> bool:
    """Whether a call is `W x + c` with the weight that is read.

    Args:
        written: and with any weight that is put in its place.
    """
    return any(_agrees_on(x, base, written) for x in base.samples())


def _agrees_on(x: Tensor, base: Base, written: bool) -> bool:
    """Two calls, on two inputs and with two weights: their difference is `W1 x1 − W2 x2`, whatever c is."""
    try:
        with _without_trace(base):
            x1, x2 = (t.to(base.device, _dtype(base)) for t in (x, x.flip(-1) / 2))
            y2 = base.module(x2)  # a weight that is computed in a call is fresh after it
            W1 = W2 = base.weight()
            if written and not base.quantization:
                W1 = (W2 + drawn(W2.shape).to(W2.device) * (W2.float().std(correction=0) or 1)).to(W2.dtype)
            y1 = base.module(x1) if W1 is W2 else base.called_with(x1, W1)
            x1, x2, W1, W2, y1, y2 = (t.to(exact_dtype(t.dtype)) for t in (x1, x2, W1, W2, y1, y2))
            expected = base.contract(base.pad(x1), W1) - base.contract(base.pad(x2), W2)
            if y1.shape != expected.shape or y2.shape != expected.shape:
                return False
            rounding = 4 * torch.finfo(base.dtype).eps * y1.norm()
            error = 0.1 if base.quantization else 0.01  # of formats that round the input too
            return bool((y1 - y2 - expected).norm() <= error * expected.norm() + rounding)
    except Exception:  # a forward of its own, or a hook, may ask for anything
        return False


def unusual_output(base: Base) -> str | None:
    """What a call on a sample gives that no layer of this shape would; None where it is usual, or cannot be tried."""
    x = base.samples()[0]
    try:
        with _without_trace(base):
            y = base.module(x.to(base.device, _dtype(base)))
    except Exception:
        return None
    if not isinstance(y, Tensor):
        return f"a {type(y).__name__}"
    due = base.contract(base.pad(x), torch.zeros(base.shape.out_features, base.shape.in_features)).shape
    return None if y.shape == due else f"an output {tuple(y.shape)}, where {tuple(due)} is due"


def drawn(size: Sequence[int]) -> Tensor:
    """Normal numbers, the same each time."""
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def _dtype(base: Base) -> torch.dtype:
    return base.dtype if base.dtype.itemsize > 1 else torch.bfloat16


@contextmanager
def _without_trace(base: Base) -> Iterator[None]:
    """Inside, calls leave no trace: not in autograd, in buffers or in torch's generators."""
    buffers = [(m._buffers, dict(m._buffers)) for m in base.module.modules()]
    device = base.device
    try:
        with torch.no_grad(), forked_generators(device), torch.autocast(device.type, enabled=False):
            for own, before in buffers:
                own.update({n: None if b is None else b.clone() for n, b in before.items()})
            yield
    finally:
        for own, before in buffers:
            own.update(before)
