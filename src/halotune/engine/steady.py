"""Whether a model's layers are what they were in its last forward pass.

Asking every layer would take longer than running it, where a pass is one token. So everything that decides how layers run,
but for the numbers of parameters, is read in a few sweeps over all of them, and compared with what was read before.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

from torch import Tensor

from ..core.base import is_bare
from ..core.layer import AdaptedLayer


class Look:
    """What was seen of the layers: `values`, compared by value, and `tensors`, by identity."""

    __slots__ = ("tensors", "values")

    def __init__(self, values: list[Any], tensors: list[Tensor]) -> None:
        self.values, self.tensors = values, tensors

    def shows_the_same_as(self, other: Look) -> bool:
        alike = self.values == other.values and len(self.tensors) == len(other.tensors)
        return alike and all(map(is_, self.tensors, other.tensors))


class Steady:
    """Looks at layers; `Base.plain`, `AdaptedLayer.running` and `may_be_plain` follow from what it sees."""

    def __init__(self, layers: Sequence[AdaptedLayer]) -> None:
        self.layers = layers
        self.own = [layer.__dict__ for layer in layers]

    def look(self, versions: bool = False) -> Look:
        """
        Args:
            versions: see writes to the base's weights, too.
        """
        modules = [d["_modules"] for d in self.own]
        bases = [m["base_layer"] for m in modules]
        tensors = [t for base in bases for t in base._parameters.values() if t is not None]
        values = [
            [
                (d["enabled"], d["rows"], *d["active_adapters"], None, *d["merged_adapters"], *d["scales"].values())
                for d in self.own
            ],
            [(a, a.training, a.may_be_plain()) for m in modules for a in m["adapters"]._modules.values()],
            [(base, base.__class__, is_bare(base)) for base in bases],
            [(t.requires_grad, t.dtype) for t in tensors],
            [0 if t.is_inference() else t._version for t in tensors] if versions else [],
        ]
        return Look(values, tensors)
