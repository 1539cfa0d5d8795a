"""Triton kernels of LoHa. Their references are in `ops.py`."""

from __future__ import annotations

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from ...ops.kernels import added, dot, empty_parts, filled, rounded, shares, store
from ...ops.launch import Launcher, tiles

ROWS, COLS = 64, 128
PULL_ROWS, PULL_COLS = 64, 64


def _batch(t: Tensor) -> int:
    """The step from one layer to the next."""
    return t.stride(0) if t.dim() > 2 else 0


@triton.jit
def _hadamard(
    w_ptr, a1_ptr, b1_ptr, a2_ptr, b2_ptr, noise_ptr, out_ptr, m, n, w_row, w_col, a_row, a_col, b_row, b_col,
    w_batch, a_batch, b_batch, s, R: tl.constexpr, RANK: tl.constexpr, NOISY: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One tile of `W + s (A1 B1) ∘ (A2 B2)`: the products never leave the chip."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    ranks = tl.arange(0, RANK)
    layer = tl.program_id(2).to(tl.int64)
    w_ptr += layer * w_batch
    out_ptr += layer * m * n
    a1_ptr += layer * a_batch
    a2_ptr += layer * a_batch
    b1_ptr += layer * b_batch
    b2_ptr += layer * b_batch
    at_a = rows[:, None] * a_row + ranks[None] * a_col
    in_a = (rows[:, None] < m) & (ranks[None] < R)
    at_b = ranks[:, None] * b_row + cols[None] * b_col
    in_b = (ranks[:, None] < R) & (cols[None] < n)
    a1, b1 = tl.load(a1_ptr + at_a, in_a, other=0.0), tl.load(b1_ptr + at_b, in_b, other=0.0)
    a2, b2 = tl.load(a2_ptr + at_a, in_a, other=0.0), tl.load(b2_ptr + at_b, in_b, other=0.0)
    delta = dot(a1, b1, INTERPRETED) * dot(a2, b2, INTERPRETED)
    inside = (rows[:, None] < m) & (cols[None] < n)
    w = tl.load(w_ptr + rows[:, None].to(tl.int64) * w_row + cols[None].to(tl.int64) * w_col, inside, other=0.0)
    y = w.to(tl.float32) + s * delta
    at = rows[:, None].to(tl.int64) * n + cols[None]
    store(out_ptr + at, y, inside, noise_ptr + layer * (m + n), rows, cols, m, n, w.dtype, NOISY, INTERPRETED)


_launch_hadamard = Launcher(_hadamard, num_warps=8)


def hadamard(
    W: Tensor, A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor, s: float, noise: Tensor | None
) -> Callable[..., Tensor]:
    """`W + s (A1 B1) ∘ (A2 B2)` of all layers: W read once, W' written once, rounded once."""
    m, n = W.shape[-2:]
    r = A1.shape[-1]
    strides = *W.stride()[-2:], *A1.stride()[-2:], *B1.stride()[-2:], *(_batch(t) for t in (W, A1, B1))
    grid = tiles(m, ROWS), tiles(n, COLS), W.shape[:-2].numel()
    launch = _launch_hadamard.prepare(grid, m, n, *strides, float(s), r, filled(r), noise is not None, ROWS, COLS)

    def run(W: Tensor, A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor, s: float, noise: Tensor | None) -> Tensor:
        out = W.new_empty(W.shape)
        launch(W, A1, B1, A2, B2, W if noise is None else noise, out)
        return out

    return run


@triton.jit
def _pull(
    g_ptr, p1_ptr, q1_ptr, p2_ptr, q2_ptr, out_ptr, m, n, g_row, g_col, p_row, p_col, q_row, q_col,
    g_batch, p_batch, q_batch, share, s,
    R: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """`ROWS` rows of `dP1 = s (G ∘ (P2 Q2ᵀ)) Q1` and of dP2, summed over a share of the columns of G."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    layer = tl.program_id(2).to(tl.int64)
    g_ptr += layer * g_batch
    p1_ptr += layer * p_batch
    p2_ptr += layer * p_batch
    q1_ptr += layer * q_batch
    q2_ptr += layer * q_batch
    ranks = tl.arange(0, RANK)
    at_p = rows[:, None] * p_row + ranks[None] * p_col
    in_p = (rows[:, None] < m) & (ranks[None] < R)
    p1, p2 = tl.load(p1_ptr + at_p, in_p, other=0.0), tl.load(p2_ptr + at_p, in_p, other=0.0)
    d1 = tl.full((ROWS, RANK), 0.0, tl.float32)
    d2 = tl.full((ROWS, RANK), 0.0, tl.float32)
    for start in range(part * share, tl.minimum((part + 1) * share, n), COLS):
        cols = start + tl.arange(0, COLS)
        at_q = cols[:, None] * q_row + ranks[None] * q_col
        in_q = (cols[:, None] < n) & (ranks[None] < R)
        q1, q2 = tl.load(q1_ptr + at_q, in_q, other=0.0), tl.load(q2_ptr + at_q, in_q, other=0.0)
        at_g = rows[:, None].to(tl.int64) * g_row + cols[None].to(tl.int64) * g_col
        g = s * tl.load(g_ptr + at_g, (rows[:, None] < m) & (cols[None] < n), other=0.0).to(tl.float32)
        m1 = dot(p1, tl.trans(q1), INTERPRETED)
        m2 = dot(p2, tl.trans(q2), INTERPRETED)
        d1 += dot((g * m2).to(q1.dtype), q1, INTERPRETED)
        d2 += dot((g * m1).to(q2.dtype), q2, INTERPRETED)
    at = (part.to(tl.int64) * tl.num_programs(2) + layer) * 2 * m * R + rows[:, None] * R + ranks[None]
    tl.store(out_ptr + at, rounded(d1, out_ptr.dtype.element_ty, INTERPRETED), in_p)
    tl.store(out_ptr + at + m * R, rounded(d2, out_ptr.dtype.element_ty, INTERPRETED), in_p)


_launch_pull = Launcher(_pull, num_warps=4)


def _pull_half(G: Tensor, P1: Tensor, Q1: Tensor, s: float) -> Callable[..., Tensor]:
    """`s (G ∘ (P2 Q2ᵀ)) Q1` and `s (G ∘ (P1 Q1ᵀ)) Q2` `(…, 2, m, r)`: G `(…, m, n)` read once, P `(…, m, r)`, Q `(…, n, r)`."""
    *layers, m, n = G.shape
    r = P1.shape[-1]
    batch = G.shape[:-2].numel()
    blocks = tiles(m, PULL_ROWS)
    parts, share = shares(n, blocks * batch, PULL_COLS)
    strides = *G.stride()[-2:], *P1.stride()[-2:], *Q1.stride()[-2:], *(_batch(t) for t in (G, P1, Q1))
    launch = _launch_pull.prepare(
        (blocks, parts, batch), m, n, *strides, share, float(s), r, filled(r), PULL_ROWS, PULL_COLS
    )  # fmt: skip

    def run(G: Tensor, P1: Tensor, Q1: Tensor, P2: Tensor, Q2: Tensor) -> Tensor:
        out = empty_parts(parts, *layers, 2, m, r, like=P1)
        launch(G, P1, Q1, P2, Q2, out)
        return added(out, P1.dtype)

    return run


def pull(G: Tensor, A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor, s: float) -> Callable[..., tuple[Tensor, ...]]:
    """Gradients of A1, B1, A2, B2 from `G = dL/dW'`: G read twice, and nothing of its size written."""
    of_A, of_B = _pull_half(G, A1, B1.mT, s), _pull_half(G.mT, B1.mT, A1, s)

    def run(G: Tensor, A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor, s: float) -> tuple[Tensor, ...]:
        dA1, dA2 = of_A(G, A1, B1.mT, A2, B2.mT).unbind(-3)
        dB1, dB2 = of_B(G.mT, B1.mT, A1, B2.mT, A2).unbind(-3)
        return dA1, dB1.mT, dA2, dB2.mT

    return run
