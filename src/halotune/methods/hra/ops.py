"""The mathematics of HRA: products of Householder reflections in compact WY form.

With `Û (in, r)` the normalised columns and `G = ÛᵀÛ`, the product `Q = H_1 H_2 … H_r`, `H_i = I − 2 û_i û_iᵀ`, is

    Q = I − Û T Ûᵀ,    chain: T = (striu(G) + ½ I)⁻¹,    Gram–Schmidt: T = 2 G⁺

so that nothing of size in×in is ever needed (derivation: README.md beside this file).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.fused import first_order, flattened
from ...core.operator import plus_thin
from ...core.precision import exact, exact_dtype
from ...ops.product import gather, grams, spread


def normalize(U: Tensor) -> Tensor:
    """`û_i = u_i / ‖u_i‖` for each column, in fp32 or better; a zero column stays zero and gets no gradient."""
    U = U.to(exact_dtype(U.dtype))
    norm = torch.linalg.vector_norm(U, dim=-2, keepdim=True)
    tiny = torch.finfo(U.dtype).tiny
    return U * torch.where(norm > tiny, 1.0 / norm.clamp_min(tiny), 0.0)


PIECES = 16


def gram(Û: Tensor) -> Tensor:
    """`ÛᵀÛ (…, r, r)`. Long columns are cut: few small products with long sums leave most of a GPU idle."""
    if Û.shape[-2] % PIECES or Û.shape[-2] < 1024:
        return Û.mT @ Û
    pieces = Û.unflatten(-2, (PIECES, -1))
    return (pieces.mT @ pieces).sum(-3)


def chain_core(Û: Tensor) -> Tensor:
    """`striu(G) + ½ I` `(…, r, r)`: the inverse of T for a product of reflections in order."""
    G = gram(Û)
    half = torch.full(G.shape[:-1], 0.5, dtype=G.dtype, device=G.device)
    return torch.triu(G, 1) + torch.diag_embed(half)


def rank_tolerance(G: Tensor) -> float:
    """Which eigenvalues of a Gram matrix `(…, r, r)` of normalised columns count as zero."""
    return G.shape[-1] * torch.finfo(G.dtype).eps * 16


class _SpanInverse(torch.autograd.Function):
    """`G⁺` of a Gram matrix at constant rank; `dG⁺ = −G⁺ dG G⁺` (the other terms vanish between Û and Ûᵀ)."""

    @staticmethod
    def forward(ctx: Any, G: Tensor) -> Tensor:
        eigenvalues, V = torch.linalg.eigh(G)
        tolerance = rank_tolerance(G)
        inverse = torch.where(eigenvalues > tolerance, 1.0 / eigenvalues.clamp_min(tolerance), 0.0)
        pinv = (V * inverse.unsqueeze(-2)) @ V.mT
        ctx.save_for_backward(pinv)
        return pinv

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (pinv,) = ctx.saved_tensors
        dG = -pinv @ grad_outputs[0].mT @ pinv
        return 0.5 * (dG + dG.mT)


def span_core(Û: Tensor) -> Tensor:
    """`T = 2 G⁺`, so that `Q = I − 2P` with P the projector on span(U).

    The columns are normalised, so eigenvalues of G lie in [0, r]; those under `16 r eps` count as zero: a zero column or
    one that depends on the others is no reflection.
    """
    return 2.0 * _SpanInverse.apply(Û.mT @ Û)


def wy_factors(U: Tensor, gram_schmidt: bool) -> tuple[Tensor, Tensor]:
    """`Û (…, in, r)` and `N = −Tᵀ Ûᵀ (…, r, in)`, in fp32 or better: `x Qᵀ = x + (x Û) N` and `W Q = W + (W Nᵀ) Ûᵀ`."""
    with exact(U):
        Û = normalize(U)
        if gram_schmidt:
            N = -(span_core(Û).mT @ Û.mT)
        else:
            N = torch.linalg.solve_triangular(chain_core(Û).mT, -Û.mT, upper=False)
        return Û, N


def rotate(x: Tensor, A: Tensor, N: Tensor) -> Tensor:
    """`x + (x Aᵀ) N` over the last dimension, differentiable in everything."""
    return plus_thin(x, x @ A.mT, N)


class _ReflectedLinears(torch.autograd.Function):
    """`Ûᵀ (s, r, in)` and N `(s, r, in)` of s siblings; for each W and b.

    The gradients of the rotated inputs become that of x in one pass over them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, Ût: Tensor, N: Tensor, *flat: Tensor | None) -> tuple[Tensor, ...]:
        rows = flattened(x)
        ys, z = _reflected_linears(rows, Ût, N, flat, x.shape[:-1])
        ctx.save_for_backward(rows, z, Ût, N, *flat[::2])
        ctx.shape = x.shape
        return ys

    @staticmethod
    @first_order
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, z, Ût, N, *Ws = ctx.saved_tensors
        if len(Ws) == 1:
            d = torch.mm(flattened(grad_outputs[0]), Ws[0]).unsqueeze(0)  # of the rotated inputs
        else:  # each in its place: in a compiled graph, where layers run alone, that would be one more copy
            d = x.new_empty((len(Ws), *x.shape))
            for dy, W, place in zip(grad_outputs, Ws, d.unbind(), strict=True):
                torch.mm(flattened(dy), W, out=place)
        dx, dz = gather(d, N, Ût) if ctx.needs_input_grad[0] else (None, torch.bmm(d, N.mT))
        dN, dÛt = grams(z, d, dz, x)
        return (None if dx is None else dx.view(ctx.shape)), dÛt, dN, *[None] * (2 * len(Ws))


def _reflected_linears(
    rows: Tensor, Ût: Tensor, N: Tensor, flat: Sequence[Any], size: torch.Size
) -> tuple[tuple[Tensor, ...], Tensor]:
    rotated, z = spread(rows, Ût, N)
    outputs = [F.linear(x, W, b) for x, W, b in zip(rotated.unbind(), flat[::2], flat[1::2], strict=True)]
    return tuple([y.view(*size, -1) for y in outputs]), z


def reflected_linears(x: Tensor, Ût: Tensor, N: Tensor, *flat: Tensor | None) -> tuple[Tensor, ...]:
    """`(x + (x Û_s) N_s) W_sᵀ + b_s` of siblings: `Ûᵀ (s, r, in)`, `N (s, r, in)`, then each W and b."""
    if torch.is_grad_enabled():
        return _ReflectedLinears.apply(x, Ût, N, *flat)  # type: ignore[return-value]
    return _reflected_linears(flattened(x), Ût, N, flat, x.shape[:-1])[0]


def orthogonality(U: Tensor, squared: bool) -> Tensor:
    """`‖I − ÛᵀÛ‖_F²`, or its root: how far the reflections are from orthogonal ones."""
    with exact(U):
        Û = normalize(U)
        gap = torch.eye(U.shape[-1], dtype=Û.dtype, device=U.device) - Û.mT @ Û
        return gap.square().sum() if squared else torch.linalg.matrix_norm(gap)


def reflect(x: Tensor, U: Tensor, gram_schmidt: bool) -> Tensor:
    """The definition, one reflection after the other: `x Qᵀ`. The reference for all that is faster.

    Under Gram–Schmidt the columns are orthonormalised in order first, dependent ones dropped.
    """
    columns = normalize(U).unbind(-1)
    if gram_schmidt:
        basis: list[Tensor] = []
        for u in columns:
            for _ in range(2):  # twice is enough
                for q in basis:
                    u = u - (u @ q) * q
            if u.norm() > 1e-4:
                basis.append(u / u.norm())
        columns = tuple(basis)
    for u in reversed(columns):  # x Qᵀ = x H_r … H_1
        x = x - 2.0 * (x @ u).unsqueeze(-1) * u
    return x
