"""What the methods compute, as their papers write it: `W (out, in) -> W'`. Nothing here is halotune's.

The arguments are named as the tensors of PEFT's files. Speed is no aim: HRA reflects one vector at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def hra(W: Tensor, hra_u: Tensor) -> Tensor:
    """`W' = W H_1 … H_r`, `H_i = I − 2 û_i û_iᵀ`, `û_i = u_i / ‖u_i‖`; u_i is column i of `hra_u (in, r)`."""
    return reflected(W, [u / u.norm() for u in hra_u.unbind(1)])


def hra_gram_schmidt(W: Tensor, hra_u: Tensor) -> Tensor:
    """The same, with the columns made orthonormal first."""
    basis: list[Tensor] = []
    for u in hra_u.unbind(1):
        for _ in range(2):  # the second time for rounding
            for q in basis:
                u = u - (u @ q) * q
        basis.append(u / u.norm())
    return reflected(W, basis)


def reflected(W: Tensor, units: list[Tensor]) -> Tensor:
    for u in units:
        W = W - 2 * torch.outer(W @ u, u)
    return W


def bone(W: Tensor, bone_block: Tensor) -> Tensor:
    """`W'[:, k] = W[:, k] + D[k mod r, :]ᵀ`; D is `bone_block (r, out)`."""
    return W + bone_block[torch.arange(W.shape[1]) % bone_block.shape[0]].t()


def bat(W: Tensor, bone_block: Tensor) -> Tensor:
    """`W'_ij = W_ij + W_ij B_i + B_i` over r×r blocks; `bone_block (out/r, r, r)` holds the B_i."""
    r = bone_block.shape[-1]
    rows = [
        torch.cat([W_ij + W_ij @ B_i + B_i for W_ij in W_i.split(r, dim=1)], dim=1)
        for W_i, B_i in zip(W.split(r), bone_block, strict=True)
    ]
    return torch.cat(rows)


@dataclass(frozen=True)
class LoHa:
    """`W' = W + s (A1 B1) ∘ (A2 B2)`, `s = alpha / r`."""

    scale: float

    def __call__(self, W: Tensor, hada_w1_a: Tensor, hada_w1_b: Tensor, hada_w2_a: Tensor, hada_w2_b: Tensor) -> Tensor:
        return W + self.scale * (hada_w1_a @ hada_w1_b) * (hada_w2_a @ hada_w2_b)


@dataclass(frozen=True)
class LoRA:
    """`W' = W + s B A`, `s = alpha / r`."""

    scale: float

    def __call__(self, W: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return W + self.scale * lora_B.flatten(1) @ lora_A.flatten(1)


def oft(W: Tensor, oft_R: Tensor) -> Tensor:
    """`W' = W diag(R_1, R_2, …)ᵀ`, `R_i = (I + Q_i)⁻¹ (I − Q_i)`: row i of `oft_R` is Q_i = −Q_iᵀ above its diagonal."""
    b = W.shape[1] // len(oft_R)
    I, above = torch.eye(b, dtype=oft_R.dtype, device=W.device), torch.triu_indices(b, b, 1).unbind()  # noqa: E741
    upper = [torch.zeros_like(I).index_put(above, θ) for θ in oft_R]
    return W @ torch.block_diag(*(torch.linalg.solve(I + U - U.t(), I - U + U.t()) for U in upper)).t()


Definition = Callable[..., Tensor]
LEAVES = ("oft_R", "hra_u", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "bone_block", "lora_A", "lora_B")
PEFTS_NAMES = {"miss_block": "bone_block"}  # peft calls Bone MiSS
