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

from ...core.prepared import exact, exact_dtype, is_transformed
from ...ops.dispatch import Kernel, Op
from ...ops.product import MOST, add_product, apply, flattened, no_view, transposed_products


def lengths(U: Tensor) -> Tensor:
    """`‖u_i‖ (…, 1, r)`; infinite of a zero column, which then stays zero where it is divided by that."""
    norm = torch.linalg.vector_norm(U, dim=-2, keepdim=True)
    return torch.where(norm > torch.finfo(U.dtype).tiny, norm, math.inf)


def normalize(U: Tensor) -> Tensor:
    """`û_i = u_i / ‖u_i‖` for each column, in fp32 or better; a zero column stays zero and gets no gradient."""
    U = U.to(exact_dtype(U.dtype))
    return U / lengths(U)


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


def _factors(U: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`Ûᵀ (…, r, in)`, `N = −Tᵀ Ûᵀ (…, r, in)`, G `(…, r, r)` and the scales `1 / ‖u_i‖ (…, r)`, 0 of a zero column."""
    U = U.to(exact_dtype(U.dtype))
    with exact(U):
        scale = lengths(U).reciprocal()
        Ût = (U * scale).mT
        G = Ût @ Ût.mT
        # T⁻ᵀ = (stril(2 G) + I) / 2, of which the solver reads 2 G below the diagonal alone
        N = torch.linalg.solve_triangular(2 * G, -2 * Ût, upper=False, unitriangular=True)
        return Ût, N, G, scale.squeeze(-2)


def _pull_factors(Ut: Tensor, N: Tensor, G: Tensor, scale: Tensor, dUt: Tensor, dN: Tensor) -> Tensor:
    """`dU (…, in, r)` from the gradients of Ûᵀ, here Ut, and of N.

    With `A = I + 2 stril(G)`, `P = A⁻ᵀ dN` and `S = −2 stril(P Nᵀ)`, L depends on Ûᵀ by `dÛᵀ − 2 P + (S + Sᵀ) Ûᵀ`; what of it
    lies along a vector does not turn that.
    """
    with exact(N):
        P = torch.linalg.solve_triangular((2 * G).mT, dN, upper=True, unitriangular=True)
        S = -2 * (P @ N.mT).tril(-1)
        d = dUt - 2 * P + (S + S.mT) @ Ut
        return ((d - Ut * (d * Ut).sum(-1, keepdim=True)) * scale.unsqueeze(-1)).mT


def _like(U: Tensor) -> tuple[Tensor, ...]:
    *lead, n, r = U.shape
    shapes = (r, n), (r, n), (r, r), (r,)
    return tuple([U.new_empty(*lead, *shape, dtype=exact_dtype(U.dtype)) for shape in shapes])


def _refuses(r: int) -> str | None:
    return f"r = {r} is above {MOST}: rows of N are solved for one after the other" if r > MOST else None


def _wins(t: Tensor, *_: object) -> bool:
    return t.is_cuda


_KERNELS = "halotune.methods.hra.kernels"

# Two launches each, where plain torch takes nine and a dozen, and as many again where autograd takes the gradient.
factors = Op(
    "hra_factors",
    _factors,
    like=_like,
    kernel=Kernel(_KERNELS, "factors", lambda U: _refuses(U.shape[-1]), _wins),
)
pull_factors = Op(
    "hra_pull_factors",
    _pull_factors,
    like=lambda Ût, *_: Ût.new_empty(Ût.mT.shape),
    kernel=Kernel(_KERNELS, "pull_factors", lambda Ût, *_: _refuses(Ût.shape[-2]), _wins),
)


class _Factors(torch.autograd.Function):
    """Ûᵀ and N of U. Where a second derivative is recorded, backward is plain torch."""

    @staticmethod
    def forward(ctx: Any, U: Tensor) -> tuple[Tensor, Tensor]:
        Ût, N, *others = factors(U)
        ctx.save_for_backward(U, Ût, N, *others)
        return Ût, N

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        U, *made = ctx.saved_tensors
        if torch.is_grad_enabled():
            return torch.autograd.grad(_factors(U)[:2], U, grad_outputs, create_graph=True)[0]
        return pull_factors(*made, *grad_outputs).to(U.dtype)


def wy_factors(U: Tensor, gram_schmidt: bool) -> tuple[Tensor, Tensor]:
    """`Ûᵀ` and `N = −Tᵀ Ûᵀ (…, r, in)`, in fp32 or better: `x Qᵀ = x + (x Û) N` and `W Q = W + (W Nᵀ) Ûᵀ`."""
    if gram_schmidt:
        with exact(U):
            Û = normalize(U)
            return Û.mT, -(span_core(Û).mT @ Û.mT)
    if torch.compiler.is_compiling() or is_transformed():
        return _factors(U)[:2]
    return apply(_Factors, U) if torch.is_grad_enabled() and U.requires_grad else factors(U)[:2]


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
