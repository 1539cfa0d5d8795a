"""The Triton kernel of products of rows with the matrices of their groups and a low-rank delta; see `grouped_low_rank.py`.

`z = x Aᵀ` is a launch of its own, which reads x once. The product then adds `z Bᵀ` to its sums before they are written: r / k
of its own work, for which the output is neither read nor written a second time. Computed along with the product, z would cost
no pass over x, but each tile of columns would compute it again, by products too narrow for a matrix unit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .grouped_kernels import add_grouped_low_rank, group_stride, plus
from .kernels import add_dot, dot, filled, rounded
from .launch import Launcher, tiles


class Tile(NamedTuple):
    """What is computed at once, rows × cols in steps of depth, and how."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int  # loads ahead


# Rows of a group fill its last tile in part, and each tile reads its columns of W: with tiles of 128 × 256 a group of some 256
# rows reads W two to three times from the cache, and x once for each 256 columns.
TILE = Tile(128, 256, 64, 8, 3)
FINE_TILE = Tile(32, 64, 32, 4, 2)  # fp32 has no matrix unit that is exact


@triton.jit
def _rows_of_tile(ends_ptr, tile, groups, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """The group of a tile of rows, and its rows from `first` to `end`; none for a tile past the last. Each group begins one."""
    ids = tl.arange(0, CHUNK)
    ends = tl.load(ends_ptr + ids, ids < groups, other=0)
    begins = tl.load(ends_ptr + ids - 1, (ids > 0) & (ids < groups), other=0)
    counts = (ends - begins + ROWS - 1) // ROWS
    before = tl.associative_scan(counts, 0, plus) <= tile
    e = tl.reduce(before.to(tl.int32), 0, plus)
    skipped = tl.reduce(tl.where(before, counts, 0), 0, plus)
    first = tl.reduce(tl.where(ids == e, begins, 0), 0, plus) + (tile - skipped) * ROWS
    return e, first, tl.minimum(tl.reduce(tl.where(ids == e, ends, 0), 0, plus), first + ROWS)


@triton.jit
def _tile(
    x_ptr, w_ptr, z_ptr, up_ptr, y_ptr, e, first, end, begin, k, m, x_row, w_group, w_out, w_in, up_group, up_row, up_col,
    R: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, WHOLE_STEPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The sums of rows and columns, and `z Bᵀ` added to them before they are written."""
    rows = first + tl.arange(0, ROWS)
    cols = begin + tl.arange(0, COLS)
    ks = tl.arange(0, DEPTH)
    in_rows, in_cols = rows[:, None] < end, cols[None] < m
    x_at = x_ptr + rows[:, None].to(tl.int64) * x_row + ks[None]
    w_at = w_ptr + e.to(tl.int64) * w_group + cols[None].to(tl.int64) * w_out + ks[:, None].to(tl.int64) * w_in
    y = tl.full((ROWS, COLS), 0.0, tl.float32)
    for start in range(0, k, DEPTH):
        if WHOLE_STEPS:
            x = tl.load(x_at, in_rows, other=0.0)
            w = tl.load(w_at, in_cols, other=0.0)
        else:
            x = tl.load(x_at, in_rows & (start + ks[None] < k), other=0.0)
            w = tl.load(w_at, in_cols & (start + ks[:, None] < k), other=0.0)
        y = add_dot(y, x, w, INTERPRETED)
        x_at += DEPTH
        w_at += DEPTH * w_in
    ranks = tl.arange(0, RANK)
    z = tl.load(z_ptr + rows[:, None].to(tl.int64) * R + ranks[None], in_rows & (ranks[None] < R), other=0.0)
    up_at = up_ptr + e.to(tl.int64) * up_group + cols[None] * up_row + ranks[:, None] * up_col
    q = tl.load(up_at, in_cols & (ranks[:, None] < R), other=0.0)
    y += dot(z, rounded(q.to(tl.float32), z.dtype, INTERPRETED), INTERPRETED)
    y_at = y_ptr + rows[:, None].to(tl.int64) * m + cols[None]
    tl.store(y_at, rounded(y, y_ptr.dtype.element_ty, INTERPRETED), in_rows & in_cols)


@triton.jit
def _linear(
    x_ptr, w_ptr, z_ptr, up_ptr, ends_ptr, y_ptr, k, m, groups, x_row, w_group, w_out, w_in, up_group, up_row, up_col,
    R: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, WHOLE_STEPS: tl.constexpr,
    CHUNK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Some rows of one group, and some columns, of `y = x Wᵀ + z Bᵀ`.

    Programs that follow each other compute the columns of the same rows, then the other rows of the same group, so that what
    they read together is read from memory once.
    """
    of_columns = (m + COLS - 1) // COLS
    e, first, end = _rows_of_tile(ends_ptr, tl.program_id(0) // of_columns, groups, ROWS, CHUNK)  # pyright: ignore[reportGeneralTypeIssues]
    if first >= end:
        return
    begin = tl.program_id(0) % of_columns * COLS
    if end - first <= ROWS // 2:  # the last of a group, as a rule
        _tile(x_ptr, w_ptr, z_ptr, up_ptr, y_ptr, e, first, end, begin, k, m, x_row, w_group, w_out, w_in, up_group, up_row,
              up_col, R, RANK, ROWS // 2, COLS, DEPTH, WHOLE_STEPS, INTERPRETED)  # fmt: skip
    else:
        _tile(x_ptr, w_ptr, z_ptr, up_ptr, y_ptr, e, first, end, begin, k, m, x_row, w_group, w_out, w_in, up_group, up_row,
              up_col, R, RANK, ROWS, COLS, DEPTH, WHOLE_STEPS, INTERPRETED)  # fmt: skip


@cache
def _launcher(warps: int, stages: int) -> Launcher:
    return Launcher(_linear, num_warps=warps, num_stages=stages)


def grouped_low_rank_linear(
    x: Tensor, W: Tensor, A: Tensor, B: Tensor, ends: Tensor, scale: float, whole: bool
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Two launches: z, and the product with the delta."""
    (n, k), (groups, m, _), r = x.shape, W.shape, A.shape[-2]
    tile = FINE_TILE if x.dtype is torch.float32 else TILE
    down = add_grouped_low_rank(x, A, B[..., :0, :], None, ends, scale, whole, False)
    programs = (n // tile.rows + groups) * tiles(m, tile.cols)  # a group fills all of its tiles but one
    launch = _launcher(tile.warps, tile.stages).prepare(
        (programs, 1, 1), k, m, groups, x.stride(0), *W.stride(), group_stride(B), *B.stride()[-2:], r, filled(r),
        tile.rows, tile.cols, tile.depth, k % tile.depth == 0, 1 << (groups - 1).bit_length(),
    )  # fmt: skip

    def run(x: Tensor, W: Tensor, A: Tensor, B: Tensor, ends: Tensor, scale: float, whole: bool) -> tuple[Tensor, Tensor]:
        _, z = down(x, A, B[..., :0, :], None, ends, scale, whole, False)
        y = x.new_empty((n, m)) if whole else x.new_zeros((n, m))  # rows of no group have no tile
        launch(x, W, z, B, ends, y)
        return y, z

    return run
