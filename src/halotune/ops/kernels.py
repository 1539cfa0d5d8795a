"""Triton kernels of the products that several methods share. Their references are in `product.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, Launcher, tiles
from .product import fold

# Where z is computed by the kernel that uses it. The host's time for one more launch is longer than what the GPU loses by it
# up to some thousand rows: on an H100 25 µs against 27 for 1024 rows of 3072, but 50 against 24 for rows of 8192, and 36
# against 27 for 3072 rows (bf16, r 32).
FEW_ROWS, FUSED_ROWS, FUSED_DEPTH = 64, 2048, 4096
PROGRAMS = 132  # multiprocessors of an H100
COLS = 128  # of a tile of `thin`
COLUMNS = 64  # of one program of `grams`


def filled(r: int) -> int:
    """r, filled up to what a matrix unit takes."""
    return 16 if r <= 16 else 1 << (r - 1).bit_length()


def shares(n: int, programs: int, tile: int) -> tuple[int, int]:
    """Into how many parts a long sum over n is cut, so that a GPU is full, and the length of a part, in whole tiles."""
    parts = max(1, min(n // 512, 2 * PROGRAMS // programs))
    return parts, tiles(tiles(n, parts), tile) * tile


def added(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """What the parts of a sum add up to."""
    return (parts.sum(0) if len(parts) > 1 else parts[0]).to(dtype)


@triton.jit
def dot(a, b, INTERPRETED: tl.constexpr):
    """`a b` in fp32. Triton's interpreter would multiply the bits of bf16 as integers, so it gets fp32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def rounded(x, to: tl.constexpr, INTERPRETED: tl.constexpr):
    """x in another dtype. Triton's interpreter would cut the bits off that bf16 lacks, so they are rounded away first."""
    if INTERPRETED and to == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(to)


@triton.jit
def _down(a_ptr, q_ptr, n, k, rows, ranks, a_row, q_row, R: tl.constexpr, RANK: tl.constexpr, FOLD: tl.constexpr,
          ROWS: tl.constexpr, DEPTH: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """Some rows of `z = a Aᵀ`, in fp32."""
    z = tl.full((ROWS, RANK), 0.0, tl.float32)
    for start in range(0, k, DEPTH):
        ks = start + tl.arange(0, DEPTH)
        a = tl.load(a_ptr + rows[:, None].to(tl.int64) * a_row + ks[None], (rows[:, None] < n) & (ks[None] < k), other=0.0)
        if FOLD:
            p = (ks[:, None] % R == ranks[None]).to(tl.float32).to(a.dtype)
        else:
            p = tl.load(q_ptr + ks[:, None] + ranks[None] * q_row, (ks[:, None] < k) & (ranks[None] < R), other=0.0)
        z += dot(a, p, INTERPRETED)
    return z


@triton.jit
def _thin(
    a_ptr, down_ptr, b_ptr, up_ptr, z_ptr, y_ptr, n, k, d, share,
    a_row, a_batch, down_row, down_batch, b_row, b_batch, up_row, up_batch, z_row, z_batch, y_row, y_batch,
    R: tl.constexpr, RANK: tl.constexpr, DOWN: tl.constexpr, FOLD: tl.constexpr, UNFOLD: tl.constexpr, SUM: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, COLS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Some rows and columns of `y = Σ_s b_s + z_s Q_s`, over SUM siblings; if DOWN, `z_s = a_s A_sᵀ` is computed first.

    Programs of the same rows compute the same z, and each writes it: they would wait for each other longer.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ranks = tl.arange(0, RANK)
    sibling = tl.program_id(2).to(tl.int64)
    a_ptr += sibling * a_batch
    down_ptr += sibling * down_batch
    b_ptr += sibling * b_batch
    up_ptr += sibling * up_batch
    z_ptr += sibling * z_batch
    y_ptr += sibling * y_batch
    at_z = rows[:, None].to(tl.int64) * z_row + ranks[None]
    in_z = (rows[:, None] < n) & (ranks[None] < R)
    if DOWN:
        z_at = z_ptr
        for _i in range(SUM):
            own = _down(a_ptr, down_ptr, n, k, rows, ranks, a_row, down_row, R, RANK, FOLD, ROWS, DEPTH, INTERPRETED)
            tl.store(z_at + at_z, rounded(own, z_ptr.dtype.element_ty, INTERPRETED), in_z)
            a_ptr += a_batch  # step by step: s times a batch may be more than 32 bits hold
            down_ptr += down_batch
            z_at += z_batch
        tl.debug_barrier()  # what other threads of this program wrote is read below
    first = tl.program_id(1) * share
    for start in range(first, tl.minimum(first + share, d), COLS):
        cols = start + tl.arange(0, COLS)
        inside = (rows[:, None] < n) & (cols[None] < d)
        y = tl.full((ROWS, COLS), 0.0, tl.float32)
        z_at, up_at, b_at = z_ptr, up_ptr, b_ptr
        for _s in tl.static_range(SUM):  # pyright: ignore[reportGeneralTypeIssues]
            z = tl.load(z_at + at_z, in_z, other=0.0)
            if UNFOLD:
                q = (cols[None] % R == ranks[:, None]).to(tl.float32).to(z.dtype)
            else:
                at_q = ranks[:, None] * up_row + cols[None]
                q = tl.load(up_at + at_q, (ranks[:, None] < R) & (cols[None] < d), other=0.0)
            b = tl.load(b_at + rows[:, None].to(tl.int64) * b_row + cols[None], inside, other=0.0)
            y += b.to(tl.float32) + dot(z, q, INTERPRETED)
            z_at += z_batch
            up_at += up_batch
            b_at += b_batch
        tl.store(
            y_ptr + rows[:, None].to(tl.int64) * y_row + cols[None], rounded(y, y_ptr.dtype.element_ty, INTERPRETED), inside
        )


_launch_tiles = Launcher(_thin, num_warps=4)
_launch_few = Launcher(_thin, num_warps=4, num_stages=3)
_launch_fused = Launcher(_thin, num_warps=8, num_stages=4)


def _product(
    n: int, k: int, d: int, r: int, siblings: int, steps: tuple[int, ...], fold: bool, unfold: bool, summed: int
) -> tuple[Launch, Launch | None]:
    """The launch that is given z, and the one that computes z itself, if it may be faster."""

    def prepared(launcher: Launcher, rows: int, depth: int, share: int, down: bool) -> Launch:
        grid = tiles(n, rows), tiles(d, share), siblings
        return launcher.prepare(
            grid, n, k, d, share, *steps, r, filled(r), down, fold, unfold, summed, rows, depth, COLS
        )  # fmt: skip

    apart = prepared(_launch_tiles, 64, 64, COLS, False)
    if n > FUSED_ROWS or (n > FEW_ROWS and k > FUSED_DEPTH):
        return apart, None
    launcher, rows, depth = (_launch_few, 16, 256) if n <= FEW_ROWS else (_launch_fused, 64, 64)
    share = tiles(tiles(d, max(1, PROGRAMS // (tiles(n, rows) * siblings))), COLS) * COLS
    return apart, prepared(launcher, rows, depth, share, True)


def _chosen(apart: Launch, fused: Launch | None, t: Tensor) -> Launch:
    """A launch that is recorded for a CUDA graph takes the host no time later."""
    return apart if fused is None or (t.is_cuda and torch.cuda.is_current_stream_capturing()) else fused


def thin(b: Tensor, a: Tensor, A: Tensor | None, Q: Tensor | None, inplace: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """`z = a Aᵀ` and `b + z Q`."""
    n, d = b.shape
    r = (Q if A is None else A).shape[0]  # type: ignore[union-attr]
    down_row, up_row = 0 if A is None else A.stride(0), 0 if Q is None else Q.stride(0)
    b_row = b.stride(0)
    steps = a.stride(0), 0, down_row, 0, b_row, 0, up_row, 0, r, 0, b_row if inplace else d, 0
    apart, fused = _product(n, a.shape[1], d, r, 1, steps, A is None, Q is None, 1)

    def run(b: Tensor, a: Tensor, A: Tensor | None, Q: Tensor | None, inplace: bool) -> tuple[Tensor, Tensor]:
        y = b if inplace else b.new_empty((n, d))
        launch = _chosen(apart, fused, b)
        if launch is fused:
            z = b.new_empty((n, r))
        else:
            z = fold(a, r) if A is None else torch.mm(a, A.t())
        launch(a, b if A is None else A, b, b if Q is None else Q, z, y)
        return y, z

    return run


def spread(x: Tensor, A: Tensor, Q: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    """`z_s = x A_sᵀ` and `x + z_s Q_s`."""
    n, k = x.shape
    s, r, _ = A.shape
    x_row = x.stride(0)
    steps = x_row, 0, k, r * k, x_row, 0, k, r * k, s * r, r, k, n * k
    apart, fused = _product(n, k, k, r, s, steps, False, False, 1)

    def run(x: Tensor, A: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
        y = x.new_empty((s, n, k))
        launch = _chosen(apart, fused, x)
        z = x.new_empty((n, s * r)) if launch is fused else torch.mm(x, A.view(s * r, k).t())
        launch(x, A, x, Q, z, y)
        return y, z.as_strided((s, n, r), (r, s * r, 1))

    return run


def gather(d: Tensor, A: Tensor, Q: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    """`z_s = d_s A_sᵀ` and `Σ_s d_s + z_s Q_s`."""
    s, n, k = d.shape
    r = A.shape[1]
    d_batch, d_row, _ = d.stride()
    steps = d_row, d_batch, k, r * k, d_row, d_batch, k, r * k, r, n * r, k, 0
    apart, fused = _product(n, k, k, r, 1, steps, False, False, s)

    def run(d: Tensor, A: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
        y = d.new_empty((n, k))
        launch = _chosen(apart, fused, d)
        z = d.new_empty((s, n, r)) if launch is fused else torch.bmm(d, A.mT)
        launch(d, A, d, Q, z, y)
        return y, z

    return run


@triton.jit
def _gram(left_ptr, right_ptr, out_ptr, tile, n, p, left_row, right_row, R: tl.constexpr, RANK: tl.constexpr,
          ROWS: tl.constexpr, COLS: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """Some columns of `leftᵀ right`."""
    cols = tile * COLS + tl.arange(0, COLS)
    ranks = tl.arange(0, RANK)
    total = tl.full((RANK, COLS), 0.0, tl.float32)
    for start in range(0, n, ROWS):
        rows = start + tl.arange(0, ROWS)
        at = rows[None].to(tl.int64) * left_row + ranks[:, None]
        left = tl.load(left_ptr + at, (rows[None] < n) & (ranks[:, None] < R), other=0.0)
        at = rows[:, None].to(tl.int64) * right_row + cols[None]
        right = tl.load(right_ptr + at, (rows[:, None] < n) & (cols[None] < p), other=0.0)
        total += dot(left, right, INTERPRETED)
    inside = (ranks[:, None] < R) & (cols[None] < p)
    tl.store(out_ptr + ranks[:, None] * p + cols[None], rounded(total, out_ptr.dtype.element_ty, INTERPRETED), inside)


@triton.jit
def _grams(
    z_ptr, d_ptr, w_ptr, x_ptr, zd_ptr, wx_ptr, n, p, q, first,
    z_row, z_batch, d_row, d_batch, w_row, w_batch, x_row, x_batch,
    R: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The first programs make `zᵀ d`, the others `wᵀ x`."""
    tile = tl.program_id(0)
    sibling = tl.program_id(1).to(tl.int64)
    if tile < first:
        z_ptr += sibling * z_batch
        d_ptr += sibling * d_batch
        zd_ptr += sibling * R * p
        _gram(z_ptr, d_ptr, zd_ptr, tile, n, p, z_row, d_row, R, RANK, ROWS, COLS, INTERPRETED)
    else:
        w_ptr += sibling * w_batch
        x_ptr += sibling * x_batch
        wx_ptr += sibling * R * q
        _gram(w_ptr, x_ptr, wx_ptr, tile - first, n, q, w_row, x_row, R, RANK, ROWS, COLS, INTERPRETED)


_launch_grams = Launcher(_grams, num_warps=4, num_stages=4)


def grams(z: Tensor, d: Tensor, w: Tensor, x: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    """`zᵀ d` and `wᵀ x`: two products in one launch, and in the time that the library takes for them."""
    *siblings, n, r = z.shape
    p, q = d.shape[-1], x.shape[-1]
    first = tiles(p, COLUMNS)
    grid = first + tiles(q, COLUMNS), siblings[0] if siblings else 1, 1
    steps = *_steps(z), *_steps(d), *_steps(w), *_steps(x)
    launch = _launch_grams.prepare(grid, n, p, q, first, *steps, r, filled(r), 128 if r <= 32 else 64, COLUMNS)
    left, right = (*siblings, r, p), (*siblings, r, q)

    def run(z: Tensor, d: Tensor, w: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        zd, wx = d.new_empty(left), d.new_empty(right)
        launch(z, d, w, x, zd, wx)
        return zd, wx

    return run


def _steps(t: Tensor) -> tuple[int, int]:
    """The strides of rows and of siblings."""
    stride = t.stride()
    return (stride[1], stride[0]) if len(stride) == 3 else (stride[0], 0)
