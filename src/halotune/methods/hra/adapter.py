"""HRA on one layer."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from ...core.config import AdapterConfig
from ...core.errors import HalotuneError
from ...core.kinds import Rotation
from ...core.operator import Operator, WeightShape, add_to
from ...core.prepared import Tensors
from ...core.sharded_parameters import whole
from ...ops.build import build_low_rank, wide_product
from . import ops
from .config import HRAConfig


class HRA(Rotation):
    """`W' = W Q`, `Q = H_1 … H_r = I − Û T Ûᵀ`; `hra_u` U: `(in, r)`.

    Forward costs two low-rank products, `x' = x − (x Û)(Tᵀ Ûᵀ)`, and leaves the base untouched. No gradient depends on the
    length of a column, so give `hra_u` no weight decay.

    Source: arXiv 2405.17484; the form is derived in README.md beside this file.
    """

    scale_free = ("hra_u",)
    axes = (("in", -1), ("in", -1))

    def __init__(self, shape: WeightShape, r: int, gram_schmidt: bool = False) -> None:
        super().__init__(shape)
        self.gram_schmidt = gram_schmidt
        self.hra_u = nn.Parameter(torch.empty(shape.in_features, r))

    @classmethod
    def create(cls, shape: WeightShape, config: AdapterConfig) -> Self:
        assert isinstance(config, HRAConfig)
        if config.apply_GS and config.r > shape.in_features:
            raise HalotuneError(
                f"HRA: apply_GS needs r orthonormal vectors, at most {shape.in_features} for a weight of {shape}; "
                f"got r={config.r}. Use a smaller r, or a rank_pattern for this module."
            )
        adapter = cls(shape, config.r, config.apply_GS)
        if config.orthogonality_weight:
            adapter.penalized = config.orthogonality_weight, config.orthogonality_norm == "squared"
        adapter.reset(config.init_weights)
        return adapter

    @torch.no_grad()
    def reset(self, identity: bool) -> None:
        """Draw the vectors: in adjacent equal pairs, which cancel, where the identity is possible."""
        n, r = self.hra_u.shape
        nn.init.kaiming_uniform_(self.hra_u, a=math.sqrt(5))
        if not identity or self.hra_u.is_meta:
            return
        if self.gram_schmidt:
            Q, _ = torch.linalg.qr(torch.randn(n, r, device=self.hra_u.device))
            self.hra_u.copy_(Q)
        elif r % 2 == 0:
            self.hra_u[:, 1::2] = self.hra_u[:, ::2]

    def loading_warning(self, *parameters: Tensor) -> str | None:
        if self.gram_schmidt and not parameters[0].is_meta:
            if bool((torch.linalg.matrix_rank(ops.normalize(whole(parameters[0])), atol=1e-3) < self.rank).any()):
                return (
                    "the vectors are linearly dependent, as peft's own start under apply_GS leaves them; dependent "
                    "ones count as no reflection here, so outputs differ from peft's, which are rounding noise"
                )
        return None

    def batch_key(self) -> Hashable:
        return self.gram_schmidt

    def prepare(self, *parameters: Tensor) -> Tensors:
        """`Ûᵀ (…, r, in)` and `N = −Tᵀ Ûᵀ (…, r, in)`."""
        return ops.wy_factors(parameters[0], self.gram_schmidt)

    def low_rank(self, W: Tensor, *factors: Tensor) -> tuple[Tensor, Tensor]:
        """`B (…, out, r)`, `A (…, r, in)` with `W Q − W == B A`."""
        Ût, N = factors
        return self.total("in", W @ N.mT.to(W.dtype)), Ût

    def adapt(self, W: Tensor, *factors: Tensor) -> Tensor:
        B, A = self.low_rank(W, *(t.to(W.dtype) for t in factors))
        return W + B @ A

    def build(self, W: Tensor, *factors: Tensor, noise: Tensor | None = None, again: bool = False) -> Tensor:
        Ût, N = factors
        return build_low_rank(W, self.total("in", wide_product(W, N.mT)), Ût, noise)

    def pull(self, G: Tensor, W: Tensor, *factors: Tensor) -> tuple[Tensor, Tensor]:
        Ût, N = factors
        dB = self.total("in", G @ Ût.mT)
        return self.total("in", W @ N.mT).mT @ G, dB.mT @ W

    def factors(self, W: Tensor) -> tuple[Tensor, Tensor]:
        return self.low_rank(W, *self.factors_now())

    def rotate(self, x: Tensor, *factors: Tensor) -> Tensor:
        Ût, N = factors
        return add_to(x, self.total("in", x @ Ût.mT), N)

    def rotate_groups(self, x: Tensor, groups: Any, *factors: Tensor) -> Tensor:
        Ût, N = factors
        return groups.add_low_rank(x, x, N.mT, Ût)

    def replaces_weight(self, op: Operator) -> bool:
        return False

    def run_on_patches(self, x: Tensor, op: Operator, factors: Tensors, scale: float) -> Tensor:
        y = op(x)  # first: a weight that is computed in a call is fresh after it
        B, A = self.low_rank(op.weight().to(x.device), *factors)  # offloaded weights may be elsewhere
        return op.bare.add_low_rank(y, x, B.to(x.dtype) * scale, A.to(x.dtype))

    def run_plain(self, x: Tensor, W: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
        if self.whole is not None and self.whole_shape.in_features > W.shape[1]:  # x Û is summed over processes
            return F.linear(self.rotate(x, *factors), W, bias)
        return ops.reflected_linear(x, W, bias, *factors)

    @property
    def rank(self) -> int:
        return self.hra_u.shape[1]

    @classmethod
    def combined(cls, adapters: Sequence[Any], weights: Sequence[float], how: str, rank: int) -> Self | None:
        """Chains of weight 1, one after the other, are one chain; zero columns reflect nothing."""
        if how != "cat" or any(w != 1 for w in weights):
            return None
        U = torch.cat([a.as_chain() for a in adapters], dim=1)
        out = cls(adapters[0].shape, rank)
        out.hra_u = nn.Parameter(nn.functional.pad(U, (0, rank - U.shape[1])))
        return out

    def as_chain(self) -> Tensor:
        """Vectors `(in, r)` whose reflections in order give Q: under Gram–Schmidt, an orthonormal basis of their span."""
        if not self.gram_schmidt:
            return self.hra_u.detach()
        basis, values, _ = torch.linalg.svd(ops.normalize(self.hra_u.detach()), full_matrices=False)
        return basis * (values.square() > ops.rank_tolerance(basis))

    def penalty(self, *parameters: Tensor) -> Tensor:
        weight, squared = self.penalized  # type: ignore[misc]
        return weight * ops.orthogonality(parameters[0], squared)
