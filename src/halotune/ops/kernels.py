"""Triton kernels of the products that several methods share. Their references are in `product.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launcher

ROWS, COLS = 64, 128


def filled(r: int) -> int:
    """r, filled up to what a matrix unit takes."""
    return max(16, triton.next_power_of_2(r))


@triton.jit
def dot(a, b, INTERPRETED: tl.constexpr):
    """`a b` in fp32. Triton's interpreter would multiply the bits of bf16 as integers, so it gets fp32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _add_product(
    x_ptr, z_ptr, b_ptr, y_ptr, n, d, x_row, y_row, z_row, z_col, b_row, b_col,
    R: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One tile of `y = x + z B`: x read once, y written once."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    ranks = tl.arange(0, RANK)
    at_z = rows[:, None].to(tl.int64) * z_row + ranks[None] * z_col
    z = tl.load(z_ptr + at_z, (rows[:, None] < n) & (ranks[None] < R), other=0.0)
    at_b = ranks[:, None] * b_row + cols[None] * b_col
    b = tl.load(b_ptr + at_b, (ranks[:, None] < R) & (cols[None] < d), other=0.0)
    inside = (rows[:, None] < n) & (cols[None] < d)
    x = tl.load(x_ptr + rows[:, None].to(tl.int64) * x_row + cols[None], inside, other=0.0)
    y = x.to(tl.float32) + dot(z, b, INTERPRETED)
    tl.store(y_ptr + rows[:, None].to(tl.int64) * y_row + cols[None], y.to(x.dtype), inside)


_launch = Launcher(_add_product, num_warps=4)


def add_product(x: Tensor, z: Tensor, B: Tensor, inplace: bool) -> Tensor:
    """`x + z B`."""
    n, d = x.shape
    r = z.shape[1]
    y = x if inplace else torch.empty(n, d, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(n, ROWS), triton.cdiv(d, COLS), 1)
    strides = (x.stride(0), y.stride(0), *z.stride(), *B.stride())
    _launch(grid, (x, z, B, y), n, d, *strides, r, filled(r), ROWS, COLS)
    return y
