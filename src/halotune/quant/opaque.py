"""Quantized linear layers that can only be called: GPTQ, AWQ, EETQ and others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import HalotuneError
from ..core.operator import WeightShape
from .base import Quantized


class Opaque(Quantized):
    """Any module that names its two sizes and holds packed numbers instead of a float weight.

    Its weight is never read: methods that need it, and merging, are refused.
    """

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        usual = (isinstance(weight, Tensor) and _is_float(weight)) or type(module).forward is nn.Linear.forward
        return _sizes(module) is not None and not usual and _packed(module) is not None

    @property
    def shape(self) -> WeightShape:  # type: ignore[override]
        n_in, n_out = _sizes(self.module) or (0, 0)
        return WeightShape(n_out, n_in)

    @property
    def quantization(self) -> str:
        return type(self.module).__module__.split(".")[0]

    @property
    def parameter(self) -> Any:
        return _packed(self.module)

    @property
    def dtype(self) -> torch.dtype:
        """That of its float tensors, such as scales and a bias."""
        return next((t.dtype for t in _own_tensors(self.module) if _is_float(t)), torch.get_default_dtype())

    @property
    def opaque(self) -> bool:
        return True

    def weight(self) -> Tensor:
        raise HalotuneError(
            f"{self} can be called, but its weight cannot be read. Load the base in floats, or with a quantization that can be "
            "read: bitsandbytes, torchao, HQQ."
        )


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """in, out."""
    for names in (("in_features", "out_features"), ("infeatures", "outfeatures")):  # the second are auto-gptq's
        n_in, n_out = (getattr(module, n, None) for n in names)
        if isinstance(n_in, int) and isinstance(n_out, int):
            return n_in, n_out
    return None


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]


def _is_float(t: Tensor) -> bool:
    return t.is_floating_point() and t.dtype.itemsize > 1


def _packed(module: nn.Module) -> Tensor | None:
    """The largest of its own tensors that hold no usual floats."""
    return max((t for t in _own_tensors(module) if not _is_float(t)), key=Tensor.numel, default=None)
