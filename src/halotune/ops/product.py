"""Products with low-rank factors `(r, ·)`: what a forward and a backward pass cost beyond the base layer's own.

Everywhere A `(r, k)` takes k numbers down to r, Q `(r, d)` takes r up to d. Instead of either, None stands for `[I I …]`: down
by it is `fold`, up by it is `unfold`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import Kernel, Op


def flattened(x: Tensor) -> Tensor:
    """`(…, k) -> (n, k)`."""
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


def no_view(y: Tensor) -> Tensor:
    """y, so that whoever gets it from an autograd function may write to it in place."""
    if torch.compiler.is_compiling() or not y._is_view():
        return y
    return torch.ops.aten._unsafe_view(y, y.shape)


def apply(node: type[torch.autograd.Function], *args: Any) -> Any:
    """`node.apply`, where no transform of functorch is at work: looking for its wrappers takes as long as a launch."""
    if torch.compiler.is_compiling():
        return node.apply(*args)
    return super(torch.autograd.Function, node).apply(*args)  # type: ignore[misc]


def gradients_of(grad_outputs: Any) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of y and z: that of z is a second derivative's. A compiler, which records none, makes up zeros for it."""
    dy, dz = grad_outputs
    return dy, None if torch.compiler.is_compiling() else dz


def linear_backward(x: Tensor, W: Tensor, dy: Tensor, need_x: bool) -> tuple[Tensor | None, Tensor]:
    """The gradients of `x Wᵀ`: that of x where it is needed, and that of W."""
    rows = flattened(dy)
    return (torch.mm(rows, W).view_as(x) if need_x else None), torch.mm(rows.t(), flattened(x))


def fold(x: Tensor, r: int) -> Tensor:
    """Cut the last dimension into pieces of length r (the last one padded with zeros) and add them: `(…, k) -> (…, r)`."""
    n = x.shape[-1]
    if n % r:
        x = F.pad(x, (0, -n % r))
    return x.unflatten(-1, (x.shape[-1] // r, r)).sum(-2, dtype=x.dtype)  # of a GPU's autocast, else in fp32


def add_unfolded(b: Tensor, z: Tensor, inplace: bool) -> Tensor:
    """`b[:, j] + z[:, j mod r]`."""
    r = z.shape[1]
    whole = b.shape[1] // r * r
    y = b if inplace else b.clone()
    y[:, :whole].unflatten(-1, (whole // r, r)).add_(z.unsqueeze(-2))
    if whole < b.shape[1]:
        y[:, whole:].add_(z[:, : b.shape[1] - whole])
    return y


def _add_product(b: Tensor, a: Tensor, A: Tensor | None, Q: Tensor | None, inplace: bool) -> tuple[Tensor, Tensor]:
    if A is None:
        assert Q is not None
        z = fold(a, Q.shape[0])
    else:
        z = F.linear(a, A)
    if Q is None:
        return add_unfolded(b, z, inplace), z
    if inplace and b.dtype is z.dtype is Q.dtype:  # autocast around a backward changes the products, and no operation in place
        return b.addmm_(z, Q), z
    return torch.addmm(b, z, Q), z


def _transposed_products(z: Tensor, d: Tensor, w: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.mm(z.t(), d), torch.mm(w.t(), x)


MOST = 64  # a kernel's r


def _refusal(r: int, x: Tensor, *others: Tensor | None) -> str | None:
    if r > MOST:
        return f"r = {r} is above {MOST}: the product is no longer of low rank"
    for t in (x, *others):
        if t is not None and t.dtype is not x.dtype:
            return f"the tensors differ in dtype: {x.dtype}, {t.dtype}"
        if t is not None and t.stride(-1) != 1:
            return f"the last dimension of a tensor {tuple(t.shape)} has stride {t.stride(-1)}, not 1"
    return None


def _wins(t: Tensor, *_: object) -> bool:
    # One launch instead of two or three is what counts up to some thousand rows, the bytes beyond that. Rows that are not
    # aligned cannot be read in wide words.
    return t.is_cuda and t.dtype.itemsize == 2 and t.shape[-1] % 16 == 0 and t.numel() > 0


def _transposed_wins(z: Tensor, d: Tensor, *_: object) -> bool:
    # On an H100 in bf16, r 32: 20 µs against 24 for 3072 rows of 3072; r 64: 11 against 15 for 1024 rows, but 51 against 41
    # for 3072 rows of 8192.
    return _wins(d) and (z.shape[-1] <= 32 or d.shape[-2] <= 2048)


_KERNELS = "halotune.ops.kernels"

# `z = a Aᵀ` and `b + z Q`: a `(n, k)`, b `(n, d)`; the sum in b itself, or new. Returns both.
add_product = Op(
    "add_product",
    _add_product,
    like=lambda b, a, A, Q, inplace: (b.new_empty(b.shape), b.new_empty(b.shape[0], (Q if A is None else A).shape[0])),
    kernel=Kernel(_KERNELS, "add_product", lambda b, a, A, Q, _: _refusal((Q if A is None else A).shape[0], b, a, A, Q), _wins),
)

# `zᵀ d` and `wᵀ x`: z, w `(n, r)`, d `(n, p)`, x `(n, q)`.
transposed_products = Op(
    "transposed_products",
    _transposed_products,
    like=lambda z, d, w, x: (d.new_empty(z.shape[1], d.shape[1]), x.new_empty(w.shape[1], x.shape[1])),
    kernel=Kernel(_KERNELS, "transposed_products", lambda z, *others: _refusal(z.shape[-1], z, *others), _transposed_wins),
)
