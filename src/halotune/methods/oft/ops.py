"""The mathematics of OFT: rotations in blocks, by the Cayley transform of skew-symmetric matrices (README.md beside this)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.fused import flattened
from ...core.precision import exact, exact_dtype


def skew(θ: Tensor, b: int) -> Tensor:
    """`(…, b (b − 1) / 2) -> (…, b, b)`: θ row by row above the diagonal, −θ below; in fp32 or better."""
    θ = θ.to(exact_dtype(θ.dtype))
    rows, cols = torch.triu_indices(b, b, 1, device=θ.device)
    upper = θ.new_zeros(*θ.shape[:-1], b * b).index_copy(-1, rows * b + cols, θ).unflatten(-1, (b, b))
    return upper - upper.mT


def constrained(Q: Tensor, eps: float) -> Tensor:
    """Matrices `(…, blocks, b, b)`, those longer than `eps / √blocks` scaled to that length."""
    most = eps**2 / Q.shape[-3]
    return Q * (most / Q.square().sum((-2, -1), keepdim=True).clamp_min(most)).sqrt()


def cayley(Q: Tensor, terms: int) -> Tensor:
    """`N (…, b, b)` with `I + N = (I + Q)(I − Q)⁻¹`, or its series up to a power that `terms` says.

    Args:
        terms: 0 for the exact transform; as peft counts, `2Q + … + 2Qᵏ⁻¹ + Qᵏ` with k = max(terms − 1, 3), 2Q for 2, 0 for 1.
    """
    with exact(Q):
        eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
        if terms == 0:
            return torch.linalg.solve(eye - Q, 2 * Q)
        if terms < 3:
            return (terms - 1) * 2 * Q
        tail = Q
        for _ in range(max(terms - 1, 3) - 1):
            tail = Q @ (2 * eye + tail)
        return tail


def rotate(x: Tensor, N: Tensor, transpose: bool = False) -> Tensor:
    """`x R` over the last dimension, `R = diag(I + N_1, I + N_2, …)`, or `x Rᵀ`: `N (blocks, b, b)`, `x (…, blocks · b)`."""
    blocks = x.reshape(-1, *N.shape[:2]).transpose(0, 1)
    return torch.baddbmm(blocks, blocks, N.mT if transpose else N).transpose(0, 1).reshape(x.shape)


def pull(x: Tensor, d: Tensor, N: Tensor) -> tuple[Tensor, Tensor]:
    """From `d = dL/d(x R)` the gradients of x and N; rows `(n, blocks · b)`."""
    x_blocks, d_blocks = (t.reshape(-1, *N.shape[:2]).transpose(0, 1) for t in (x, d))
    return rotate(d, N, transpose=True), x_blocks.mT @ d_blocks


class _RotatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, N: Tensor) -> Tensor:
        ctx.save_for_backward(x, W, N)
        return F.linear(rotate(x, N), W, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, W, N = ctx.saved_tensors
        dx, dN = pull(flattened(x), flattened(grad_outputs[0]) @ W, N)
        return dx.view(x.shape), None, None, dN


def rotated_linear(x: Tensor, W: Tensor, bias: Tensor | None, N: Tensor) -> Tensor:
    """`(x R) Wᵀ + b`, W and b frozen: x, N and W are all that is kept for backward."""
    return _RotatedLinear.apply(x, W, bias, N)  # type: ignore[return-value]
