"""The mathematics of LoHa: `ΔW = s (A1 B1) ∘ (A2 B2)`, `A (out, r)`, `B (r, in)`, and its exact low-rank factors."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...core.prepared import exact, exact_dtype
from ...ops.dispatch import Kernel, Op, is_half_on_gpu
from ...ops.rounding import rounded


def add_hadamard(W: Tensor, A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor, s: float) -> Tensor:
    """The definition: `W + s (A1 B1) ∘ (A2 B2)` `(out, in)`. Products run in the dtype of W, the sum rounds once."""
    with exact(W):
        A1, B1, A2, B2 = (t.to(W.dtype) for t in (A1, B1, A2, B2))
        return torch.addcmul(W, A1 @ B1, A2 @ B2, value=s)


def decomposed_hadamard(
    W: Tensor, A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor, m: Tensor, s: float, channels: int, on_out: bool
) -> Tensor:
    """`m ∘ V / (‖V‖ + ε)`, `V = W + s (A1 B1) ∘ (A2 B2)` `(out, in)`: every row of V, or every input channel, takes length m.

    Args:
        m: as many numbers as V has rows, or channels.
        channels: of the input (of one group of it); a convolution's `in` is `channels · k…`.
        on_out: the lengths are those of rows.
    """
    V = add_hadamard(W, A1, B1, A2, B2, s).unflatten(-1, (channels, W.shape[-1] // channels))
    norm = torch.linalg.vector_norm(V, dim=(-2, -1) if on_out else (-3, -1), keepdim=True, dtype=exact_dtype(V.dtype))
    factor = m.reshape(norm.shape) / (norm + torch.finfo(norm.dtype).eps)
    return (V * factor.to(V.dtype)).flatten(-2)


def _build(W: Tensor, A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor, s: float, noise: Tensor | None) -> Tensor:
    return rounded(partial(add_hadamard, s=s), noise, W, A1, B1, A2, B2)


def _pull(G: Tensor, A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor, s: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dM1, dM2 = (A2 @ B2).mul_(G), (A1 @ B1).mul_(G)
    return (dM1 @ B1.mT).mul_(s), (A1.mT @ dM1).mul_(s), (dM2 @ B2.mT).mul_(s), (A2.mT @ dM2).mul_(s)


def _kernel_refuses(W: Tensor, A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor, s: float, noise: Any = None) -> str | None:
    if len({t.dtype for t in (W, A1, B1, A2, B2)}) > 1:
        return f"the tensors differ in dtype: W is {W.dtype}, the factors are {A1.dtype}"
    if A1.stride() != A2.stride() or B1.stride() != B2.stride():
        return "the two halves are not laid out alike"
    if A1.shape[-1] > 128:
        return f"r = {A1.shape[-1]} is above 128: the factors' tiles no longer fit on the chip"
    return None


_KERNELS = "halotune.methods.loha.kernels"

# `add_hadamard` without gradients, W `(…, out, in)`: one pass over W, on an H100 25 µs against 50 for 3072 x 3072 in bf16.
build = Op(
    "build_loha",
    _build,
    repeats=True,
    like=lambda W, *_: W.new_empty(W.shape),
    kernel=Kernel(_KERNELS, "hadamard", _kernel_refuses, is_half_on_gpu),
)

# From `G = dL/dW'` the gradients of A1, B1, A2, B2: with `M_i = A_i B_i`, `dM1 = s G ∘ M2` and so on. No M is written.
pull = Op(
    "pull_loha",
    _pull,
    like=lambda G, *factors: tuple(t.new_empty(t.shape) for t in factors[:4]),
    kernel=Kernel(_KERNELS, "pull", _kernel_refuses, is_half_on_gpu),
)


def khatri_rao(A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """`B (out, r²)` and `A (r², in)` with `B A == s (A1 B1) ∘ (A2 B2)`.

    Column (p, q) of B is `s A1[:, p] ∘ A2[:, q]`, row (p, q) of A is `B1[p] ∘ B2[q]`.
    """
    B = (s * A1.unsqueeze(-1) * A2.unsqueeze(-2)).flatten(-2)
    A = (B1.unsqueeze(-2) * B2.unsqueeze(-3)).flatten(-3, -2)
    return B, A


def tucker_rows(t: Tensor, b: Tensor, kernel_dims: int) -> Tensor:
    """`Σ_j t[i, j] b[j]`: core `(r, r, k…)`, `b (r, channels)` -> `(r, channels·k)`: a Tucker half as a flat one's B."""
    with exact(t):
        t = t.flatten(-max(kernel_dims, 2))  # (…, i, j, k); a Conv1d's core is stored (r, r, k, 1)
        return torch.einsum("...ijk,...jc->...ick", t, b).flatten(-2)


def low_rank_is_cheaper(tokens: int, n_out: int, n_in: int, r: int) -> bool:
    """Whether the low-rank factors of rank r² cost less than building `W + ΔW`, forward and backward together.

    In units of `2 n_out n_in` operations the low-rank products cost `3 tokens r² (1/n_out + 1/n_in)`; the dense form costs
    `tokens` for `dyᵀ x`, and `8 r` for building ΔW twice and for the gradients of its four factors.
    """
    return 3 * tokens * r * r * (n_out + n_in) < n_out * n_in * (tokens + 8 * r)
