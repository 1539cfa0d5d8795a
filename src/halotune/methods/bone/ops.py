"""The mathematics of Bone and BAT (DiSHA / MiSS, arXiv 2409.15371)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.precision import exact


def fold(x: Tensor, r: int) -> Tensor:
    """Cut the last dimension into pieces of length r (the last one padded with zeros) and add them: `(…, in) -> (…, r)`."""
    n = x.shape[-1]
    if n % r:
        x = F.pad(x, (0, -n % r))
    return x.unflatten(-1, (-1, r)).sum(-2)


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
        rows = W.reshape(n, r, -1, r).transpose(1, 2)  # (i, j, r, r)
        return (rows + rows @ B.unsqueeze(1) + B.unsqueeze(1)).transpose(1, 2).reshape(W.shape)
