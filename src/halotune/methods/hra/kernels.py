"""Triton kernels of HRA's factors and their gradient. Their references, and the formulas, are in `ops.py`.

The columns of `Ûᵀ (r, in)` are dealt out to at most `PIECES` programs of a layer. What all of them need is a sum over all
columns, so each operation has a first launch that leaves its parts, which the programs of the second add up, each for itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.kernels import add_dot, dot, filled
from ...ops.launch import Launcher, tiles

PIECES = 16


@triton.jit
def _sum(T, axis: tl.constexpr):
    """`tl.sum`, which the interpreter knows only where it was asked for before triton was imported."""
    return tl.reduce(T, axis, tl.standard._sum_combine)


@triton.jit
def _row(T, ranks, i):
    """Row i of T `(r, ·)`."""
    return _sum(tl.where(ranks[:, None] == i, T, 0.0), 0)


@triton.jit
def _column(T, ranks, i):
    """Column i of T `(r, r)`."""
    return _sum(tl.where(ranks[None] == i, T, 0.0), 1)


@triton.jit
def _sum_of_parts(ptr, size, stride, at, PARTS: tl.constexpr):
    total = tl.load(ptr + at, at < size, other=0.0)
    for part in range(1, PARTS):
        total += tl.load(ptr + part * stride + at, at < size, other=0.0)
    return total


@triton.jit
def _gram_parts(u_ptr, parts_ptr, n_in, share, R: tl.constexpr, RANK: tl.constexpr, COLS: tl.constexpr,
                INTERPRETED: tl.constexpr):  # fmt: skip
    """A share of the sum `UᵀU`, `(RANK, RANK)`."""
    layer, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ranks = tl.arange(0, RANK)
    total = tl.full((RANK, RANK), 0.0, tl.float32)
    for start in range(piece * share, tl.minimum((piece + 1) * share, n_in), COLS):
        cols = start + tl.arange(0, COLS)
        at = (layer * n_in + cols[:, None]) * R + ranks[None]
        u = tl.load(u_ptr + at, (cols[:, None] < n_in) & (ranks[None] < R), other=0.0).to(tl.float32)
        total = add_dot(total, tl.trans(u), u, INTERPRETED)
    at = (layer * tl.num_programs(1) + piece) * RANK * RANK + ranks[:, None] * RANK + ranks[None]
    tl.store(parts_ptr + at, total)


@triton.jit
def _factors(u_ptr, parts_ptr, out_ptr, n_ptr, gram_ptr, scale_ptr, n_in, share, tiny, R: tl.constexpr, RANK: tl.constexpr,
             COLS: tl.constexpr, PARTS: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """Some columns of Ûᵀ and of N, by forward substitution; the first program also leaves G and the scales."""
    layer, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ranks = tl.arange(0, RANK)
    square = ranks[:, None] * RANK + ranks[None]
    G = _sum_of_parts(parts_ptr + layer * PARTS * RANK * RANK, RANK * RANK, RANK * RANK, square, PARTS)
    norms = tl.sqrt_rn(_sum(tl.where(ranks[:, None] == ranks[None], G, 0.0), 1))
    scale = tl.where(norms > tiny, tl.div_rn(1.0, tl.where(norms > tiny, norms, 1.0)), 0.0)
    G = G * scale[:, None] * scale[None]
    if piece == 0:
        inside = (ranks[:, None] < R) & (ranks[None] < R)
        tl.store(gram_ptr + layer * R * R + ranks[:, None] * R + ranks[None], G, inside)
        tl.store(scale_ptr + layer * R + ranks, scale, ranks < R)
    L = tl.where(ranks[:, None] > ranks[None], 2.0 * G, 0.0)
    for start in range(piece * share, tl.minimum((piece + 1) * share, n_in), COLS):
        cols = start + tl.arange(0, COLS)
        inside = (ranks[:, None] < R) & (cols[None] < n_in)
        u = tl.load(u_ptr + (layer * n_in + cols[None]) * R + ranks[:, None], inside, other=0.0).to(tl.float32)
        u = u * scale[:, None]
        N = -2.0 * u
        for i in range(R):
            N -= _column(L, ranks, i)[:, None] * _row(N, ranks, i)[None]
        at = (layer * R + ranks[:, None]) * n_in + cols[None]
        tl.store(out_ptr + at, u, inside)
        tl.store(n_ptr + at, N, inside)


@triton.jit
def _pulled_parts(ut_ptr, n_ptr, gram_ptr, dut_ptr, dn_ptr, d_ptr, parts_ptr, n_in, share, R: tl.constexpr, RANK: tl.constexpr,
                  COLS: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """Some columns of `D = dÛᵀ − 2 P`, by back substitution; their share of `P Nᵀ`, and of the row sums of `Ûᵀ ∘ D`."""
    layer, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ranks = tl.arange(0, RANK)
    both = (ranks[:, None] < R) & (ranks[None] < R)
    G = tl.load(gram_ptr + layer * R * R + ranks[:, None] * R + ranks[None], both, other=0.0)
    L = tl.where(ranks[:, None] > ranks[None], 2.0 * G, 0.0)
    C = tl.full((RANK, RANK), 0.0, tl.float32)
    along = tl.full((RANK,), 0.0, tl.float32)
    for start in range(piece * share, tl.minimum((piece + 1) * share, n_in), COLS):
        cols = start + tl.arange(0, COLS)
        inside = (ranks[:, None] < R) & (cols[None] < n_in)
        at = (layer * R + ranks[:, None]) * n_in + cols[None]
        P = tl.load(dn_ptr + at, inside, other=0.0)
        for j in range(R):
            P -= _row(L, ranks, R - 1 - j)[:, None] * _row(P, ranks, R - 1 - j)[None]
        D = tl.load(dut_ptr + at, inside, other=0.0) - 2.0 * P
        tl.store(d_ptr + at, D, inside)
        N = tl.load(n_ptr + at, inside, other=0.0)
        C = add_dot(C, P, tl.trans(N), INTERPRETED)
        along += _sum(tl.load(ut_ptr + at, inside, other=0.0) * D, 1)
    parts_ptr += (layer * tl.num_programs(1) + piece) * RANK * (RANK + 1)
    tl.store(parts_ptr + ranks[:, None] * RANK + ranks[None], C)
    tl.store(parts_ptr + RANK * RANK + ranks, along)


@triton.jit
def _pulled(ut_ptr, gram_ptr, scale_ptr, d_ptr, parts_ptr, du_ptr, n_in, share, R: tl.constexpr, RANK: tl.constexpr,
            COLS: tl.constexpr, PARTS: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """Some rows of `dU`: `S Ûᵀ` is added to D, what lies along the vectors is taken away, and scaled."""
    layer, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ranks = tl.arange(0, RANK)
    parts_ptr += layer * PARTS * RANK * (RANK + 1)
    square = ranks[:, None] * RANK + ranks[None]
    C = _sum_of_parts(parts_ptr, RANK * RANK, RANK * (RANK + 1), square, PARTS)
    along = _sum_of_parts(parts_ptr + RANK * RANK, RANK, RANK * (RANK + 1), ranks, PARTS)
    C = tl.where(ranks[:, None] > ranks[None], -2.0 * C, 0.0)
    S = C + tl.trans(C)
    both = (ranks[:, None] < R) & (ranks[None] < R)
    along += _sum(S * tl.load(gram_ptr + layer * R * R + ranks[:, None] * R + ranks[None], both, other=0.0), 1)
    scale = tl.load(scale_ptr + layer * R + ranks, ranks < R, other=0.0)
    for start in range(piece * share, tl.minimum((piece + 1) * share, n_in), COLS):
        cols = start + tl.arange(0, COLS)
        inside = (ranks[:, None] < R) & (cols[None] < n_in)
        at = (layer * R + ranks[:, None]) * n_in + cols[None]
        u = tl.load(ut_ptr + at, inside, other=0.0)
        d = tl.load(d_ptr + at, inside, other=0.0) + dot(S, u, INTERPRETED)
        d = (d - u * along[:, None]) * scale[:, None]
        tl.store(du_ptr + (layer * n_in + cols[None]) * R + ranks[:, None], d, inside)


_launch_gram_parts = Launcher(_gram_parts, num_warps=4)
_launch_factors = Launcher(_factors, num_warps=4)
_launch_pulled_parts = Launcher(_pulled_parts, num_warps=4)
_launch_pulled = Launcher(_pulled, num_warps=4)


def _pieces(n_in: int, r: int) -> tuple[int, int, int, int]:
    """Programs of a layer, the columns of each, r filled up, and the columns of a tile."""
    rank = filled(r)
    cols = 128 if rank <= 32 else 64
    share = tiles(tiles(n_in, PIECES), cols) * cols
    return tiles(n_in, share), share, rank, cols


def factors(U: Tensor) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Ûᵀ, N, G and the scales of U `(…, in, r)`."""
    *lead, n_in, r = U.shape
    layers = U.shape[:-2].numel()
    pieces, share, rank, cols = _pieces(n_in, r)
    gram_parts = _launch_gram_parts.prepare((layers, pieces, 1), n_in, share, r, rank, cols)
    tiny = torch.finfo(torch.float32).tiny
    made = _launch_factors.prepare((layers, pieces, 1), n_in, share, tiny, r, rank, cols, pieces)

    def run(U: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        U, new = U.contiguous(), {"dtype": torch.float32, "device": U.device}
        parts = torch.empty(layers, pieces, rank, rank, **new)
        Ût, N = torch.empty(2, *lead, r, n_in, **new).unbind()
        G, scale = torch.empty(*lead, r, r, **new), torch.empty(*lead, r, **new)
        gram_parts(U, parts)
        made(U, parts, Ût, N, G, scale)
        return Ût, N, G, scale

    return run


def pull_factors(Ût: Tensor, *others: Tensor) -> Callable[..., Tensor]:
    """`dU (…, in, r)` from the gradients of Ûᵀ and N."""
    *lead, r, n_in = Ût.shape
    layers = Ût.shape[:-2].numel()
    pieces, share, rank, cols = _pieces(n_in, r)
    parts_of = _launch_pulled_parts.prepare((layers, pieces, 1), n_in, share, r, rank, cols)
    pulled = _launch_pulled.prepare((layers, pieces, 1), n_in, share, r, rank, cols, pieces)

    def run(*made: Tensor) -> Tensor:
        Ût, N, G, scale, dÛt, dN = [t.contiguous() for t in made]
        parts = Ût.new_empty(layers, pieces, rank, rank + 1)
        D, dU = torch.empty_like(N), Ût.new_empty(*lead, n_in, r)
        parts_of(Ût, N, G, dÛt, dN, D, parts)
        pulled(Ût, G, scale, D, parts, dU)
        return dU

    return run
