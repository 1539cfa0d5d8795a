"""bitsandbytes: 4-bit layers (nf4, fp4, with or without double quantization) and 8-bit ones."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import HalotuneError
from .base import Readable, comes_from


class Bnb4bit(Readable):
    """`bitsandbytes.nn.Linear4bit`. The stored form is its weight, with the state that the weight carries.

    On CPUs with AVX512-BF16, a call in eval mode that needs no gradient rearranges the weight in place, and rounds the scales
    of its blocks to bf16. Of a rearranged weight bitsandbytes computes no input gradient, and `dequantize_4bit` misreads it.
    So the state from before is kept beside it: the weight is read with that, and put back where a gradient is wanted.
    """

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return comes_from(module, "bitsandbytes", "Linear4bit")

    @property
    def quantization(self) -> str:
        state = self._state
        double = state.original_nested if self._rearranged else state.nested
        return f"bitsandbytes {state.quant_type}{' (double)' if double else ''}"

    @property
    def dtype(self) -> torch.dtype:
        """That of the weight before it was quantized."""
        return self._state.original_dtype if self._rearranged else self._state.dtype

    @property
    def _state(self) -> Any:
        state = getattr(self.parameter, "quant_state", None) or self.module.quant_state  # FSDP loses the weight's own
        return _given(state, self.module)

    @property
    def _rearranged(self) -> bool:
        return getattr(self._state, "packing_format_for_cpu", False)

    def __call__(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().__call__(x)
        if self._rearranged:
            if x.requires_grad and torch.is_grad_enabled():
                self.parameter.data, state = self._usual()
                self.parameter.quant_state = self.module.quant_state = state  # type: ignore[attr-defined]
            return super().__call__(x)
        before = copy.copy(self._state)
        y = super().__call__(x)
        if self._rearranged:
            self._state.before = before
        return y

    def _usual(self) -> tuple[Tensor, Any]:
        """The packed weight and its state as they are outside that arrangement; the layer is untouched."""
        data, state = self.parameter.data, self._state
        if not self._rearranged:
            return data, state
        rest = copy.copy(state)
        rest.original_nested = False  # else the scales would be rounded once more
        data, rest = _bnb().functional._convert_weight_packed_for_cpu_inverse(data, rest)
        if hasattr(state, "before"):
            return data, copy.copy(state.before)
        rest.absmax = rest.absmax.T.reshape(-1).float()  # rearranged before the layer was adapted: bf16 is all there is
        return data, rest

    def weight(self) -> Tensor:
        return _bnb().functional.dequantize_4bit(*self._usual())

    def quantize(self, W: Tensor) -> Any:
        old: Any = self.parameter
        kept = {name: getattr(old, name) for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage")}
        data, state = _bnb().functional.quantize_4bit(W.to(old.device, self.dtype).contiguous(), **kept)
        return _bnb().nn.Params4bit(data, quant_state=state, module=self.module, bnb_quantized=True, **kept)

    def restore(self, snapshot: Any) -> None:
        self.module.weight, self.module.quant_state = snapshot, snapshot.quant_state


class Bnb8bit(Readable):
    """`bitsandbytes.nn.Linear8bitLt`. The stored form is its weight with the codes and the scale of every row."""

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return comes_from(module, "bitsandbytes", "Linear8bitLt")

    @property
    def quantization(self) -> str:
        return "bitsandbytes int8"

    @property
    def dtype(self) -> torch.dtype:
        """That of the bias, or fp16, which weights are quantized from; outputs have that of the input."""
        return torch.float16 if self.bias is None else self.bias.dtype

    def weight(self) -> Tensor:
        weight, state = self.module.weight, self.module.state
        holder = state if weight.CB is None else weight  # the first call moves them
        return _given(holder.CB, self.module).float() * (holder.SCB.float() / 127).unsqueeze(1)

    def quantize(self, W: Tensor) -> Any:
        codes, scale, _ = _bnb().functional.int8_vectorwise_quant(W.to(self.device, torch.float16).contiguous())
        return _bnb().nn.Int8Params(codes, requires_grad=False), codes, scale, None, None

    def snapshot(self) -> Any:
        weight, state = self.module.weight, self.module.state
        return weight, weight.CB, weight.SCB, state.CB, state.SCB

    def restore(self, snapshot: Any) -> None:
        weight, weight.CB, weight.SCB, self.module.state.CB, self.module.state.SCB = snapshot
        self.module.weight = weight


def _bnb() -> Any:
    import bitsandbytes  # pyright: ignore[reportMissingImports]  # loaded already: a layer of it is at hand

    return bitsandbytes


def _given(value: Any, module: nn.Module) -> Any:
    if value is None:
        raise HalotuneError(
            f"a bitsandbytes {type(module).__name__} is not quantized yet: that happens when it is moved to its device. Move "
            'the model there first, with model.to("cuda") or model.to("cpu").'
        )
    return value
