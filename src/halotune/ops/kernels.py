"""Triton kernels of the products that several methods share. Their references are in `product.py`."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, Launcher, tiles
from .product import fold

# Where z is computed by the kernel that uses it: then x is read twice, and one launch fewer is waited for. On an H200 (bf16,
# r 8): 25 µs against 25 for 3072 rows of 2048, 23 against 24 for 8192 rows of 1024, 36 against 32 for 2048 rows of 4096; but
# 37 against 29 for 3072 rows of 3072, and 50 against 32 for 1024 rows of 8192.
FEW_ROWS, FUSED_SIZE, FUSED_DEPTH = 64, 2048 * 4096, 4096
PROGRAMS = 132  # multiprocessors of an H100
COLS = 128  # of a tile of `add_product`
COLUMNS = 64  # of one program of `transposed_products`
LARGE = 1 << 23  # numbers to be summed, beyond which a GPU that is not full loses more than a launch takes the host


def filled(r: int) -> int:
    """r, filled up to what a matrix unit takes."""
    return 16 if r <= 16 else 1 << (r - 1).bit_length()


def shares(n: int, programs: int, tile: int, full: int = 2 * PROGRAMS) -> tuple[int, int]:
    """Into how many parts a long sum over n is cut, so that a GPU is full, and the length of a part, in whole tiles."""
    share = tiles(tiles(n, max(1, min(n // 512, full // programs))), tile) * tile
    return tiles(n, share), share


@triton.jit
def dot(a, b, INTERPRETED: tl.constexpr):
    """`a b` in fp32. Triton's interpreter would multiply the bits of bf16 as integers, so it gets fp32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def add_dot(total, a, b, INTERPRETED: tl.constexpr):
    """`total + a b` in fp32. Of factors in fp32, the products of one block are summed before they are added.

    They would be added to the total one by one, and a chain of thousands loses digits: an addition that is written as a
    multiplication by one is not merged into the product.
    """
    if a.dtype == tl.float32:
        total = tl.fma(dot(a, b, INTERPRETED), 1.0, total)
    else:
        total += dot(a, b, INTERPRETED)
    return total


@triton.jit
def rounded(x, to: tl.constexpr, INTERPRETED: tl.constexpr):
    """x in another dtype. Triton's interpreter would cut the bits off that bf16 lacks, so they are rounded away first."""
    if INTERPRETED and to == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(to)


@triton.jit
def _add_parts(parts_ptr, out_ptr, size, parts, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for part in range(parts):
        total += tl.load(parts_ptr + part * size + at, at < size, other=0.0)
    tl.store(out_ptr + at, rounded(total, out_ptr.dtype.element_ty, INTERPRETED), at < size)


_launch_add_parts = Launcher(_add_parts, num_warps=4)


@lru_cache(4096)
def _adding(size: int, parts: int, like: tuple[torch.dtype, torch.device]) -> Launch:
    return _launch_add_parts.prepare((tiles(size, 512), 1, 1), size, parts, 512)


def empty_parts(parts: int, *size: int, like: Tensor) -> Tensor:
    """Room for the parts of a sum: `(parts, …)` in fp32, or in the dtype of `like` where there is but one."""
    return torch.empty(parts, *size, dtype=like.dtype if parts == 1 else torch.float32, device=like.device)


def added(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """What the parts `(parts, …)` of a sum add up to, in order."""
    if len(parts) == 1:
        return parts[0]
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    _adding(out.numel(), len(parts), (dtype, parts.device))(parts, out)
    return out


@triton.jit
def noise(ptr, at, inside, to: tl.constexpr):
    """Some of the noise of rows or columns (`ops/rounding.py`): as many bits as fp32 has more than the other dtype."""
    return tl.load(ptr + at, inside, other=0).to(tl.int32) & (0xFFFF if to == tl.bfloat16 else 0x1FFF)


@triton.jit
def by_chance(y, noise, to: tl.constexpr):
    """y in fp32, rounded to another dtype by the noise. A NaN stays one: with all bits set it would become a zero."""
    bits = tl.minimum(y.to(tl.int32, bitcast=True), 0x7FFF0000) + noise
    if to == tl.bfloat16:
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return (bits & -0x2000).to(tl.float32, bitcast=True).to(to)


@triton.jit
def store(to_ptr, y, inside, noise_ptr, rows, cols, m, n, to: tl.constexpr, NOISY: tl.constexpr, INTERPRETED: tl.constexpr):
    """Store a tile y of a matrix `(m, n)` in another dtype: rounded by the noise of its rows and columns, or to nearest."""
    if NOISY:
        u = noise(noise_ptr, rows[:, None], rows[:, None] < m, to) ^ noise(noise_ptr + m, cols[None], cols[None] < n, to)
        tl.store(to_ptr, by_chance(y, u, to), inside)
    else:
        tl.store(to_ptr, rounded(y, to, INTERPRETED), inside)


@triton.jit
def _build_low_rank(
    w_ptr, b_ptr, a_ptr, noise_ptr, out_ptr, m, n, b_row, b_col, b_batch, a_row, a_col, a_batch,
    R: tl.constexpr, RANK: tl.constexpr, NOISY: tl.constexpr, FINE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One tile of `W + B A` of one layer. FINE: B and A are in fp32, and taken as sums of two numbers of the dtype of W."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    layer = tl.program_id(2).to(tl.int64)
    ranks = tl.arange(0, RANK)
    at_b = layer * b_batch + rows[:, None].to(tl.int64) * b_row + ranks[None] * b_col
    b = tl.load(b_ptr + at_b, (rows[:, None] < m) & (ranks[None] < R), other=0.0)
    at_a = layer * a_batch + ranks[:, None].to(tl.int64) * a_row + cols[None] * a_col
    a = tl.load(a_ptr + at_a, (ranks[:, None] < R) & (cols[None] < n), other=0.0)
    inside = (rows[:, None] < m) & (cols[None] < n)
    at = layer * m * n + rows[:, None].to(tl.int64) * n + cols[None]
    w = tl.load(w_ptr + at, inside, other=0.0)
    if FINE:
        b_high, a_high = rounded(b, w.dtype, INTERPRETED), rounded(a, w.dtype, INTERPRETED)
        b_low = rounded(b - b_high.to(tl.float32), w.dtype, INTERPRETED)
        a_low = rounded(a - a_high.to(tl.float32), w.dtype, INTERPRETED)
        delta = dot(b_low, a_high, INTERPRETED) + dot(b_high, a_low, INTERPRETED) + dot(b_high, a_high, INTERPRETED)
    else:
        delta = dot(b, a, INTERPRETED)
    y = w.to(tl.float32) + delta
    store(out_ptr + at, y, inside, noise_ptr + layer * (m + n), rows, cols, m, n, w.dtype, NOISY, INTERPRETED)


_launch_build = Launcher(_build_low_rank, num_warps=4)


def build_low_rank(W: Tensor, B: Tensor, A: Tensor, noise: Tensor | None) -> Callable[..., Tensor]:
    """`W + B A` of all layers: W read once, W' written once, rounded once."""
    m, n = W.shape[-2:]
    r = A.shape[-2]
    grid = tiles(m, 64), tiles(n, 128), W.shape[:-2].numel()
    batches = [t.stride(0) if t.dim() > 2 else 0 for t in (B, A)]
    strides = *B.stride()[-2:], batches[0], *A.stride()[-2:], batches[1]
    fine = B.dtype is not W.dtype
    launch = _launch_build.prepare(grid, m, n, *strides, r, filled(r), noise is not None, fine, 64, 128)

    def run(W: Tensor, B: Tensor, A: Tensor, noise: Tensor | None) -> Tensor:
        out = torch.empty_like(W)
        launch(W, B, A, W if noise is None else noise, out)
        return out

    return run


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
        z = add_dot(z, a, p, INTERPRETED)
    return z


@triton.jit
def _add_product(
    a_ptr, down_ptr, b_ptr, up_ptr, z_ptr, y_ptr, n, k, d, share, a_row, down_row, b_row, up_row, z_row, y_row,
    R: tl.constexpr, RANK: tl.constexpr, DOWN: tl.constexpr, FOLD: tl.constexpr, UNFOLD: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, COLS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Some rows and columns of `y = b + z Q`; if DOWN, `z = a Aᵀ` is computed first.

    Programs of the same rows compute the same z, and each writes it: they would wait for each other longer.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ranks = tl.arange(0, RANK)
    at_z = rows[:, None].to(tl.int64) * z_row + ranks[None]
    in_z = (rows[:, None] < n) & (ranks[None] < R)
    if DOWN:
        z = _down(a_ptr, down_ptr, n, k, rows, ranks, a_row, down_row, R, RANK, FOLD, ROWS, DEPTH, INTERPRETED)
        z = rounded(z, z_ptr.dtype.element_ty, INTERPRETED)
        tl.store(z_ptr + at_z, z, in_z)
    else:
        z = tl.load(z_ptr + at_z, in_z, other=0.0)
    first = tl.program_id(1) * share
    for start in range(first, tl.minimum(first + share, d), COLS):
        cols = start + tl.arange(0, COLS)
        inside = (rows[:, None] < n) & (cols[None] < d)
        if UNFOLD:
            q = (cols[None] % R == ranks[:, None]).to(tl.float32).to(z.dtype)
        else:
            q = tl.load(up_ptr + ranks[:, None] * up_row + cols[None], (ranks[:, None] < R) & (cols[None] < d), other=0.0)
        b = tl.load(b_ptr + rows[:, None].to(tl.int64) * b_row + cols[None], inside, other=0.0)
        y = b.to(tl.float32) + dot(z, q, INTERPRETED)
        tl.store(
            y_ptr + rows[:, None].to(tl.int64) * y_row + cols[None], rounded(y, y_ptr.dtype.element_ty, INTERPRETED), inside
        )


_launch_tiles = Launcher(_add_product, num_warps=4)
_launch_few = Launcher(_add_product, num_warps=4, num_stages=3)
_launch_fused = Launcher(_add_product, num_warps=8, num_stages=4)


def add_product(
    b: Tensor, a: Tensor, A: Tensor | None, Q: Tensor | None, inplace: bool
) -> Callable[..., tuple[Tensor, Tensor]]:
    """`z = a Aᵀ` and `b + z Q`: one launch that computes z itself, if that may be faster, else one that is given z."""
    n, d = b.shape
    k = a.shape[1]
    r = (Q if A is None else A).shape[0]  # type: ignore[union-attr]
    down_row, up_row = 0 if A is None else A.stride(0), 0 if Q is None else Q.stride(0)
    strides = a.stride(0), down_row, b.stride(0), up_row, r, b.stride(0) if inplace else d

    def prepared(launcher: Launcher, rows: int, depth: int, share: int, down: bool) -> Launch:
        grid = tiles(n, rows), tiles(d, share), 1
        constants = r, filled(r), down, A is None, Q is None, rows, depth, COLS
        return launcher.prepare(grid, n, k, d, share, *strides, *constants)

    apart, fused = prepared(_launch_tiles, 64, 64, COLS, False), None
    if n <= FEW_ROWS or (n * k <= FUSED_SIZE and k <= FUSED_DEPTH):
        launcher, rows, depth = (_launch_few, 16, 256) if n <= FEW_ROWS else (_launch_fused, 64, 64)
        share = tiles(tiles(d, max(1, PROGRAMS // tiles(n, rows))), COLS) * COLS
        fused = prepared(launcher, rows, depth, share, True)

    def run(b: Tensor, a: Tensor, A: Tensor | None, Q: Tensor | None, inplace: bool) -> tuple[Tensor, Tensor]:
        y = b if inplace else b.new_empty((n, d))
        # a launch that is recorded for a CUDA graph takes the host no time later
        launch = apart if fused is None or (b.is_cuda and torch.cuda.is_current_stream_capturing()) else fused
        if launch is fused:
            z = b.new_empty((n, r))
        else:
            z = fold(a, r) if A is None else torch.mm(a, A.t())
        launch(a, b if A is None else A, b, b if Q is None else Q, z, y)
        return y, z

    return run


@triton.jit
def sum_of_products(left_ptr, right_ptr, tile, first, end, p, left_row, right_row, R: tl.constexpr, RANK: tl.constexpr,
                    ROWS: tl.constexpr, COLS: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """Some columns of `leftᵀ right`, summed over the rows from `first` to `end`, in fp32."""
    cols = tile * COLS + tl.arange(0, COLS)
    ranks = tl.arange(0, RANK)
    total = tl.full((RANK, COLS), 0.0, tl.float32)
    for start in range(first, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        at = rows[None].to(tl.int64) * left_row + ranks[:, None]
        left = tl.load(left_ptr + at, (rows[None] < end) & (ranks[:, None] < R), other=0.0)
        at = rows[:, None].to(tl.int64) * right_row + cols[None]
        right = tl.load(right_ptr + at, (rows[:, None] < end) & (cols[None] < p), other=0.0)
        total = add_dot(total, left, right, INTERPRETED)
    return total


@triton.jit
def _product(left_ptr, right_ptr, out_ptr, tile, first, end, p, left_row, right_row, R: tl.constexpr, RANK: tl.constexpr,
             ROWS: tl.constexpr, COLS: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    total = sum_of_products(left_ptr, right_ptr, tile, first, end, p, left_row, right_row, R, RANK, ROWS, COLS, INTERPRETED)
    cols = tile * COLS + tl.arange(0, COLS)
    ranks = tl.arange(0, RANK)
    inside = (ranks[:, None] < R) & (cols[None] < p)
    tl.store(out_ptr + ranks[:, None] * p + cols[None], rounded(total, out_ptr.dtype.element_ty, INTERPRETED), inside)


@triton.jit
def _transposed_products(
    z_ptr, d_ptr, w_ptr, x_ptr, out_ptr, n, p, q, share, z_row, d_row, w_row, x_row,
    R: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A share of the rows of `zᵀ d`, by the first programs, and of `wᵀ x`, by the others."""
    tile = tl.program_id(0)
    part = tl.program_id(1)
    of_d = (p + COLS - 1) // COLS
    out_ptr += part.to(tl.int64) * R * (p + q)
    first = part * share
    end = tl.minimum(first + share, n)
    if tile < of_d:
        _product(z_ptr, d_ptr, out_ptr, tile, first, end, p, z_row, d_row, R, RANK, ROWS, COLS, INTERPRETED)
    else:
        _product(w_ptr, x_ptr, out_ptr + R * p, tile - of_d, first, end, q, w_row, x_row, R, RANK, ROWS, COLS, INTERPRETED)


_launch_transposed = Launcher(_transposed_products, num_warps=8, num_stages=2)


def transposed_products(z: Tensor, d: Tensor, w: Tensor, x: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    """`zᵀ d` and `wᵀ x` in one launch; where that would leave a GPU idle, of parts that another adds up."""
    n, r = z.shape
    p, q = d.shape[1], x.shape[1]
    programs, rows = tiles(p, COLUMNS) + tiles(q, COLUMNS), 128 if r <= 32 else 64
    worth_a_launch = n * (p + q) >= LARGE
    parts, share = shares(n, programs, rows, 4 * PROGRAMS) if worth_a_launch else (1, n)
    strides = z.stride(0), d.stride(0), w.stride(0), x.stride(0)
    launch = _launch_transposed.prepare(
        (programs, parts, 1), n, p, q, share, *strides, r, filled(r), rows, COLUMNS
    )  # fmt: skip

    def run(z: Tensor, d: Tensor, w: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        out = empty_parts(parts, r * (p + q), like=d)
        launch(z, d, w, x, out)
        zd, wx = added(out, d.dtype).split([r * p, r * q])
        return zd.view(r, p), wx.view(r, q)

    return run
