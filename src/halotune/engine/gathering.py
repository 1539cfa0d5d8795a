"""Models of which each process holds a part (FSDP2, ZeRO-3): what needs whole adapters, and all processes at once."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..core.errors import HalotuneError
from ..core.expert_adapter import ExpertAdapter
from ..core.layer import AdaptedLayer
from ..core.sharded_parameters import has_partitions, is_sharded, is_unit, require_unflattened, reshard, whole
from .injection.modules import adapted_layers, innermost, per_adapter

WAIT = 60.0  # seconds for the other processes to come


def has_parts(tensors: Iterable[Tensor | None]) -> bool:
    return any(t is not None and is_sharded(t) for t in tensors)


def is_divided(model: nn.Module) -> bool:
    """Whether FSDP2 or ZeRO-3 has divided the model among processes that see different data.

    Tensor parallelism leaves adapters whole, and expert parallelism divides those of experts alone.
    """
    usual = [a for layer in adapted_layers(model).values() for a in layer.adapters.values() if not isinstance(a, ExpertAdapter)]
    return (
        any(is_unit(m) for m in model.modules())
        or has_partitions(model)
        or any(has_parts(a.parameters()) for a in usual)  # the unit is around the model
    )


def takes_all(model: nn.Module) -> bool:
    """Whether reading what is trained takes every process: where it, or a base that is divided, is held in parts."""
    return is_divided(model) or any(has_parts(m.by_name.parameters()) for m in per_adapter(model).values())


def shard_adapters(model: nn.Module, **how: Any) -> None:
    """Make all adapters of a model one unit of FSDP2; to be called before `fully_shard` of the blocks that they are in.

    A forward pass then gathers all of them at its beginning, in one message, and prepares for all layers together, as in one
    process; they stay whole until backward is over, which reduces their gradients in one message. They may have another dtype,
    and another `mp_policy`, than the blocks.

    Args:
        model: with adapters. It, or a model around it, is to be a unit too, the last to be made.
        how: what `fully_shard` takes: mesh, mp_policy, offload_policy …

    Raises:
        HalotuneError: there are no adapters, or they are sharded already.
    """
    from torch.distributed.fsdp import fully_shard

    adapters: list[Any] = [a for layer in adapted_layers(model).values() for a in layer.adapters.values()]
    adapters = [a for a in adapters if not (isinstance(a, ExpertAdapter) and has_parts(a.parameters()))]  # expert parallelism's
    if not adapters:
        raise HalotuneError(f"shard_adapters: {type(model).__name__} has no adapters. Call get_peft_model first.")
    if any(is_unit(a) or has_parts(a.parameters()) for a in adapters):
        raise HalotuneError(
            "shard_adapters: the adapters are sharded already, by themselves or with the blocks that they are in. Call it "
            "once, and before fully_shard of any block."
        )
    adapters = list(dict.fromkeys(adapters))
    fully_shard(adapters, **how)
    unit = AdapterUnit(adapters[0], innermost(model))
    for adapter in adapters:
        adapter.fsdp_unit = unit


class AdapterUnit:
    """A unit of FSDP2, all adapters of a model: whole from the beginning of a forward pass to the end of its backward.

    FSDP2's own hooks, one on every adapter, would look at it at every layer, and before torch 2.13 wait for all to have run.

    Args:
        member: any of its modules.
    """

    def __init__(self, member: Any, model: nn.Module) -> None:
        self.member = member
        eager: Any = torch.compiler.disable
        model.register_forward_pre_hook(eager(self._begin), prepend=True)
        model.register_forward_hook(eager(self._end), always_call=True)

    def gather(self, *_: Any) -> None:
        if is_sharded(self.member.tensors()[0]):
            self.member.unshard()

    def _begin(self, model: nn.Module, args: Any) -> None:
        if torch._C._current_graph_task_id() == -1:  # else a checkpoint runs the model again
            self.member.reshard()  # what a pass without backward has left may be from before the optimizer's step
        self.gather()

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        if not torch.is_grad_enabled():
            self.member.reshard()
            return
        for t in tree_leaves(output):
            if isinstance(t, Tensor) and t.requires_grad:
                t.register_hook(self.gather)  # the backward of another pass, which ends by putting parts back, may come first


def meet(what: str) -> None:
    """Wait until every process is here: parts are gathered by all of them, or for ever.

    Raises:
        HalotuneError: some process does not come.
    """
    work, end = dist.barrier(async_op=True), time.monotonic() + WAIT
    assert work is not None
    while not work.is_completed():
        if time.monotonic() > end:
            raise HalotuneError(
                f"{what}: the model is sharded, so that every process has to take part, and not all {dist.get_world_size()} "
                f"did within {WAIT:.0f} s. Call it on every process (ZeRO-3: without is_main_process)."
            )
        time.sleep(0.001)


@contextmanager
def whole_adapters(model: nn.Module, what: str) -> Iterator[bool]:
    """Inside, adapters hold whole parameters, where the model is divided; every process has to call this then.

    Yields:
        whether this process may write files: one of a group that holds parts, and any that holds all of it.
    """
    require_unflattened(model, what)
    divided, held = is_divided(model), []
    if divided:
        reshard(model)
        parts = [part for layer in adapted_layers(model).values() for part in layer.adapters.modules()]
        parts = list(dict.fromkeys(parts))
        held = [(part._parameters, name, p) for part in parts for name, p in part._parameters.items() if has_parts([p])]
        meet(what)
    for parameters, name, p in held:
        parameters[name] = nn.Parameter(whole(p), requires_grad=p.requires_grad)  # type: ignore[union-attr]
    try:
        yield not divided or dist.get_rank() == 0
    finally:
        for parameters, name, p in held:
            parameters[name] = p


def require_no_units(model: nn.Module, what: str) -> None:
    """Refuse to take modules out of a model whose hooks gather the weights."""
    for path, module in model.named_modules():
        if is_unit(module) and (isinstance(module, AdaptedLayer) or module is model):
            raise HalotuneError(
                f"{what}: {path or 'the model with adapters'} is a unit of FSDP2, and what is inside could not be run without "
                "it. Save the adapter, and merge it into a base that is not sharded (halotune merge); merge_adapter() merges "
                "in place."
            )
