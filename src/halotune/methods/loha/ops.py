"""The mathematics of LoHa: `ΔW = s (A1 B1) ∘ (A2 B2)`, `A (out, r)`, `B (r, in)`, and its exact thin factors."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.precision import exact


def add_hadamard(W: Tensor, A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor, s: float) -> Tensor:
    """The definition: `W + s (A1 B1) ∘ (A2 B2)` `(out, in)`. Products run in the dtype of W, the sum rounds once."""
    with exact(W):
        A1, B1, A2, B2 = (t.to(W.dtype) for t in (A1, B1, A2, B2))
        return torch.addcmul(W, A1 @ B1, A2 @ B2, value=s)


def khatri_rao(A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """`B (out, r²)` and `A (r², in)` with `B A == s (A1 B1) ∘ (A2 B2)`.

    Column (p, q) of B is `s A1[:, p] ∘ A2[:, q]`, row (p, q) of A is `B1[p] ∘ B2[q]`.
    """
    B = (s * A1.unsqueeze(-1) * A2.unsqueeze(-2)).flatten(-2)
    A = (B1.unsqueeze(-2) * B2.unsqueeze(-3)).flatten(-3, -2)
    return B, A


def tucker_rows(t: Tensor, b: Tensor) -> Tensor:
    """`Σ_j t[i, j] b[j]`: core `(r, r, k…)`, `b (r, channels)` -> `(r, channels·k)`: a Tucker half as a flat one's B."""
    with exact(t):
        return (b.mT @ t.flatten(2)).flatten(1)


def thin_is_cheaper(tokens: int, n_out: int, n_in: int, r: int) -> bool:
    """Whether the thin factors of rank r² cost less than building `W + ΔW`, forward and backward together.

    In units of `2 n_out n_in` operations the thin products cost `3 tokens r² (1/n_out + 1/n_in)`; the dense form costs
    `tokens` for `dyᵀ x`, and `8 r` for building ΔW twice and for the gradients of its four factors.
    """
    return 3 * tokens * r * r * (n_out + n_in) < n_out * n_in * (tokens + 8 * r)
