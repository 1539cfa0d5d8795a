"""`x + z B`: a thin product added to something large, in one pass over that."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import Op, triton_kernel


def _add_product(x: Tensor, z: Tensor, B: Tensor, inplace: bool) -> Tensor:
    return x.addmm_(z, B) if inplace else torch.addmm(x, z, B)


def _refuses(x: Tensor, z: Tensor, B: Tensor, inplace: bool) -> str | None:
    if x.stride(1) != 1:
        return f"the last dimension of x has stride {x.stride(1)}, not 1"
    if not x.dtype == z.dtype == B.dtype:
        return f"the tensors differ in dtype: {x.dtype}, {z.dtype}, {B.dtype}"
    if z.shape[1] > 128:
        return f"r = {z.shape[1]} is above 128: the product is no longer thin"
    return None


def _wins(x: Tensor, z: Tensor, B: Tensor, inplace: bool) -> bool:
    # Measured on an H100 in bf16: 18 µs against 25 to 30 for 3072 x 3072, 40 against 56 to 88 for 3072 x 8192. Small
    # products cost their launch alone; rows that are not aligned cannot be read in wide words.
    return x.is_cuda and x.dtype.itemsize == 2 and x.numel() >= 1 << 20 and x.shape[1] % 16 == 0


# `x + z B`: x `(n, d)`, z `(n, r)`, B `(r, d)`; the result in the place of x, or new.
add_product = Op(
    "add_product",
    _add_product,
    like=lambda x, z, B, inplace: x.new_empty(x.shape),
    kernels=[triton_kernel("halotune.ops.kernels", "add_product", _refuses, _wins)],
)
