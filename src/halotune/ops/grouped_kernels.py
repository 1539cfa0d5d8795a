"""Triton kernels of low-rank products for groups of rows. Their references are in `grouped_low_rank.py`.

How long groups are only the GPU knows. So rows are cut into pieces without asking it: each group begins a piece, and each
multiple of a share of rows, which is a constant or known from the number of rows, begins one in whatever group it lies. A
program finds its group by counting the ends before it. The number of pieces is fixed; some are empty.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernels import add_dot, dot, filled, rounded, sum_of_products
from .launch import Launcher, tiles

# Both kernels are bound by bytes. An H100 needs about 30 KB in flight on each of 132 multiprocessors: with tiles of 8 and 16
# KB, two or three loads ahead, three to six programs fit on one.
ROWS, DEPTH, COLS = 64, 64, 64  # of tiles of `add_grouped_low_rank`
OUTER_ROWS, OUTER_COLS = 64, 128  # of `grouped_outer_pair`
PARTS, LONG = 16, 1024  # a sum over all rows is cut into so many parts, if each is at least so long
MOST_ENDS = 1024  # that are compared at once


@triton.jit
def plus(a, b):  # the library's own sum is no function of the interpreter's unless Triton was imported for it
    return a + b


@triton.jit
def _piece(ends_ptr, piece, heads, groups, n, share, CHUNK: tl.constexpr):
    """The group of a piece, and its rows from `first` to `end`; and the rows of the group from `start` to `stop`.

    The first pieces begin groups, that of number `groups` the rows past the last end. The others begin at multiples of `share`,
    and are empty where a group begins there, too.
    """
    cut = (piece - heads + 1) * share
    e = piece
    if piece >= heads:
        e = piece * 0
        for begin in range(0, groups, CHUNK):
            ids = begin + tl.arange(0, CHUNK)
            ends = tl.load(ends_ptr + ids, ids < groups, other=n)  # a cut is below n
            e += tl.reduce((ends <= cut).to(tl.int32), 0, plus)
    start = tl.load(ends_ptr + e - 1, e > 0, other=0)
    stop = tl.load(ends_ptr + e, e < groups, other=n)
    first = tl.where(piece < heads, start, cut)
    end = tl.minimum(stop, (first // share + 1) * share)
    end = tl.where((piece >= heads) & (start == cut), first, end)
    return e, first, end, start, stop


@triton.jit
def _add_low_rank(
    x_ptr, down_ptr, up_ptr, b_ptr, ends_ptr, z_ptr, y_ptr, n, k, m, groups, scale,
    x_row, down_group, down_row, down_col, up_group, up_row, up_col, b_row, y_row,
    R: tl.constexpr, RANK: tl.constexpr, ADD: tl.constexpr, INPLACE: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Some rows of one group of `z = s x Aᵀ` and `y = b + z Bᵀ`."""
    piece = tl.program_id(0)
    e, first, end, _, _ = _piece(ends_ptr, piece, groups + 1, groups, n, ROWS, CHUNK)  # pyright: ignore[reportGeneralTypeIssues]
    if first >= end:
        return
    known = e < groups  # else z is zero
    depth = tl.where(known, k, 0)
    used = tl.where(known, R, 0)
    width = m
    if INPLACE:
        width = tl.where(known, m, 0)
    group = tl.minimum(e, groups - 1).to(tl.int64)
    down_ptr += group * down_group
    up_ptr += group * up_group
    rows = first + tl.arange(0, ROWS)
    ranks = tl.arange(0, RANK)
    z = tl.full((ROWS, RANK), 0.0, tl.float32)
    for start in range(0, depth, DEPTH):
        ks = start + tl.arange(0, DEPTH)
        at = rows[:, None].to(tl.int64) * x_row + ks[None]
        x = tl.load(x_ptr + at, (rows[:, None] < end) & (ks[None] < k), other=0.0)
        at = ks[:, None] * down_col + ranks[None] * down_row
        a = tl.load(down_ptr + at, (ks[:, None] < k) & (ranks[None] < R), other=0.0)
        z = add_dot(z, x, rounded(a.to(tl.float32), x.dtype, INTERPRETED), INTERPRETED)
    z = rounded(z * scale, z_ptr.dtype.element_ty, INTERPRETED)
    at_z = rows[:, None].to(tl.int64) * R + ranks[None]
    tl.store(z_ptr + at_z, z, (rows[:, None] < end) & (ranks[None] < R))
    for start in range(0, width, COLS):
        cols = start + tl.arange(0, COLS)
        inside = (rows[:, None] < end) & (cols[None] < m)
        at = cols[None] * up_row + ranks[:, None] * up_col
        q = tl.load(up_ptr + at, (cols[None] < m) & (ranks[:, None] < used), other=0.0)
        y = dot(z, rounded(q.to(tl.float32), z.dtype, INTERPRETED), INTERPRETED)
        if ADD:
            b = tl.load(b_ptr + rows[:, None].to(tl.int64) * b_row + cols[None], inside, other=0.0)
            y += b.to(tl.float32)
        at = rows[:, None].to(tl.int64) * y_row + cols[None]
        tl.store(y_ptr + at, rounded(y, y_ptr.dtype.element_ty, INTERPRETED), inside)


_launch_low_rank = Launcher(_add_low_rank, num_warps=4, num_stages=3)


def _chunk(groups: int) -> int:
    return min(MOST_ENDS, 1 << (groups - 1).bit_length())


def group_stride(t: Tensor) -> int:
    return t.stride(0) if t.dim() > 2 else 0


def add_grouped_low_rank(
    x: Tensor, A: Tensor, B: Tensor, b: Tensor | None, ends: Tensor, scale: float, whole: bool, inplace: bool
) -> Callable[..., tuple[Tensor, Tensor]]:
    """One launch: z is computed from x, written, and used from where it is."""
    n, k = x.shape
    m, r = B.shape[-2:]
    groups = ends.shape[0]
    pieces = groups + 1 + max(0, tiles(n, ROWS) - 1)
    b_row = 0 if b is None else b.stride(0)
    in_b = inplace and b is not None
    launch = _launch_low_rank.prepare(
        (pieces, 1, 1), n, k, m, groups, scale, x.stride(0), group_stride(A), *A.stride()[-2:], group_stride(B),
        *B.stride()[-2:], b_row, b_row if in_b else m, r, filled(r), b is not None, in_b, ROWS, DEPTH, COLS, _chunk(groups),
    )  # fmt: skip

    def run(
        x: Tensor, A: Tensor, B: Tensor, b: Tensor | None, ends: Tensor, scale: float, whole: bool, inplace: bool
    ) -> tuple[Tensor, Tensor]:
        z = x.new_empty((n, r))
        y = b if in_b and b is not None else x.new_empty((n, m))
        launch(x, A, B, x if b is None else b, ends, z, y)
        return y, z

    return run


@triton.jit
def _outer(
    left_ptr, right_ptr, out_ptr, part_ptr, tile, first, end, is_part, p, left_row, right_row, rank_step, col_step,
    R: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Some columns of the sum over some rows: the whole of it, or a part."""
    total = sum_of_products(left_ptr, right_ptr, tile, first, end, p, left_row, right_row, R, RANK, ROWS, COLS, INTERPRETED)
    cols = tile * COLS + tl.arange(0, COLS)
    ranks = tl.arange(0, RANK)
    at = ranks[:, None] * rank_step + cols[None] * col_step
    inside = (ranks[:, None] < R) & (cols[None] < p)
    if is_part:
        tl.store(part_ptr + at, total, inside)
    else:
        tl.store(out_ptr + at, rounded(total, out_ptr.dtype.element_ty, INTERPRETED), inside)


@triton.jit
def _outer_pair(
    d_ptr, z_ptr, w_ptr, x_ptr, ends_ptr, dB_ptr, dA_ptr, parts_ptr, n, m, k, groups, share, d_row, z_row, w_row, x_row,
    R: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Some columns of both sums of one group; of one that is cut, a part: two for each cut, what comes before and behind it."""
    of_d = (m + COLS - 1) // COLS
    both = of_d + (k + COLS - 1) // COLS
    tile, piece = tl.program_id(0) % both, tl.program_id(0) // both
    e, first, end, start, stop = _piece(ends_ptr, piece, groups, groups, n, share, CHUNK)  # pyright: ignore[reportGeneralTypeIssues]
    if (piece >= groups) & ((first >= end) | (e >= groups)):
        return
    is_part = (first > start) | (end < stop)
    part = tl.where(first > start, 2 * (first // share) - 1, 2 * (end // share) - 2)
    parts_ptr += part.to(tl.int64) * R * (m + k)
    group = tl.minimum(e, groups - 1).to(tl.int64)
    if tile < of_d:
        _outer(z_ptr, d_ptr, dB_ptr + group * R * m, parts_ptr, tile, first, end, is_part, m, z_row, d_row, 1, R,
               R, RANK, ROWS, COLS, INTERPRETED)  # fmt: skip
    else:
        _outer(w_ptr, x_ptr, dA_ptr + group * R * k, parts_ptr + R * m, tile - of_d, first, end, is_part, k, w_row, x_row, k, 1,
               R, RANK, ROWS, COLS, INTERPRETED)  # fmt: skip


@triton.jit
def _add_parts(
    ends_ptr, parts_ptr, dB_ptr, dA_ptr, n, groups, share, of_d, of_x, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Some numbers of the sums of a group that is cut, in order; by the program of its first cut."""
    size = of_d + of_x
    blocks = (size + BLOCK - 1) // BLOCK
    cut = tl.program_id(0) // blocks
    e, first, end, start, stop = _piece(ends_ptr, cut, 0, groups, n, share, CHUNK)  # pyright: ignore[reportGeneralTypeIssues]
    if (e >= groups) | (first >= end) | (start < first - share):
        return
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(parts_ptr + tl.cast(2 * cut, tl.int64) * size + at, at < size, other=0.0)
    for i in range(cut, (stop - 1) // share):
        total += tl.load(parts_ptr + tl.cast(2 * i + 1, tl.int64) * size + at, at < size, other=0.0)
    total = rounded(total, dB_ptr.dtype.element_ty, INTERPRETED)
    group = e.to(tl.int64)
    tl.store(dB_ptr + group * of_d + at, total, at < of_d)
    tl.store(dA_ptr + group * of_x + at - of_d, total, (at >= of_d) & (at < size))


_launch_outer = Launcher(_outer_pair, num_warps=4, num_stages=3)
_launch_add = Launcher(_add_parts, num_warps=4)


def grouped_outer_pair(
    d: Tensor, z: Tensor, w: Tensor, x: Tensor, ends: Tensor, dtype: torch.dtype
) -> Callable[..., tuple[Tensor, Tensor]]:
    """One launch for sums over usual groups, and one to add up those of long ones, where rows are many enough for such."""
    (n, m), k, r, groups = d.shape, x.shape[1], z.shape[1], ends.shape[0]
    share = max(1, tiles(tiles(n, max(1, min(PARTS, n // LONG))), OUTER_ROWS)) * OUTER_ROWS
    cuts = max(0, tiles(n, share) - 1)
    grid = (groups + cuts) * (tiles(m, OUTER_COLS) + tiles(k, OUTER_COLS)), 1, 1
    rows = d.stride(0), z.stride(0), w.stride(0), x.stride(0)
    launch = _launch_outer.prepare(grid, n, m, k, groups, share, *rows, r, filled(r), OUTER_ROWS, OUTER_COLS, _chunk(groups))
    add = _launch_add.prepare((cuts * tiles(r * (m + k), 1024), 1, 1), n, groups, share, r * m, r * k, 1024, _chunk(groups))

    def run(d: Tensor, z: Tensor, w: Tensor, x: Tensor, ends: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        dB = torch.empty((groups, m, r), dtype=dtype, device=d.device)
        dA = torch.empty((groups, r, k), dtype=dtype, device=d.device)
        parts = torch.empty((2 * cuts, r * (m + k)), dtype=torch.float32, device=d.device)
        launch(d, z, w, x, ends, dB, dA, parts)
        if cuts:
            add(ends, parts, dB, dA)
        return dB, dA

    return run
