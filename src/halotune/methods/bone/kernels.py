"""Triton kernels of Bone and BAT. Their references are in `ops.py`.

A tile has `ROWS` rows. Each holds up to `WIDE` columns of one row of W, which are as many whole blocks as fit into `SIDE`, the
width that a matrix unit takes: small blocks lie side by side in it, and meet B_i repeated along the diagonal.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.kernels import added, by_chance, dot, empty_parts, filled, noise, rounded, shares
from ...ops.launch import Launcher, tiles
from .ops import side_by_side


def _sizes(r: int, n_in: int) -> tuple[int, int, int, int]:
    """How many rows of tiles a row of W takes; WIDE, SIDE, ROWS."""
    wide, side = side_by_side(r), filled(r)
    return tiles(n_in, wide), wide, side, max(64, 4096 // side)


@triton.jit
def _place(t, n_in, pieces, R: tl.constexpr, WIDE: tl.constexpr, SIDE: tl.constexpr):
    """Of rows t of tiles: the row of W within the row of blocks, the first column; all offsets, and whether they are in W."""
    row = t // pieces
    first = t % pieces * WIDE
    cols = tl.arange(0, SIDE)[None]
    inside = (row[:, None] < R) & (cols < WIDE) & (first[:, None] + cols < n_in)
    return row, first, row[:, None] * n_in + first[:, None] + cols, inside


@triton.jit
def _bat(w_ptr, b_ptr, noise_ptr, out_ptr, n_in, pieces, blocks, R: tl.constexpr, WIDE: tl.constexpr, SIDE: tl.constexpr,
         NOISY: tl.constexpr, ROWS: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """One tile of W' in the i-th row of blocks."""
    i = tl.program_id(0).to(tl.int64)
    w_ptr += i * R * n_in
    out_ptr += i * R * n_in
    b_ptr += i * R * R
    t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row, first, at, inside = _place(t, n_in, pieces, R, WIDE, SIDE)  # pyright: ignore[reportGeneralTypeIssues]
    cols = tl.arange(0, SIDE)
    w = tl.load(w_ptr + at, inside, other=0.0)
    in_one_block = cols[:, None] // R == cols[None] // R
    b = tl.load(b_ptr + cols[:, None] % R * R + cols[None] % R, in_one_block, other=0.0)
    own = tl.load(b_ptr + row[:, None] * R + cols[None] % R, inside, other=0.0)
    new = w.to(tl.float32) + dot(w, b, INTERPRETED) + own.to(tl.float32)
    if NOISY:  # see `ops.noise_of_blocks`
        noise_ptr += (i // blocks) * (blocks * R + n_in)
        in_rows = row[:, None] < R
        u = noise(noise_ptr, ((i % blocks) * R + row)[:, None], in_rows, w.dtype)
        noise_ptr += blocks * R
        u ^= noise(noise_ptr, first[:, None], in_rows, w.dtype)
        u = u ^ noise(noise_ptr, cols[None], (cols[None] > 0) & (cols[None] < n_in), w.dtype)
        tl.store(out_ptr + at, by_chance(new, u, w.dtype), inside)
    else:
        tl.store(out_ptr + at, rounded(new, w.dtype, INTERPRETED), inside)


_launch_bat = Launcher(_bat, num_warps=4)


def bat(W: Tensor, blocks: Tensor, noise: Tensor | None) -> Callable[..., Tensor]:
    """`W_ij + W_ij B_i + B_i` of all layers: W read once, W' written once, rounded once."""
    *_, n, r, _ = blocks.shape
    n_in = W.shape[-1]
    pieces, wide, side, rows = _sizes(r, n_in)
    grid = blocks.shape[:-2].numel(), tiles(r * pieces, rows), 1
    launch = _launch_bat.prepare(grid, n_in, pieces, n, r, wide, side, noise is not None, rows)

    def run(W: Tensor, blocks: Tensor, noise: Tensor | None) -> Tensor:
        W = W.contiguous()
        out = torch.empty_like(W)
        launch(W, blocks.contiguous(), W if noise is None else noise, out)
        return out

    return run


@triton.jit
def _pull_bat(w_ptr, g_ptr, out_ptr, n_in, pieces, share, R: tl.constexpr, WIDE: tl.constexpr, SIDE: tl.constexpr,
              ROWS: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """`Σ_j (W_ijᵀ G_ij + G_ij)` over a share of the rows of tiles of the i-th row of blocks."""
    i = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    w_ptr += i * R * n_in
    g_ptr += i * R * n_in
    ranks = tl.arange(0, SIDE)
    total = tl.full((SIDE, SIDE), 0.0, tl.float32)
    for start in range(part * share, tl.minimum((part + 1) * share, R * pieces), ROWS):
        t = start + tl.arange(0, ROWS)
        row, _, at, inside = _place(t, n_in, pieces, R, WIDE, SIDE)  # pyright: ignore[reportGeneralTypeIssues]
        w = tl.load(w_ptr + at, inside, other=0.0)
        g = tl.load(g_ptr + at, inside, other=0.0)
        own = (row[None] == ranks[:, None] % R).to(tl.float32).to(g.dtype)
        total += dot(tl.trans(w), g, INTERPRETED) + dot(own, g, INTERPRETED)
    if WIDE > R:  # what a block gave to itself lies on the diagonal; what two gave to each other is nobody's
        total = tl.where(ranks[:, None] // R == ranks[None] // R, total, 0.0)
        fold = (ranks[:, None] % R == ranks[None]).to(tl.float32)
        total = dot(tl.trans(fold), dot(total, fold, INTERPRETED), INTERPRETED)
    at = (part.to(tl.int64) * tl.num_programs(0) + i) * R * R + ranks[:, None] * R + ranks[None]
    total = rounded(total, out_ptr.dtype.element_ty, INTERPRETED)
    tl.store(out_ptr + at, total, (ranks[:, None] < R) & (ranks[None] < R))


_launch_pull_bat = Launcher(_pull_bat, num_warps=4)


def pull_bat(G: Tensor, W: Tensor, blocks: Tensor) -> Callable[..., Tensor]:
    """`Σ_j (W_ijᵀ G_ij + G_ij)`: W and G read once."""
    *_, r, _ = blocks.shape
    n, n_in = blocks.shape[:-2].numel(), W.shape[-1]
    pieces, wide, side, rows = _sizes(r, n_in)
    parts, share = shares(r * pieces, n, rows)
    launch = _launch_pull_bat.prepare((n, parts, 1), n_in, pieces, share, r, wide, side, rows)

    def run(G: Tensor, W: Tensor, blocks: Tensor) -> Tensor:
        out = empty_parts(parts, n, r, r, like=blocks)
        launch(W.contiguous(), G.contiguous(), out)
        return added(out, blocks.dtype).view(blocks.shape)

    return run
