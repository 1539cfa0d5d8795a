"""HQQ, half-quadratic quantization."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Readable, comes_from


class Hqq(Readable):
    """`hqq.core.quantize.HQQLinear`. The stored form is its packed weight with the dictionary that describes it."""

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return comes_from(module, "hqq", "HQQLinear")

    @property
    def quantization(self) -> str:
        return f"hqq {self.module.meta['nbits']}-bit"

    @property
    def parameter(self) -> nn.Parameter:
        return self.module.W_q

    @property
    def dtype(self) -> torch.dtype:
        return self.module.compute_dtype

    def weight(self) -> Tensor:
        return self.module.dequantize().detach()

    def quantize(self, W: Tensor) -> Any:
        old = self.module
        settings = {**old.quant_config, "offload_meta": old.offload_meta}
        new = type(old).from_weights(W.to(self.device, self.dtype), None, settings, self.dtype, old.device)
        return new.W_q, new.meta

    def snapshot(self) -> Any:
        return self.module.W_q, self.module.meta

    def restore(self, snapshot: Any) -> None:
        self.module.W_q, self.module.meta = snapshot
