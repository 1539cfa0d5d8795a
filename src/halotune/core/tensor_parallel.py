"""Linear layers of tensor-parallel models (transformers' and torch's own, both on DTensors).

Such a layer is a border, a product and a border: its hooks, or the forward that was put into it, bring the input into the
layout of the weight's shard, and the output into that of the model. The module is called as ever, so both borders are the
engine's own, with everything they know (gathered outputs, split inputs, packed weights, sequence parallelism, a bias that is
added once). Only the product inside is ours: `F.linear` of local tensors, with adapters on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Linear, has_hooks, register_base
from .errors import HalotuneError
from .operator import Matrix, Operator, WeightShape
from .sharded_parameters import local, whole
from .weight_shard import Shard

Adapting = Callable[[Operator], Operator]


def shard_of(module: nn.Module) -> Shard | None:
    """The shard of a tensor-parallel linear layer that lies here; None for any other module."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 2 or type(module).forward is not nn.Linear.forward:
        return None
    n_out, n_in = weight.shape
    whole = WeightShape(n_out, n_in)
    if not is_parallel(module):
        # transformers marks what it parallelises: here a whole weight, whose output only is looked after (in MLA, say)
        marked = "forward" in module.__dict__ and getattr(module, "_is_hooked", False) and not hasattr(weight, "placements")
        return Shard(None, whole, 1, None, (), whole) if marked else None
    mesh, placement = placement_of(weight)
    group, packed = mesh.get_group(), getattr(placement, "split_factor", 1)
    if not hasattr(placement, "dim"):
        return Shard(None, whole, 1, group, (), whole)
    is_rows = placement.dim % 2 == 0
    spans = _spans(mesh, packed, whole.out_features if is_rows else whole.in_features)
    here = sum(stop - start for start, stop in spans)
    if is_rows:
        return Shard("out", whole, packed, group, spans, WeightShape(here, whole.in_features))
    return Shard("in", whole, packed, group, spans, WeightShape(whole.out_features, here))


def is_parallel(module: nn.Module) -> bool:
    """Whether the weight is a DTensor between borders. FSDP's are gathered before the module runs, and have none."""
    weight = module._parameters.get("weight")
    if not (hasattr(weight, "placements") and ("forward" in module.__dict__ or has_hooks(module))):
        return False
    from torch.distributed.fsdp import FSDPModule

    return weight.device_mesh.ndim > 1 or not isinstance(module, FSDPModule)  # type: ignore[union-attr]


def placement_of(weight: Any) -> tuple[Any, Any]:
    """The mesh and the placement by which a weight is tensor-parallel: those of the last dimension, FSDP's being before it."""
    mesh = weight.device_mesh
    return (mesh if mesh.ndim == 1 else mesh[mesh.mesh_dim_names[-1]]), weight.placements[-1]


def _spans(mesh: Any, packed: int, size: int) -> tuple[tuple[int, int], ...]:
    """Which of `size` entries lie here, of as many matrices in a row as are packed: each is cut as torch cuts tensors."""
    n, rank, each = mesh.size(), mesh.get_local_rank(), -(-size // packed)
    spans: list[tuple[int, int]] = []
    for first in range(0, size, each):
        part = -(-min(each, size - first) // n)
        start, stop = (min(first + k * part, first + each, size) for k in (rank, rank + 1))
        spans.append((start, stop))
    return tuple(spans)


class ShardedLinear(Linear):
    """A linear layer of which a shard lies here. `weight()` is the whole one, for which all processes ask together."""

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return super().matches(module) and shard_of(module) is not None

    def weight(self) -> Tensor:
        return whole(self.parameter)

    @torch.no_grad()
    def write(self, W: Tensor) -> None:
        shard = shard_of(self.module)
        assert shard is not None
        local(self.parameter).copy_(shard.cut("in", shard.cut("out", W, 0), 1))

    @property
    def is_writable_here(self) -> bool:
        return not hasattr(self.parameter, "placements") or self.parameter.device_mesh.ndim == 1  # type: ignore[attr-defined]

    @property
    def transient(self) -> bool:
        return True

    @property
    def takes_weight(self) -> bool:
        return True  # inside the borders

    def is_product(self, *, written: bool = True) -> bool:
        return True

    def plain(self, dtype: torch.dtype) -> None:
        return None


register_base(ShardedLinear)


def run_inside(module: nn.Module, shard: Shard, x: Tensor, adapting: Adapting) -> Tensor:
    """Call the module, with `adapting` put on the product of its shard."""
    own, forward = module.__dict__.get("forward"), module.forward
    runs = 0

    def product(weight: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        nonlocal runs
        runs += 1
        module._parameters["weight"] = weight  # others may look at it
        if not hasattr(x, "placements"):  # no gradients, or a packed layer: its borders have seen to the rest
            return adapting(Matrix(local(weight), None if bias is None else local(bias)))(x)
        return _on_dtensor(x, weight, bias, shard, adapting)

    def around(*args: Any, **kwargs: Any) -> Any:  # after hooks that gather the weight
        weight: Any = module._parameters["weight"]
        module._parameters["weight"] = _Standin(partial(product, weight))  # type: ignore[assignment]
        try:
            return forward(*args, **kwargs)
        finally:
            module._parameters["weight"] = weight

    module.__dict__["forward"] = around
    try:
        y = module(x)
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own
    if runs != 1:
        raise HalotuneError(
            f"{type(module).__name__} {shard.whole}: this tensor-parallel layer has changed since adapters were put on it: a "
            f"call used its weight {runs} times. Put adapters on the model as it is now."
        )
    return y


def _on_dtensor(x: Any, weight: Any, bias: Any, shard: Shard, adapting: Adapting) -> Tensor:
    """The product of DTensors, by local ones. In a shard of rows each process sees a part of the gradient of x; in one of
    columns y is a term of the sum, to which the bias is added once."""
    from torch.distributed.tensor import DTensor, Partial, Replicate
    from torch.distributed.tensor import Shard as Split

    mesh, is_columns = x.device_mesh, shard.axis == "in"
    expected = [Split(x.dim() - 1) if is_columns else Replicate()]
    x = x if list(x.placements) == expected else x.redistribute(placements=expected)
    here = x.to_local(grad_placements=[Partial()] if shard.axis == "out" else expected)
    added = None if is_columns or bias is None else local(bias)
    y = adapting(Matrix(local(weight), added))(here)
    shape = torch.Size((*x.shape[:-1], weight.shape[0]))
    placed = Partial() if is_columns else Replicate() if shard.axis is None else Split(x.dim() - 1)
    stride = torch.empty(shape, device="meta").stride()
    out = DTensor.from_local(y, mesh, [placed], run_check=False, shape=shape, stride=stride)
    return out + bias if is_columns and bias is not None else out


class _Standin:
    """What takes the weight's place while a module runs, so that `F.linear` comes here."""

    def __init__(self, product: Callable[[Tensor, Tensor | None], Tensor]) -> None:
        self.product = product

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Tensor:
        if function is not F.linear:
            raise HalotuneError(
                f"{getattr(function, '__name__', function)}: a tensor-parallel layer with adapters on it was expected to call "
                "torch.nn.functional.linear alone on its weight. Leave it out with exclude_modules."
            )
        x, standin, *bias = args
        return standin.product(x, bias[0] if bias else (kwargs or {}).get("bias"))
