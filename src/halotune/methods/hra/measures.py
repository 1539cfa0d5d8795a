"""What `halotune inspect` shows of HRA: the rotation Q, from r×r matrices."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...core.operator import WeightShape
from ..measures import Column, Measures
from . import ops
from .adapter import HRA
from .config import HRAConfig


def angles(adapter: HRA) -> Tensor:
    """The angles `(min(r, in),)` by which Q turns, in degrees, ascending; those of all other directions are 0.

    Q is the identity beside span(Û). With P an orthonormal basis of the span, `Pᵀ Q P = I + (N P)ᵀ (Ûᵀ P)` is orthogonal and
    r×r. Its eigenvalues are `e^{±iθ}`: a pair is a plane that turns by θ, −1 (180°) a reflection.
    """
    Ût, N = ops.wy_factors(adapter.hra_u.detach().double(), adapter.gram_schmidt)
    P, _ = torch.linalg.qr(Ût.mT)
    core = torch.eye(P.shape[1], dtype=P.dtype, device=P.device) + (N @ P).mT @ (Ût @ P)
    eigenvalues = torch.linalg.eigvals(core)
    return torch.atan2(eigenvalues.imag.abs(), eigenvalues.real).rad2deg().sort().values


def shape(tensors: Mapping[str, Tensor], config: HRAConfig) -> WeightShape:
    return WeightShape(0, tensors["hra_u"].shape[0])


def measure(adapter: HRA) -> dict[str, float | list[float]]:
    degrees = angles(adapter)
    return {
        "largest_angle": float(degrees[-1]),
        "mean_angle": float(degrees.mean()),
        "rotation": float((2 - 2 * degrees.deg2rad().cos()).sum().sqrt()),  # each eigenvalue is |e^{iθ} − 1| away from 1
        "orthogonality_gap": float(ops.orthogonality(adapter.hra_u.detach().double(), squared=False)),
        "angles": degrees.tolist(),
    }


MEASURES = Measures(
    shape,
    measure,
    (
        Column("largest_angle", "max θ", "largest rotation angle of Q, degrees", ".1f"),
        Column("mean_angle", "mean θ", "mean rotation angle of Q in the span of its vectors, degrees", ".1f"),
        Column("rotation", "‖Q−I‖", "distance of Q from the identity, ‖Q − I‖"),
        Column("orthogonality_gap", "‖ÛᵀÛ−I‖", "distance of the vectors from orthonormal ones, ‖ÛᵀÛ − I‖"),
    ),
)
