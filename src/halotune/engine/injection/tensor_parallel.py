"""Models that are tensor-parallel: which adapters can be put on their layers, and that all processes begin with the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import nn

from ...core.adapter import Adapter
from ...core.errors import HalotuneError
from ...core.layer import AdaptedLayer
from ...core.tensor_parallel import is_parallel


def check_shards(
    modules: Mapping[str, nn.Module], created: Mapping[str, tuple[AdaptedLayer, Adapter]], to_save: Iterable[str]
) -> None:
    """Refuse what a shard cannot run by itself. All processes give the same answer.

    Args:
        modules: the model's modules, by name.
        created: the layers and their new adapters.
        to_save: the modules to be fully fine-tuned.
    """
    for path, (layer, adapter) in created.items():
        kind, shard = type(adapter).__name__, layer.shard
        if shard is None and is_parallel(layer.base_layer):
            raise HalotuneError(
                f"{path}: this {type(layer.base_layer).__name__} is tensor-parallel, and of those only a torch.nn.Linear "
                "of floats can be adapted. Leave it out with exclude_modules, or load the model without tensor parallelism."
            )
        if shard is None or shard.axis is None:
            continue
        if not layer.base.is_writable_here:
            raise HalotuneError(
                f"{path}: this {type(layer.base_layer).__name__} is tensor-parallel and sharded by FSDP already, which would "
                "not average the gradients of adapters that come later. Load the model with tensor parallelism alone, put "
                "adapters on it, and let FSDP shard it then (fully_shard, accelerate)."
            )
        part = {"in": "columns (it is row-parallel)", "out": "rows (it is column-parallel)"}[shard.axis]
        held = f"{path}: each process holds some {part} of the weight {layer.base.shape}"
        unit = adapter.unit(shard.axis)
        if unit == 0:
            raise HalotuneError(
                f"{held}, and {kind} needs the lengths of whole ones. Leave the layer out with exclude_modules, or load the "
                "model without tensor parallelism."
            )
        if unit > 1 and shard.cuts_through(shard.axis, unit):
            raise HalotuneError(
                f"{held}, here {', '.join(f'{a}:{b}' for a, b in shard.spans)}, and a border between processes lies within a "
                f"block of {unit} of {kind}. Choose a size of blocks that divides them (rank_pattern gives a layer its own), "
                "another number of processes, or leave the layer out with exclude_modules."
            )
    for path in to_save:
        inside = [n for n, m in modules.items() if (n == path or n.startswith(f"{path}.")) and is_parallel(m)]
        if inside:
            raise HalotuneError(
                f"modules_to_save: {inside[0]!r} is tensor-parallel, and what parallelises it would go on running the original "
                "instead of a copy that is trained. Leave it out, or load the model without tensor parallelism."
            )


@torch.no_grad()
def begin_alike(created: Iterable[tuple[AdaptedLayer, Adapter]]) -> None:
    """Give new adapters in all processes of a tensor-parallel model the parameters that the first one drew."""
    pairs = list(created)
    group = next((layer.shard.group for layer, _ in pairs if layer.shard and layer.shard.group is not None), None)
    if group is None:
        return
    drawn = [p.detach() for _, adapter in pairs for p in adapter.parameters()]
    for dtype in {p.dtype for p in drawn}:
        same = [p for p in drawn if p.dtype is dtype and not p.is_meta]
        if same:
            message = torch.cat([p.reshape(-1) for p in same])
            dist.broadcast(message, dist.get_global_rank(group, 0), group)
            for p, part in zip(same, message.split([p.numel() for p in same]), strict=True):
                p.copy_(part.view_as(p))
