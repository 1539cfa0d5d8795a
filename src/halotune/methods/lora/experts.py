"""LoRA on fused experts as PEFT's files hold it: two matrices for all experts of a weight.

    lora_A.weight (E·r, in)     row e·r + j is row j of A_e
    lora_B.weight (out, r·E)    column j·E + e is column j of B_e

PEFT up to 0.18 took the first of the two sizes of each expert's weight, as it is stored, for the inputs. For weights stored
`(E, out, in)` its A acts on the outputs and its B on the inputs; for those stored `(E, in, out)` nothing differs.
"""

from __future__ import annotations

from torch import Tensor

from ...core.errors import HalotuneError
from ...core.operator import WeightShape
from ..registry import ExpertsForm

FIRST = (0, 19)  # of PEFT's versions, whose A acts on the inputs wherever they are
NAMES = ("lora_A.weight", "lora_B.weight")


def write(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """From `A (E, r, in)`, `B (E, out, r)`."""
    return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)


def read(
    A: Tensor, B: Tensor, experts: int, shape: WeightShape, transposed: bool, version: str | None
) -> tuple[Tensor, Tensor]:
    """`A (E, r, in)`, `B (E, out, r)`.

    Args:
        transposed: the weights are stored `(E, in, out)`.
        version: PEFT's, which wrote them; None is unknown.

    Raises:
        HalotuneError: sizes of no weight of this shape, or of both forms.
    """
    sizes, here = (A.shape[-1], B.shape[0]), (shape.in_features, shape.out_features)
    fits = A.dim() == B.dim() == 2 and A.shape[0] == B.shape[1] and A.shape[0] % experts == 0
    if not fits or sizes not in (here, here[::-1]):
        raise HalotuneError(
            f"expected lora_A ({experts}·r, {here[0]}) and lora_B ({here[1]}, r·{experts}); found {tuple(A.shape)} and "
            f"{tuple(B.shape)}"
        )
    swapped = not transposed and (sizes != here or (here[0] == here[1] and _is_old(version, shape)))
    if transposed and sizes != here:
        raise HalotuneError(
            f"expected lora_A (…, {here[0]}) and lora_B ({here[1]}, …); found {tuple(A.shape)}, {tuple(B.shape)}"
        )
    first = A.unflatten(0, (experts, -1))  # (E, r, ·)
    last = B.unflatten(1, (-1, experts)).permute(2, 0, 1)  # (E, ·, r)
    return (last.mT, first.mT) if swapped else (first, last)


def _is_old(version: str | None, shape: WeightShape) -> bool:
    if version is None:
        raise HalotuneError(
            f"the weights are square, {shape}, and adapter_config.json does not say which version of PEFT wrote the file: up "
            "to 0.18 lora_A acts on the outputs of such weights, later on their inputs. Write the version into its entry "
            '"peft_version"'
        )
    major, minor, *_ = (int("".join(c for c in part if c.isdigit()) or 0) for part in f"{version}.0".split("."))
    return (major, minor) < FIRST


FORM = ExpertsForm(NAMES, write, read, version="0.19.0")
