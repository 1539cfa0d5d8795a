"""The mathematics of Bone and BAT (DiSHA / MiSS, arXiv 2409.15371)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.fused import Down, Rule
from ...core.precision import exact


def fold(x: Tensor, r: int) -> Tensor:
    """Cut the last dimension into pieces of length r (the last one padded with zeros) and add them: `(…, in) -> (…, r)`."""
    n = x.shape[-1]
    if n % r:
        x = F.pad(x, (0, -n % r))
    return x.unflatten(-1, (-1, r)).sum(-2)


class FoldDown(Down):
    """`z = fold(x)`; its transpose adds z to every piece of x."""

    def __init__(self, r: int) -> None:
        self.r = r

    def forward(self, x: Tensor, *θ: Tensor) -> Tensor:
        return fold(x, self.r)

    def backward(self, dx: Tensor | None, dz: Tensor, x: Tensor, *θ: Tensor) -> tuple[Tensor, ...]:
        if dx is not None:
            whole = dx.shape[-1] // self.r * self.r
            dx[:, :whole].unflatten(-1, (-1, self.r)).add_(dz.unsqueeze(-2))
            dx[:, whole:].add_(dz[:, : dx.shape[-1] - whole])
        return ()


def unfolding(r: int, n_in: int, like: Tensor) -> Tensor:
    """`[I I …] (r, in)`: the matrix of `fold`, so that `fold(x) == x @ unfolding.T`."""
    eye = torch.eye(r, dtype=like.dtype, device=like.device)
    return eye.repeat(1, -(-n_in // r))[:, :n_in]


def bat(W: Tensor, blocks: Tensor) -> Tensor:
    """The definition of BAT: `W'_ij = W_ij + W_ij B_i + B_i`, W cut into r×r blocks, i the output block.

    Shapes: W `(out, in)`, blocks `(out/r, r, r)`, both out and in multiples of r. In the dtype of W.
    """
    n, r, _ = blocks.shape
    B = blocks.to(W.dtype)
    with exact(W):
        stacked = W.reshape(n, -1, r)  # the blocks of one row of blocks, interleaved: (i, row and j, column)
        product = torch.baddbmm(stacked, stacked, B)
        return (product.view(n, r, -1, r) + B.unsqueeze(2)).view(W.shape)


class BatRule(Rule):
    """`bat` and its gradient `dB_i = Σ_j (W_ijᵀ G_ij + G_ij)`."""

    def build(self, W: Tensor, *θ: Tensor) -> Tensor:
        return bat(W, θ[0])

    def rebuild(self, W: Tensor, *θ: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
        n, r, _ = θ[0].shape

        def pull(G: Tensor) -> tuple[Tensor, ...]:
            stacked = G.view(n, -1, r)
            dB = torch.bmm(W.reshape(n, -1, r).mT, stacked)
            return (dB + G.view(n, r, -1, r).sum(2),)

        return bat(W, θ[0]), pull
