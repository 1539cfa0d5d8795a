"""The mathematics of OFT: rotations in blocks, by the Cayley transform of skew-symmetric matrices (README.md beside this)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.prepared import exact, exact_dtype, is_transformed
from ...ops.grouped import MOST_GROUPS, grouped_product
from ...ops.product import flattened, no_view


def skew(θ: Tensor, b: int, eps: float | None = None) -> Tensor:
    """`(…, blocks, b (b − 1) / 2) -> (…, blocks, b, b)`, in fp32 or better: θ row by row above the diagonal, −θ below.

    With `eps` those whose norm is above `eps / √blocks` are scaled to that norm.
    """
    θ = θ.to(exact_dtype(θ.dtype))
    rows, columns = torch.triu_indices(b, b, 1, device=θ.device)
    upper = θ.new_zeros(*θ.shape[:-1], b * b).index_copy(-1, rows * b + columns, θ).unflatten(-1, (b, b))
    Q = upper - upper.mT
    if eps is None:
        return Q
    most = eps**2 / θ.shape[-2]
    return Q * (most / Q.square().sum((-2, -1), keepdim=True).clamp_min(most)).sqrt()


def cayley(Q: Tensor, terms: int = 0) -> Tensor:
    """`(I + Q)(I − Q)⁻¹` `(…, b, b)`, orthogonal for a skew-symmetric Q; or, with `terms`, the start of its series.
    As peft counts: `I + 2Q + … + 2Qᵏ⁻¹ + Qᵏ` with k = max(terms − 1, 3) from 3 terms on, I + 2Q for 2, I for 1.
    """
    with exact(Q):
        eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
        if terms == 0:  # unchecked, as I − Q is invertible: a check would wait for the GPU
            return torch.linalg.solve_ex(eye - Q, eye + Q)[0]
        if terms < 3:
            return eye + 2 * (terms - 1) * Q
        tail = Q
        for _ in range(max(terms - 1, 3) - 1):
            tail = Q @ (2 * eye + tail)
        return eye + tail


def in_blocks(x: Tensor, b: int) -> Tensor:
    """`(…, n, blocks · b) -> (…, blocks, n, b)`, a view."""
    return x.unflatten(-1, (-1, b)).transpose(-3, -2)


def rotate(x: Tensor, R: Tensor) -> Tensor:
    """`x diag(R_1, R_2, …)`: `x (…, n, blocks · b)`, `R (…, blocks, b, b)`."""
    blocks, b = in_blocks(x, R.shape[-1]), R.shape[-1]
    if x.dim() > 2 or torch.is_grad_enabled() or torch.compiler.is_compiling() or is_transformed():
        return (blocks @ R).transpose(-3, -2).flatten(-2)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.bmm(blocks, R, out=in_blocks(y, b))  # no copy: on an H200 17 µs for 3072 rows of 3072 in bf16
    return y


def rotate_groups(x: Tensor, groups: Any, R: Tensor) -> Tensor:
    """`rotate` for rows sorted by expert, `R (experts, blocks, b, b)`: each block of each expert is a group of its own."""
    n, blocks, b = x.shape[0], R.shape[1], R.shape[-1]
    at_once = max(1, MOST_GROUPS // R.shape[0])
    rotated = []
    for some, matrices in zip(in_blocks(x, b).split(at_once), R.transpose(0, 1).split(at_once), strict=True):
        ends = torch.arange(some.shape[0], device=x.device, dtype=groups.ends.dtype)[:, None] * n + groups.ends
        y = grouped_product(some.reshape(-1, b), matrices.flatten(0, 1), ends.flatten(), groups.whole)
        rotated.append(y.view_as(some))
    y = rotated[0] if len(rotated) == 1 else torch.cat(rotated)
    return y.transpose(0, 1).reshape(n, blocks * b)


class RotatedLinear(torch.autograd.Function):
    """`(x R) Wᵀ + b` with W and b frozen. Inputs are all that is kept, so backward can be differentiated as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, R: Tensor) -> Tensor:
        ctx.save_for_backward(x, W, R)
        return no_view(F.linear(rotate(flattened(x), R).view_as(x), W, bias))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, W, R = ctx.saved_tensors
        with exact(x):  # the forward pass saw to autocast
            d = flattened(grad_outputs[0]) @ W  # of the rotated input
            dx = rotate(d, R.mT).view_as(x) if ctx.needs_input_grad[0] else None
            return dx, None, None, in_blocks(flattened(x), R.shape[-1]).mT @ in_blocks(d, R.shape[-1])
