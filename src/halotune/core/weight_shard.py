"""The shard of a tensor-parallel layer that lies in one process, and what the processes tell each other.

Of a weight `W (out, in)` each process holds some rows ("out": column-parallel, as `x Wᵀ` has it) or some columns ("in":
row-parallel). An adapter on a shard is an adapter on a smaller weight:

| | rows of W | columns of W |
|---|---|---|
| x | whole | its entries of these columns |
| factors (`Adapter.prepare`) | their entries of these rows | their entries of these columns |
| y | its entries of these rows | a term of y: the layer sums over the processes, with the adapter's part in it |

So parameters are the same in every process, the factors are made of them whole, and each process takes its entries. Three
things cross the border between processes, beside what the layer itself exchanges:

- gradients of parameters, each process having seen a part: summed once for all layers that prepare together (`Sharing`);
- a small product with the input where a process has some of its entries alone: summed (`Shard.total`);
- nothing in the forward pass of a method that has no such product.

What is sent and what is summed are each other's derivative, so either can be differentiated again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .operator import WeightShape
from .prepared import Tensors

Axis = Literal["in", "out"]


@dataclass(frozen=True)
class Shard:
    """A part of the rows, or of the columns, of a weight. Those of two weights that are cut alike are equal: in every process,
    whatever lies there.

    Attributes:
        axis: of the weight, along which it is cut; None where every process has it all.
        whole: the shape of the weight.
        packed: how many matrices lie one after the other in it, each of which is cut.
        group: the processes that hold the parts.
        spans: the entries `[start, stop)` along the axis that lie here, in order.
        shape: of the part of the weight that lies here.
    """

    axis: Axis | None
    whole: WeightShape
    packed: int
    group: Any = field(repr=False)
    spans: tuple[tuple[int, int], ...] = field(compare=False)
    shape: WeightShape = field(compare=False)

    def __deepcopy__(self, memo: Any) -> Shard:
        return self

    def cut(self, axis: Axis, t: Tensor, dim: int, unit: int = 1) -> Tensor:
        """What of a tensor with the whole `axis` along `dim` belongs to this shard.

        Args:
            unit: how many rows or columns of the weight an entry of t stands for; one that is needed in part is taken.
        """
        if axis != self.axis:
            return t
        bounds = [(start // unit, -(-stop // unit)) for start, stop in self.spans]
        pieces = [t.narrow(dim, start, stop - start) for start, stop in bounds]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)

    def cut_all(self, factors: Sequence[Tensor], axes: Sequence[tuple[Axis, int]], unit: int = 1) -> Tensors:
        """`cut` for each factor, along its axis and dimension."""
        return tuple([self.cut(axis, t, dim, unit) for t, (axis, dim) in zip(factors, axes, strict=False)])

    def rows_in_blocks(self, r: int) -> tuple[int, list[int]]:
        """How many blocks of r rows have rows here, and where in them those are."""
        rows, n = [], 0
        for start, stop in self.spans:
            first = start // r
            rows += [n * r + i - first * r for i in range(start, stop)]
            n += -(-stop // r) - first
        return n, rows

    def cuts_through(self, axis: Axis, unit: int) -> bool:
        """Whether a border between shards lies within `unit` consecutive entries: the same answer in every process."""
        if axis != self.axis:
            return False
        here = any(bound % unit for span in self.spans for bound in span)
        found: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(found, here, self.group)
        return any(found)

    def total(self, axis: Axis, z: Tensor) -> Tensor:
        """z, summed over the processes where it is a sum over `axis`; each goes on with all of it."""
        if axis != self.axis:
            return z
        return _Share.apply(self, *_Sum.apply(self, z))[0]  # type: ignore[return-value, misc]

    def shared(self, tensors: Tensors) -> Tensors:
        """The same tensors, whose gradients are summed over the processes: in each they are those of its shard."""
        if self.axis is None or not torch.is_grad_enabled():
            return tensors
        return _Share.apply(self, *tensors)  # type: ignore[return-value]


class _Share(torch.autograd.Function):
    """The identity, whose gradients are summed over the processes, all in one message."""

    @staticmethod
    def forward(ctx: Any, shard: Shard, *tensors: Tensor) -> Tensors:
        ctx.shard = shard
        return tuple([t.view_as(t) for t in tensors])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = [i for i, wanted in enumerate(ctx.needs_input_grad[1:]) if wanted]
        sums = iter(_Sum.apply(ctx.shard, *[grads[i] for i in needed]))  # type: ignore[arg-type]
        return None, *[next(sums) if i in needed else None for i in range(len(grads))]


class _Sum(torch.autograd.Function):
    """The sums over the processes, in one message; the gradient is the identity."""

    @staticmethod
    def forward(ctx: Any, shard: Shard, *tensors: Tensor) -> Tensors:
        ctx.shard = shard
        message = torch.cat([t.reshape(-1) for t in tensors])  # a copy, always
        dist.all_reduce(message, group=shard.group)
        return tuple([part.view(t.shape) for part, t in zip(message.split([t.numel() for t in tensors]), tensors, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_Share.apply(ctx.shard, *grads)  # type: ignore[misc]
