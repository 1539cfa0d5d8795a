"""Launching a Triton kernel at the price of a torch operation.

Triton binds, types and checks every argument in Python at each launch, which takes longer than many of our kernels run.
What was compiled for arguments of the same sizes, strides, dtypes and alignment is kept here, and launched as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MOST = 4096  # sequence lengths vary: not every one is kept for ever


class Launcher:
    """One Triton kernel. Its parameters are tensors, numbers, constants, and last the constant `INTERPRETED`."""

    def __init__(self, kernel: Any, **options: Any) -> None:
        self.kernel, self.options = kernel, options
        self.compiled: dict[Any, Any] = {}

    def __call__(self, grid: tuple[int, int, int], tensors: tuple[Tensor, ...], *rest: Any) -> None:
        device = tensors[0].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._launch(grid, tensors, rest)
        else:
            self._launch(grid, tensors, rest)

    def _launch(self, grid: tuple[int, int, int], tensors: tuple[Tensor, ...], rest: tuple[Any, ...]) -> None:
        rest = (*rest, tensors[0].device.type == "cpu")
        address = 0
        for t in tensors:
            address |= t.data_ptr()
        key = (tensors[0].device.index, tuple([t.dtype for t in tensors]), address % 16, rest)
        compiled = self.compiled.get(key)
        if compiled is not None:
            compiled[grid](*tensors, *rest)
            return
        if len(self.compiled) >= MOST:
            self.compiled.clear()
        self.compiled[key] = self.kernel[grid](*tensors, *rest, **self.options)  # None in Triton's interpreter
