"""Rounding that is right on average.

A fine-tuning changes a weight by 1e-3 to 1e-2 of itself, half a unit of bf16 is 2e-3 of it: rounded to nearest, most of it is
lost. Where W' is stored in half precision in training, it is rounded up or down by chance, so that its mean is W'.

The chances are `u_ij = a_i ⊕ b_j` with the bits of a and b drawn uniformly: uniform each, and independent in pairs, so that any
sum of rounding errors has the variance of independent ones, for `out + in` random numbers instead of `out · in`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DROPPED = {torch.bfloat16: 16, torch.float16: 13}  # bits that fp32 has more


def draw_noise(like: Tensor, seed: int | None = None) -> Tensor:
    """a and b for a weight `(…, out, in)`, as `(…, out + in)` int16, from torch's generator; or from one of this seed."""
    generator = None if seed is None or like.is_meta else torch.Generator(like.device).manual_seed(seed)
    size = *like.shape[:-2], sum(like.shape[-2:])
    return torch.randint(-(1 << 15), 1 << 15, size, dtype=torch.int16, device=like.device, generator=generator)


def round_stochastically(y: Tensor, noise: Tensor, dtype: torch.dtype) -> Tensor:
    """`y (…, out, in)` in fp32, in `dtype`: up or down with the chances that make its mean y."""
    k = DROPPED[dtype]
    n_out = y.shape[-2]
    noise = noise.int() & ((1 << k) - 1)
    u = noise[..., :n_out, None] ^ noise[..., None, n_out:]
    bits = y.contiguous().view(torch.int32).clamp(max=0x7FFF0000)  # a NaN of all bits would become a zero
    return bits.add_(u).bitwise_and_(-(1 << k)).view(torch.float32).to(dtype)


def rounded(define: Callable[..., Tensor], noise: Tensor | None, W: Tensor, *factors: Tensor) -> Tensor:
    """`define(W, *factors)` in the dtype of W: computed in fp32 and rounded by the noise; without one as it is defined."""
    if noise is None:
        return define(W, *factors)
    with torch.autocast("cpu" if W.is_meta else W.device.type, enabled=False):  # which would multiply in half precision
        return round_stochastically(define(W.float(), *(t.float() for t in factors)), noise, W.dtype)


class Dither:
    """The noises by which one preparation is rounded: each is drawn once, and the same where it is repeated.

    Args:
        seed: of the noises; None draws them from torch's generator.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed
        self.drawn: dict[int, Tensor] = {}

    def noise(self, i: int, like: Tensor) -> Tensor:
        """The i-th, 0 being that of W'."""
        if i not in self.drawn:
            self.drawn[i] = draw_noise(like, None if self.seed is None else self.seed + i)
        return self.drawn[i]

    def round(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Factors in this dtype by chance, so that their small changes are not lost either."""
        return tuple([round_stochastically(t.float(), self.noise(i, t), dtype) for i, t in enumerate(tensors, 1)])
