"""Launching a Triton kernel at the price of a torch operation.

Triton binds, types and checks every argument in Python at each launch, which takes longer than many of our kernels run.
What was compiled for arguments of the same sizes, strides, dtype and alignment is kept here, and launched as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from .dispatch import is_traced

MOST = 4096  # sequence lengths vary: not every one is kept for ever


def tiles(size: int, tile: int) -> int:
    """How many tiles cover a size."""
    return -(-size // tile)


class Launcher:
    """One Triton kernel. Its parameters are tensors, numbers, constants, and last the constant `INTERPRETED`.

    The dtypes of all tensors must follow from that of the first.
    """

    def __init__(self, kernel: Any, **options: Any) -> None:
        self.kernel, self.options = kernel, options
        self.compiled: dict[Any, Any] = {}

    def __call__(self, grid: tuple[int, int, int], tensors: tuple[Tensor, ...], rest: tuple[Any, ...]) -> None:
        if is_traced():
            torch.library.wrap_triton(self.kernel)[grid](*tensors, *rest, False, **self.options)
            return
        device = tensors[0].get_device()  # -1 on the CPU, in Triton's interpreter
        if device < 0 or device == torch.cuda.current_device():
            self._launch(device, grid, tensors, rest)
        else:
            with torch.cuda.device(device):
                self._launch(device, grid, tensors, rest)

    def _launch(self, device: int, grid: tuple[int, int, int], tensors: tuple[Tensor, ...], rest: tuple[Any, ...]) -> None:
        address = 0
        for t in tensors:
            address |= t.data_ptr()
        key = (rest, address % 16, tensors[0].dtype, device)
        compiled = self.compiled.get(key)
        if compiled is not None:
            stream = torch._C._cuda_getCurrentRawStream(device)
            # what `compiled[grid]` does, without looking for tools that want to see every launch
            compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *tensors, *rest, False)
            return
        if len(self.compiled) >= MOST:
            self.compiled.clear()
        compiled = self._compile(grid, (*tensors, *rest, device < 0))
        if compiled is not None:
            self.compiled[key] = compiled

    def _compile(self, grid: tuple[int, int, int], args: tuple[Any, ...]) -> Any:
        """Compile and launch; on a GPU with less memory on the chip, with fewer loads ahead. None in the interpreter."""
        stages = self.options.get("num_stages", 3)
        while True:
            try:
                return self.kernel[grid](*args, **{**self.options, "num_stages": stages})
            except OutOfResources:
                if stages == 1:
                    raise
                stages -= 1
