"""torchao: linear layers whose weight is one of its quantized tensors."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from .base import Readable, comes_from


class TorchAO(Readable):
    """`torch.nn.Linear` with a torchao tensor for its weight, which is the stored form."""

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and comes_from(module.weight, "torchao")

    @property
    def quantization(self) -> str:
        return f"torchao {type(self.parameter).__name__}"

    def weight(self) -> Tensor:
        W, scale = self.parameter.dequantize(), self._input_scale
        return W if scale is None else W * scale

    @property
    def _input_scale(self) -> Tensor | None:
        """What AWQ and SmoothQuant multiply the input by."""
        return getattr(self.parameter, "act_pre_scale", None)

    @property
    def can_write(self) -> bool:
        return type(self.parameter).__name__ in _AGAIN and self._input_scale is None

    def quantize(self, W: Tensor) -> Any:
        old = self.parameter
        new = _AGAIN[type(old).__name__](old, W.to(old.device, old.dtype).contiguous())
        return nn.Parameter(new, requires_grad=False)

    def restore(self, snapshot: Any) -> None:
        self.module.weight = snapshot


def _int8(old: Any, W: Tensor) -> Tensor:
    kept = {n: getattr(old, n) for n in ("act_quant_kwargs", "act_quant_scale", "act_quant_zero_point", "reduce_range")}
    return type(old).from_hp(W, granularity=_granularity(old.block_size, W), **kept)


def _float8(old: Any, W: Tensor) -> Tensor:
    kept = {n: getattr(old, n) for n in ("mm_config", "act_quant_kwargs", "kernel_preference")}
    return type(old).from_hp(W, float8_dtype=old.qdata.dtype, granularity=_granularity(old.block_size, W), **kept)


# Kinds of tensors -> how to make another one like it. Formats for one device's kernels alone are left out.
_AGAIN: dict[str, Callable[[Any, Tensor], Tensor]] = {"Int8Tensor": _int8, "Float8Tensor": _float8}


def _granularity(block: list[int], W: Tensor) -> Any:
    """The name of the blocks that share a scale."""
    kinds = import_module("torchao.quantization.granularity")
    if list(block) == list(W.shape):
        return kinds.PerTensor()
    return kinds.PerRow() if block[1] == W.shape[1] else kinds.PerGroup(block[1])
