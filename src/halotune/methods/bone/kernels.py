"""Triton kernels of Bone and BAT. Their references are in `ops.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.kernels import added, by_chance, dot, empty_parts, filled, noise, rounded, shares
from ...ops.launch import Launcher, tiles

ROWS = 64
PULL_ROWS = 64


@triton.jit
def _bat(w_ptr, b_ptr, noise_ptr, out_ptr, n_in, blocks, R: tl.constexpr, SIDE: tl.constexpr, NOISY: tl.constexpr,
         ROWS: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """A row of blocks lies in memory as a matrix of `n_in` rows of r numbers: `ROWS` of those meet `B_i`."""
    i = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, SIDE)
    block = b_ptr + i * R * R
    inside = (rows[:, None] < n_in) & (cols[None] < R)
    at = i.to(tl.int64) * n_in * R + rows[:, None] * R + cols[None]
    w = tl.load(w_ptr + at, inside, other=0.0)
    b = tl.load(block + cols[:, None] * R + cols[None], (cols[:, None] < R) & (cols[None] < R), other=0.0)
    own = tl.load(block + (rows // (n_in // R))[:, None] * R + cols[None], inside, other=0.0)
    new = w.to(tl.float32) + dot(w, b, INTERPRETED) + own.to(tl.float32)
    if NOISY:  # see `ops.noise_of_blocks`
        width = n_in // R  # blocks in a row of W
        noise_ptr += (i // blocks) * (blocks * R + n_in)
        in_rows = rows[:, None] < n_in
        u = noise(noise_ptr, ((i % blocks) * R + rows // width)[:, None], in_rows, w.dtype)
        noise_ptr += blocks * R
        u ^= noise(noise_ptr, (rows % width)[:, None] * R, in_rows, w.dtype)
        u = u ^ noise(noise_ptr, cols[None], (cols[None] > 0) & (cols[None] < R), w.dtype)
        tl.store(out_ptr + at, by_chance(new, u, w.dtype), inside)
    else:
        tl.store(out_ptr + at, rounded(new, w.dtype, INTERPRETED), inside)


_launch_bat = Launcher(_bat, num_warps=4)


def bat(W: Tensor, blocks: Tensor, noise: Tensor | None) -> Callable[..., Tensor]:
    """`W_ij + W_ij B_i + B_i` of all layers: W read once, W' written once, rounded once."""
    *_, n, r, _ = blocks.shape
    n_in = W.shape[-1]
    grid = blocks.shape[:-2].numel(), tiles(n_in, ROWS), 1
    launch = _launch_bat.prepare(grid, n_in, n, r, filled(r), noise is not None, ROWS)

    def run(W: Tensor, blocks: Tensor, noise: Tensor | None) -> Tensor:
        out = torch.empty_like(W)
        launch(W, blocks, W if noise is None else noise, out)
        return out

    return run


@triton.jit
def _pull_bat(w_ptr, g_ptr, out_ptr, n_in, share, R: tl.constexpr, SIDE: tl.constexpr, ROWS: tl.constexpr,
              INTERPRETED: tl.constexpr):  # fmt: skip
    """A share of the rows of `W_iᵀ G_i + Σ_j G_ij`, W_i and G_i laid out as in `_bat`."""
    i = tl.program_id(0)
    part = tl.program_id(1)
    ranks = tl.arange(0, SIDE)
    at_block = i.to(tl.int64) * n_in * R
    total = tl.full((SIDE, SIDE), 0.0, tl.float32)
    for start in range(part * share, tl.minimum((part + 1) * share, n_in), ROWS):
        rows = start + tl.arange(0, ROWS)
        at = at_block + rows[:, None] * R + ranks[None]
        inside = (rows[:, None] < n_in) & (ranks[None] < R)
        w = tl.load(w_ptr + at, inside, other=0.0)
        g = tl.load(g_ptr + at, inside, other=0.0)
        own = ((rows // (n_in // R))[None] == ranks[:, None]).to(tl.float32).to(g.dtype)  # the row of its block
        total += dot(tl.trans(w), g, INTERPRETED) + dot(own, g, INTERPRETED)
    at = (part.to(tl.int64) * tl.num_programs(0) + i) * R * R + ranks[:, None] * R + ranks[None]
    total = rounded(total, out_ptr.dtype.element_ty, INTERPRETED)
    tl.store(out_ptr + at, total, (ranks[:, None] < R) & (ranks[None] < R))


_launch_pull_bat = Launcher(_pull_bat, num_warps=4)


def pull_bat(G: Tensor, W: Tensor, blocks: Tensor) -> Callable[..., Tensor]:
    """`Σ_j (W_ijᵀ G_ij + G_ij)`: W and G read once."""
    *_, r, _ = blocks.shape
    n, n_in = blocks.shape[:-2].numel(), W.shape[-1]
    parts, share = shares(n_in, n, PULL_ROWS)
    launch = _launch_pull_bat.prepare((n, parts, 1), n_in, share, r, filled(r), PULL_ROWS)

    def run(G: Tensor, W: Tensor, blocks: Tensor) -> Tensor:
        out = empty_parts(parts, n, r, r, like=blocks)
        launch(W, G, out)
        return added(out, blocks.dtype).view(blocks.shape)

    return run
