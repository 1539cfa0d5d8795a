"""The mathematics of Bone and BAT (DiSHA / MiSS, arXiv 2409.15371)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.prepared import exact
from ...ops.dispatch import Kernel, Op, is_half_on_gpu
from ...ops.rounding import rounded


def unfolding(r: int, n_in: int, like: Tensor) -> Tensor:
    """`[I I …] (r, in)`: the matrix of `fold`, so that `fold(x) == x @ unfolding.T`."""
    eye = torch.eye(r, dtype=like.dtype, device=like.device)
    return eye.repeat(1, -(-n_in // r))[:, :n_in]


def bat(W: Tensor, blocks: Tensor) -> Tensor:
    """The definition of BAT: `W'_ij = W_ij + W_ij B_i + B_i`, W cut into r×r blocks, i the output block.

    Shapes: W `(…, out, in)`, blocks `(…, out/r, r, r)`, both out and in multiples of r. In the dtype of W.
    """
    *_, n, r, _ = blocks.shape
    B = blocks.to(W.dtype)
    with exact(W):
        n_in = W.shape[-1]
        stacked = W.reshape(W.shape[:-2].numel() * n, n_in, r)  # a row of blocks, interleaved: (i, row and j, column)
        B = B.flatten(0, -3)
        product = torch.baddbmm(stacked, stacked, B).view(-1, r, n_in // r, r)
        return (product + B.unsqueeze(2)).view(W.shape)


def side_by_side(r: int) -> int:
    """The columns of as many whole blocks as a row of the kernel's tiles holds: small ones fill up the 16 of a matrix unit."""
    return max(16 // r, 1) * r


def noise_of_blocks(noise: Tensor, n_in: int, r: int) -> Tensor:
    """The noise `(…, out + in)` by which BAT's kernel rounds: that of the c-th of the columns side by side in a tile is that of
    the first of them ⊕ that of column c, so that a tile needs few numbers of it. It is uniform and independent in pairs as
    before."""
    of_rows, of_columns = noise.split([noise.shape[-1] - n_in, n_in], -1)
    wide = side_by_side(r)
    place = torch.arange(n_in, device=noise.device) % wide
    of_places = torch.where(place > 0, of_columns[..., place], 0)
    of_tiles = of_columns[..., ::wide].repeat_interleave(wide, -1)[..., :n_in]
    return torch.cat([of_rows, of_tiles ^ of_places], -1)


def _build_bat(W: Tensor, blocks: Tensor, noise: Tensor | None) -> Tensor:
    return rounded(bat, None if noise is None else noise_of_blocks(noise, W.shape[-1], blocks.shape[-1]), W, blocks)


def _pull_bat(G: Tensor, W: Tensor, blocks: Tensor) -> Tensor:
    *_, r, _ = blocks.shape
    n = blocks.shape[:-2].numel()
    G = G.reshape(n, -1, r)
    return (torch.bmm(W.reshape(n, -1, r).mT, G) + G.view(n, r, -1, r).sum(2)).view(blocks.shape)


def _refuses(blocks: Tensor, *matrices: Tensor) -> str | None:
    for t in matrices:
        if t.dtype != blocks.dtype:
            return f"W and the blocks differ in dtype: {t.dtype}, {blocks.dtype}"
    if blocks.shape[-1] > 128:
        return f"r = {blocks.shape[-1]} is above 128: a block no longer fits on the chip"
    return None


_KERNELS = "halotune.methods.bone.kernels"

# `bat` without gradients, W `(…, out, in)`: one pass over W, on an H100 20 µs against 62 for 3072 x 3072 and r 64 in bf16.
build_bat = Op(
    "build_bat",
    _build_bat,
    repeats=True,
    like=lambda W, *_: W.new_empty(W.shape),
    kernel=Kernel(_KERNELS, "bat", lambda W, blocks, _: _refuses(blocks, W), lambda W, blocks, _: is_half_on_gpu(blocks)),
)

# From `G = dL/dW'` the gradient `dB_i = Σ_j (W_ijᵀ G_ij + G_ij)`: W and G read once, which takes 2 of the 40 ms that BAT adds
# to the kernels of a step of Llama-3.2-3B's shape on an H100.
pull_bat = Op(
    "pull_bat",
    _pull_bat,
    like=lambda G, W, blocks: blocks.new_empty(blocks.shape),
    kernel=Kernel(
        _KERNELS, "pull_bat", lambda G, W, blocks: _refuses(blocks, W, G), lambda G, W, blocks: is_half_on_gpu(blocks)
    ),
)
