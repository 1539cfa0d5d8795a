"""Products of rows with the matrices of the groups that they belong to: row i of group e meets `W_e`.

Rows lie sorted by group, and `ends (groups,)` int32 says where each group ends. Where not all rows belong to a group (`whole`
is False) those past the last end come out as zeros. On CUDA in bf16 one launch serves all groups and nothing waits for the GPU;
elsewhere a loop over the groups, which is the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNED = 8  # numbers of bf16: what torch's grouped product reads begins at multiples of 16 bytes
MOST_GROUPS = 1000  # of one launch of it


def grouped_product(x: Tensor, W: Tensor, ends: Tensor, whole: bool = True) -> Tensor:
    """`y_i = x_i W_e`: `x (n, k)`, `W (groups, k, m)` -> `(n, m)`, in the dtype of x; differentiable any number of times."""
    if torch.compiler.is_compiling():
        return product_node(x, W, ends, whole)
    if not torch.is_grad_enabled():  # within an autograd function: another one takes longer than a launch
        return _product(x, W, ends, whole)
    return _Product.apply(x, W, ends, whole)  # type: ignore[return-value]


def product_of_each(x: Tensor, W: Tensor, ends: Tensor, whole: bool) -> Tensor:
    """`y_i = x_i W_e`: `W (groups, k, m)`, or `(k, m)` for all, in whatever dtype; zero for the rows past the last end."""
    W = W.to(x.dtype)
    if W.dim() > 2:
        return grouped_product(x, W, ends, whole)
    return x @ W if whole else within(x @ W, ends)


def grouped_outer(x: Tensor, d: Tensor, ends: Tensor) -> Tensor:
    """`Σ_i x_iᵀ d_i` over the rows of each group: `x (n, k)`, `d (n, m)` -> `(groups, k, m)`, zero for a group without rows."""
    if torch.compiler.is_compiling():
        return outer_node(x, d, ends)
    if not torch.is_grad_enabled():
        return _outer(x, d, ends)
    return _Outer.apply(x, d, ends)  # type: ignore[return-value]


Multiply = Callable[..., Tensor]


def _product_gradients(product: Multiply, outer: Multiply) -> Callable[..., tuple[Tensor | None, ...]]:
    """Backward of a product, by these."""

    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (x, W, ends) = grad_outputs, ctx.saved_tensors
        need_x, need_W, *_ = ctx.needs_input_grad
        dx = product(dy, W.mT, ends, ctx.whole) if need_x else None
        return dx, (outer(x, dy, ends).to(W.dtype) if need_W else None), None, None

    return backward


def _outer_gradients(product: Multiply) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (G,), (x, d, ends) = grad_outputs, ctx.saved_tensors
        need_x, need_d, _ = ctx.needs_input_grad
        dx = product(d, G.mT, ends, False) if need_x else None
        return dx, (product(x, G, ends, False) if need_d else None), None

    return backward


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, ends: Tensor, whole: bool) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, W, ends)
        ctx.whole = whole
        return _product(x, W, ends, whole)

    backward = staticmethod(_product_gradients(grouped_product, grouped_outer))


class _Outer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, d: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, d, ends)
        return _outer(x, d, ends)

    backward = staticmethod(_outer_gradients(grouped_product))


# -- without gradients


def _rows(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """Each group that has rows. Waits for the device of `ends` once."""
    start = 0
    for e, end in enumerate(ends.tolist()):
        if end > start:
            yield e, slice(start, end)
            start = end


def _product(x: Tensor, W: Tensor, ends: Tensor, whole: bool) -> Tensor:
    if _in_one_launch(x, W, ends):
        k, m = W.shape[-2:]
        if k % ALIGNED or m % ALIGNED:
            y = _grouped(_filled(x), F.pad(W, (0, -m % ALIGNED, 0, -k % ALIGNED)), ends)[:, :m]
        else:
            y = _grouped(x.contiguous(), W, ends)
        return y if whole else within(y, ends)
    y = x.new_zeros(x.shape[0], W.shape[-1])
    for e, rows in _rows(ends):
        torch.mm(x[rows], W[e].to(x.dtype), out=y[rows])
    return y


def within(y: Tensor, ends: Tensor) -> Tensor:
    """y with zeros in the rows past the last end."""
    return torch.where((torch.arange(y.shape[0], device=y.device) < ends[-1])[:, None], y, 0)


def _outer(x: Tensor, d: Tensor, ends: Tensor) -> Tensor:
    if _in_one_launch(x, d, ends):
        k, m = x.shape[1], d.shape[1]
        return _grouped(_filled(x).mT, _filled(d), ends)[:, :k, :m]
    G = x.new_zeros(ends.shape[0], x.shape[1], d.shape[1])
    for e, rows in _rows(ends):
        torch.mm(x[rows].mT, d[rows], out=G[e])
    return G


# -- for a compiler, which does not see into them

product_node = torch.library.custom_op(
    "halotune::grouped_product", _product, mutates_args=(), schema="(Tensor x, Tensor W, Tensor ends, bool whole) -> Tensor"
)
product_node.register_fake(lambda x, W, ends, whole: x.new_empty(x.shape[0], W.shape[-1]))
outer_node = torch.library.custom_op(
    "halotune::grouped_outer", _outer, mutates_args=(), schema="(Tensor x, Tensor d, Tensor ends) -> Tensor"
)
outer_node.register_fake(lambda x, d, ends: x.new_empty(ends.shape[0], x.shape[1], d.shape[1]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.whole = inputs[3:] != (False,)


# While a compiler traces a backward pass it does not always say so: these call nodes, whatever it says.
product_node.register_autograd(_product_gradients(product_node, outer_node), setup_context=_keep)
outer_node.register_autograd(_outer_gradients(product_node), setup_context=_keep)


def _in_one_launch(x: Tensor, other: Tensor, ends: Tensor) -> bool:
    if not (x.is_cuda and x.dtype is other.dtype is torch.bfloat16) or x.shape[0] == 0:
        return False
    return _is_recent(x.device) and ends.shape[0] <= MOST_GROUPS


@cache
def _is_recent(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _grouped(x: Tensor, W: Tensor, ends: Tensor) -> Tensor:
    run: Any = getattr(F, "grouped_mm", None) or torch.ops.aten._grouped_mm
    return run(x, W, offs=ends)


def _filled(x: Tensor) -> Tensor:
    """Rows whose length is aligned, filled up with zeros."""
    return F.pad(x, (0, -x.shape[1] % ALIGNED)) if x.shape[1] % ALIGNED else x.contiguous()
