"""Launching a Triton kernel at the price of a torch operation.

Triton binds, types and checks every argument in Python at each launch, which takes longer than many of our kernels run.
A `Launch` does that once for arguments of the same sizes and strides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from .dispatch import is_traced


def tiles(size: int, tile: int) -> int:
    """How many tiles cover a size."""
    return -(-size // tile)


class Launcher:
    """One Triton kernel. Its parameters are tensors, numbers, constants, and last the constant `INTERPRETED`."""

    def __init__(self, kernel: Any, **options: Any) -> None:
        self.kernel, self.options = kernel, options

    def prepare(self, grid: tuple[int, int, int], *numbers: Any) -> Launch:
        """A launch of this grid with these numbers and constants, on any tensors whose dtypes and device stay the same."""
        return Launch(self, grid, numbers)

    def compile(self, grid: tuple[int, int, int], args: tuple[Any, ...]) -> Any:
        """Compile and launch; on a GPU with less memory on the chip, with fewer loads ahead. None in the interpreter."""
        stages = self.options.get("num_stages", 3)
        while True:
            try:
                return self.kernel[grid](*args, **{**self.options, "num_stages": stages})
            except OutOfResources:
                if stages == 1:
                    raise
                stages -= 1


class Launch:
    """A launch that is prepared but for its tensors."""

    __slots__ = ("compiled", "grid", "launcher", "numbers")

    def __init__(self, launcher: Launcher, grid: tuple[int, int, int], numbers: tuple[Any, ...]) -> None:
        self.launcher, self.grid, self.numbers = launcher, grid, numbers
        self.compiled: Any = None  # for tensors that begin at multiples of 16 bytes, as nearly all do

    def __call__(self, *tensors: Tensor) -> None:
        if is_traced():
            launcher = self.launcher
            torch.library.wrap_triton(launcher.kernel)[self.grid](*tensors, *self.numbers, False, **launcher.options)
            return
        device = tensors[0].get_device()  # -1 on the CPU, in Triton's interpreter
        if device < 0 or device == torch.cuda.current_device():
            self._run(device, tensors)
        else:
            with torch.cuda.device(device):
                self._run(device, tensors)

    def _run(self, device: int, tensors: tuple[Tensor, ...]) -> None:
        address = 0
        for t in tensors:
            address |= t.data_ptr()
        compiled = self.compiled
        if compiled is not None and not address & 15:
            stream = torch._C._cuda_getCurrentRawStream(device)
            # what `compiled[grid]` does, without looking for tools that want to see every launch
            known = stream, compiled.function, compiled.packed_metadata, None, None, None
            compiled.run(*self.grid, *known, *tensors, *self.numbers, False)
            return
        compiled = self.launcher.compile(self.grid, (*tensors, *self.numbers, device < 0))
        if not address & 15:
            self.compiled = compiled
