"""Parameters of which each process holds a part: FSDP2's, which are DTensors, and those of DeepSpeed's ZeRO-3.

While a unit of FSDP2 runs, its modules hold whole parameters instead, which are dropped afterwards: what is written to those
is lost, so `reshard` comes before any reading or writing outside of a pass.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .errors import HalotuneError

M = TypeVar("M", bound=nn.Module)


def is_unit(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on this module: its hooks gather what it runs with."""
    return hasattr(type(module), "_get_fsdp_state")


def copied(module: M) -> M:
    """A copy of a module that holds whole parameters, without hooks. It is no unit, whose class cannot be copied."""
    kind = next(k for k in type(module).__mro__ if not hasattr(k, "_get_fsdp_state"))
    own = {k: v for k, v in vars(module).items() if not (k.startswith("__") or "fsdp" in k or "hook" in k)}
    out = object.__new__(kind)
    nn.Module.__init__(out)
    vars(out).update(copy.deepcopy(own))
    return out


def is_sharded(t: Tensor) -> bool:
    return hasattr(t, "full_tensor") or _is_partitioned(t)


def _is_partitioned(t: Tensor) -> bool:
    """Whether ZeRO-3 has put the parameter away."""
    return hasattr(t, "ds_id") and t.numel() == 0 != t.ds_numel  # type: ignore[attr-defined]


def has_partitions(model: nn.Module) -> bool:
    """Whether ZeRO-3 keeps parameters of the model."""
    return any(hasattr(p, "ds_id") for p in model.parameters())


def let_gather_inside(module: nn.Module) -> None:
    """Let ZeRO-3 gather for a call of the module what belongs to parts of it too, which are never called themselves."""
    external = vars(module).get("_external_params")  # by identity; DeepSpeed's `register_external_parameter` fills it
    if external is not None:
        external.update((id(p), p) for part in module.children() for p in part.parameters())


def whole_size(t: Tensor) -> torch.Size:
    """That of the parameter, wherever it is."""
    return torch.Size(getattr(t, "ds_shape", t.shape))


def local(t: Any) -> Tensor:
    """What of a tensor lies in this process; gradients go through."""
    return t.to_local() if hasattr(t, "placements") else t


@torch.no_grad()
def whole(t: Any) -> Tensor:
    """All of a parameter, where every process calls it; a tensor that is there already is returned as it is."""
    if hasattr(t, "full_tensor"):
        return t.detach().to(t.device_mesh.device_type).full_tensor()  # which may be offloaded
    if not _is_partitioned(t):
        return t
    t.all_gather()
    copy = t.detach().clone()
    t.partition()
    return copy


def require_unflattened(model: nn.Module, what: str) -> None:
    """Refuse what reads or writes single parameters of a model that FSDP1 has made one flat parameter of."""
    flattened = [p for p in model.parameters() if hasattr(p, "_fsdp_flattened")]
    if flattened and all(p.dim() == 1 for p in flattened):  # else they are whole: `summon_full_params`
        raise HalotuneError(
            f"{what}: FSDP1 has flattened the parameters, of which each process holds a part. Do this before the model is "
            "wrapped, or shard it with FSDP2; save with state_dict=accelerator.get_state_dict(model), and merge or export from "
            "the file (halotune merge, halotune export)."
        )


def gathered(t: Any) -> Tensor:
    """As `whole`, but gradients go through: each process gets those of its part."""
    if getattr(t, "_fsdp_flattened", False) or hasattr(t, "ds_id"):
        raise HalotuneError(
            "the parameters of adapters are in parts that only a forward pass gathers (FSDP1, ZeRO-3), so there is no gradient "
            "of what depends on them alone, as a penalty does. Shard the model with FSDP2, or leave the penalty out "
            "(orthogonality_weight=0)."
        )
    return t.full_tensor() if hasattr(t, "full_tensor") else t


@torch.no_grad()
def store(t: Any, values: Tensor) -> None:
    """Copy into a parameter; into a DTensor what each process keeps of it, where every process calls it."""
    if hasattr(t, "full_tensor"):
        values = divided_like(t, values).to(t.device)
    if _is_partitioned(t):
        t.all_gather()
        t.copy_(values)
        t.partition(has_been_updated=True)
    else:
        t.copy_(values)


def divided_like(t: Any, values: Tensor) -> Tensor:
    """What each process keeps of values, where it holds a part of t."""
    if not hasattr(t, "full_tensor") or hasattr(values, "full_tensor"):
        return values
    from torch.distributed.tensor import distribute_tensor

    values = values.to(t.device_mesh.device_type, t.dtype)
    return distribute_tensor(values, t.device_mesh, t.placements, src_data_rank=None)


def reshard(model: nn.Module) -> None:
    """Let every unit of FSDP2 hold its own parts again."""
    for module in model.modules():
        if is_unit(module):
            module.reshard()  # type: ignore[operator]


def only_shards(module: nn.Module) -> bool:
    """Whether all hooks of the module are there to gather its parameters: FSDP2's, or ZeRO-3's."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    if not hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    return all(
        type(getattr(h, "__self__", None)).__name__ == "FSDPState" or h.__module__.startswith("deepspeed.") for h in hooks
    )
