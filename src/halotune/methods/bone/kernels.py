"""Triton kernels of Bone and BAT. Their references are in `ops.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.kernels import dot, filled
from ...ops.launch import Launcher

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


def bat(W: Tensor, blocks: Tensor) -> Tensor:
    """`W_ij + W_ij B_i + B_i`: W read once, W' written once, rounded once."""
    n, r, _ = blocks.shape
    n_in = W.shape[1]
    out = torch.empty_like(W)
    grid = (n, triton.cdiv(n_in, ROWS), 1)
    _launch_bat(grid, (W, blocks, out), n_in, r, filled(r), ROWS)
    return out


@triton.jit
def _add_tiled(x_ptr, z_ptr, y_ptr, d, x_row, y_row, z_row, z_col, R, COLS: tl.constexpr, INTERPRETED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    x = tl.load(x_ptr + row * x_row + cols, cols < d, other=0.0)
    z = tl.load(z_ptr + row * z_row + cols % R * z_col, cols < d, other=0.0)
    tl.store(y_ptr + row * y_row + cols, (x.to(tl.float32) + z.to(tl.float32)).to(x.dtype), cols < d)


_launch_add_tiled = Launcher(_add_tiled, num_warps=8)


def add_tiled(x: Tensor, z: Tensor, inplace: bool) -> Tensor:
    """`x[:, k] + z[:, k mod r]`: x read once, the result written once."""
    n, d = x.shape
    y = x if inplace else torch.empty(n, d, dtype=x.dtype, device=x.device)
    cols = min(4096, triton.next_power_of_2(d))
    _launch_add_tiled((n, triton.cdiv(d, cols), 1), (x, z, y), d, x.stride(0), y.stride(0), *z.stride(), z.shape[1], cols)
    return y
