"""Triton kernels of Bone and BAT. Their references are in `ops.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.kernels import dot, filled
from ...ops.launch import Launcher, tiles

ROWS = 128


@triton.jit
def _bat(w_ptr, b_ptr, out_ptr, n_in, R: tl.constexpr, SIDE: tl.constexpr, ROWS: tl.constexpr, INTERPRETED: tl.constexpr):
    """A row of blocks lies in memory as a matrix of `n_in` rows of r numbers: `ROWS` of those meet `B_i`."""
    i = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, SIDE)
    block = b_ptr + i * R * R
    inside = (rows[:, None] < n_in) & (cols[None] < R)
    at = i.to(tl.int64) * n_in * R + rows[:, None] * R + cols[None]
    w = tl.load(w_ptr + at, inside, other=0.0)
    b = tl.load(block + cols[:, None] * R + cols[None], (cols[:, None] < R) & (cols[None] < R), other=0.0)
    own = tl.load(block + (rows // (n_in // R))[:, None] * R + cols[None], inside, other=0.0)
    new = w.to(tl.float32) + dot(w, b, INTERPRETED) + own.to(tl.float32)
    tl.store(out_ptr + at, new.to(w.dtype), inside)


_launch_bat = Launcher(_bat, num_warps=4)


def bat(W: Tensor, blocks: Tensor) -> Callable[..., Tensor]:
    """`W_ij + W_ij B_i + B_i`: W read once, W' written once, rounded once."""
    n, r, _ = blocks.shape
    n_in = W.shape[1]
    launch = _launch_bat.prepare((n, tiles(n_in, ROWS), 1), n_in, r, filled(r), ROWS)

    def run(W: Tensor, blocks: Tensor) -> Tensor:
        out = torch.empty_like(W)
        launch(W, blocks, out)
        return out

    return run
