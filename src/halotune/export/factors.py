"""Low-rank factors `ΔW = B A`, `B (out, k)`, `A (k, in)`: found, truncated to a rank, and laid out as tensors of a file.

Everything here is float64 up to the last rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.adapter import Adapter
from ..core.errors import HalotuneError
from ..core.generators import forked_generators
from ..core.layer import AdaptedLayer
from ..core.operator import WeightShape
from ..core.sharded_parameters import copied

EXACT, TRUNCATED, SKETCHED = "exact", "SVD of the factors", "randomised SVD"


@dataclass(frozen=True)
class Factors:
    """`ΔW ≈ B A`.

    Attributes:
        error: `‖ΔW − B A‖ / ‖ΔW‖`, in the Frobenius norm.
        how: `EXACT`, `TRUNCATED` or `SKETCHED`.
    """

    B: Tensor
    A: Tensor
    error: float = 0.0
    how: str = EXACT

    @property
    def rank(self) -> int:
        return self.A.shape[0]


@torch.no_grad()
def factors_of(layer: AdaptedLayer, names: Sequence[str], rank: int | None) -> list[Factors]:
    """The factors of what these adapters, applied in this order, add to the layer's weight; of at most this rank.

    Each is `W + s (F(W) − W)`, so a second one sees the weight that the first one made.

    Returns:
        one; where the layer holds several experts, one of each.

    Raises:
        HalotuneError: a delta of full rank without a rank to truncate it to, or composed with others.
    """
    layer.base.require_known(type(layer.base_layer).__name__, [layer.adapters[n] for n in names])  # type: ignore[misc]
    W, adapters = _work(layer.base.weight()), [_exact_copy(layer.adapters[n]) for n in names]  # type: ignore[arg-type]
    scales = [layer.scales[n] for n in names]
    if W.dim() == 2:
        return [_factors(W, adapters, scales, rank)]
    each = zip(*(a.each() for a in adapters), strict=True)  # type: ignore[attr-defined]
    return [_factors(W[e], own, scales, rank) for e, own in enumerate(each)]


def _factors(W: Tensor, adapters: Sequence[Adapter], scales: Sequence[float], rank: int | None) -> Factors:
    full = next((type(a).__name__ for a in adapters if not a.factors_exist), None)
    if full is None:
        return truncated(*_composed(W.double(), adapters, scales), rank)
    if len(adapters) > 1:
        raise HalotuneError(f"the delta of {full} has full rank, and is sketched alone only. Export one adapter at a time.")
    if rank is None:
        raise HalotuneError(
            f"the delta of {full} has full rank, so no LoRA equals it. Give a rank: the best approximation of that rank is "
            "exported, and its error reported; or merge the adapter into the weights."
        )
    W = W.double()
    found = sketched(adapters[0].weight(W) - W, rank)
    return Factors(scales[0] * found.B, found.A, found.error, found.how)


def _work(t: Tensor) -> Tensor:
    return t.detach().cpu() if t.device.type == "mps" else t.detach()  # Apple's GPUs have no float64


def _exact_copy(adapter: Adapter) -> Adapter:
    device = next(adapter.parameters()).device
    return copied(adapter).to("cpu" if device.type == "mps" else device, torch.float64)


def _composed(W: Tensor, adapters: Sequence[Adapter], scales: Sequence[float]) -> tuple[Tensor, Tensor]:
    Bs, As = [], []
    for i, (adapter, scale) in enumerate(zip(adapters, scales, strict=True)):
        found = adapter.factors(W)
        assert found is not None
        B, A = scale * found[0], found[1]
        Bs.append(B)
        As.append(A)
        if i + 1 < len(adapters):
            W = W + B @ A
    return torch.cat(Bs, 1), torch.cat(As)


def truncated(B: Tensor, A: Tensor, rank: int | None = None) -> Factors:
    """The best factors of at most `rank`, by QR of both and the SVD of a k×k matrix: `B A` is never formed.

    More columns than `B A` has rows or columns are never needed, so truncating to those loses nothing.
    """
    most = min(B.shape[0], A.shape[1])
    keep = most if rank is None else min(rank, most)
    if A.shape[0] <= keep:
        return Factors(B, A)
    QB, RB = torch.linalg.qr(B)
    QA, RA = torch.linalg.qr(A.mT)
    U, s, Vh = torch.linalg.svd(RB @ RA.mT)
    half = s[:keep].sqrt()
    rest, total = float(s[keep:].norm()), float(s.norm())
    B, A = QB @ (U[:, :keep] * half), (half[:, None] * Vh[:keep]) @ QA.mT
    return Factors(B, A) if keep == most else Factors(B, A, rest / total if total else 0.0, TRUNCATED)


OVERSAMPLING, PASSES = 16, 4


def sketched(delta: Tensor, rank: int) -> Factors:
    """Nearly the best factors of at most `rank` of a delta `(out, in)`, by subspace iteration from a fixed seed.

    The error reported is that of these factors exactly, since `B A` is a projection of Δ: `‖Δ − B A‖² = ‖Δ‖² − ‖B A‖²`.
    """
    with forked_generators(delta.device):
        torch.manual_seed(0)
        U, s, V = torch.svd_lowrank(delta, min(rank + OVERSAMPLING, *delta.shape), niter=PASSES)
    U, s, V = U[:, :rank], s[:rank], V[:, :rank]
    half, total = s.sqrt(), float(delta.square().sum())
    rest = max(total - float(s.square().sum()), 0.0)
    return Factors(U * half, half[:, None] * V.mT, (rest / total) ** 0.5 if total else 0.0, SKETCHED)


def laid_out(found: Factors, shape: WeightShape, rank: int, blocks: bool) -> tuple[Tensor, Tensor]:
    """`lora_A` and `lora_B` of a file, filled up with zeros to `rank`.

    | layer | lora_A | lora_B |
    |---|---|---|
    | linear | `(rank, in)` | `(out, rank)` |
    | convolution | `(rank, C / groups, k…)` | `(out, rank, 1…)` |
    | grouped, in blocks | `(rank, C, k…)`, block-diagonal over the groups | `(out, rank / groups, 1…)` |

    The blocks are peft's form: its A is a convolution over all channels, its B a grouped one.
    """
    groups = shape.groups if blocks else 1
    own = rank // groups
    A = F.pad(found.A, (0, 0, 0, own - found.rank))
    B = F.pad(found.B, (0, own - found.rank))
    if shape.is_linear:
        return A, B
    A = A.reshape(own, shape.in_channels, *shape.kernel)
    if groups > 1:
        diagonal = A.new_zeros(groups, own, groups, *A.shape[1:])
        each = torch.arange(groups, device=A.device)
        diagonal[each, :, each] = A
        A = diagonal.reshape(rank, groups * shape.in_channels, *shape.kernel)
    return A, B.reshape(*B.shape, *[1] * len(shape.kernel))
