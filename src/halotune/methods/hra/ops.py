"""The mathematics of HRA: products of Householder reflections in compact WY form.

With `Û (in, r)` the normalised columns and `G = ÛᵀÛ`, the product `Q = H_1 H_2 … H_r`, `H_i = I − 2 û_i û_iᵀ`, is

    Q = I − Û T Ûᵀ,    chain: T = (striu(G) + ½ I)⁻¹,    Gram–Schmidt: T = 2 G⁺

so that nothing of size in×in is ever needed (derivation: README.md beside this file).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.prepared import exact, exact_dtype
from ...ops.product import add_product, apply, flattened, no_view, transposed_products


def normalize(U: Tensor) -> Tensor:
    """`û_i = u_i / ‖u_i‖` for each column, in fp32 or better; a zero column stays zero and gets no gradient."""
    U = U.to(exact_dtype(U.dtype))
    norm = torch.linalg.vector_norm(U, dim=-2, keepdim=True)
    return U / torch.where(norm > torch.finfo(U.dtype).tiny, norm, math.inf)


PIECES = 16


def gram(Û: Tensor) -> Tensor:
    """`ÛᵀÛ (…, r, r)`. Long columns are cut: few small products with long sums leave most of a GPU idle."""
    if Û.shape[-2] % PIECES or Û.shape[-2] < 1024:
        return Û.mT @ Û
    pieces = Û.unflatten(-2, (PIECES, -1))
    return (pieces.mT @ pieces).sum(-3)


def rank_tolerance(G: Tensor) -> float:
    """Which eigenvalues of a Gram matrix `(…, r, r)` of normalised columns count as zero."""
    return G.shape[-1] * torch.finfo(G.dtype).eps * 16


def span_core(Û: Tensor) -> Tensor:
    """`T = 2 G⁺`, so that `Q = I − 2P` with P the projector on span(U).

    The columns are normalised, so eigenvalues of G lie in [0, r]; those under `16 r eps` count as zero: a zero column or
    one that depends on the others is no reflection.
    """
    G = Û.mT @ Û
    return 2.0 * torch.linalg.pinv(G, atol=rank_tolerance(G), rtol=0.0, hermitian=True)


def wy_factors(U: Tensor, gram_schmidt: bool) -> tuple[Tensor, Tensor]:
    """`Û (…, in, r)` and `N = −Tᵀ Ûᵀ (…, r, in)`, in fp32 or better: `x Qᵀ = x + (x Û) N` and `W Q = W + (W Nᵀ) Ûᵀ`."""
    with exact(U):
        Û = normalize(U)
        if gram_schmidt:
            N = -(span_core(Û).mT @ Û.mT)
        else:  # T⁻ᵀ = (stril(2 G) + I) / 2, of which the solver reads 2 G below the diagonal alone
            N = torch.linalg.solve_triangular(2 * gram(Û), -2 * Û.mT, upper=False, unitriangular=True)
        return Û, N


class _ReflectedLinear(torch.autograd.Function):
    """`Ûᵀ (r, in)` and N `(r, in)`. Where a second derivative is recorded, `z = x Û` is made again of what came in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, Ût: Tensor, N: Tensor) -> Tensor:
        rows = flattened(x)
        rotated, z = add_product(rows, rows, Ût, N, False)
        ctx.save_for_backward(x, z, W, Ût, N)
        return no_view(F.linear(rotated.view_as(x), W, bias))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, z, W, Ût, N = ctx.saved_tensors
        rows = flattened(x)
        d = torch.mm(flattened(grad_outputs[0]), W)  # of the rotated input
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            z = torch.mm(rows, Ût.t())
        dx, dz = add_product(d, d, N, Ût, False) if ctx.needs_input_grad[0] else (None, torch.mm(d, N.t()))
        dN, dÛt = transposed_products(z, d, dz, rows)
        return (None if dx is None else dx.view_as(x)), None, None, dÛt, dN


def reflected_linear(x: Tensor, W: Tensor, bias: Tensor | None, Ût: Tensor, N: Tensor) -> Tensor:
    """`(x + (x Û) N) Wᵀ + b` for a frozen W; `Ûᵀ (r, in)`, `N (r, in)`."""
    if torch.is_grad_enabled():
        return apply(_ReflectedLinear, x, W, bias, Ût, N)
    rows = flattened(x)
    return F.linear(add_product(rows, rows, Ût, N, False)[0].view_as(x), W, bias)


def orthogonality(U: Tensor, squared: bool) -> Tensor:
    """`‖I − ÛᵀÛ‖_F²`, or its root, summed over `(…, in, r)`: how far the reflections are from orthogonal ones."""
    with exact(U):
        Û = normalize(U)
        gap = torch.eye(U.shape[-1], dtype=Û.dtype, device=U.device) - Û.mT @ Û
        return (gap.square() if squared else torch.linalg.matrix_norm(gap)).sum()
