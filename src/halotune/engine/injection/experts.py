"""Adapters on fused experts: how they are made, and which implementation of transformers' interface runs them."""

from __future__ import annotations

from torch import nn

from ...core.adapter import Adapter
from ...core.config import AdapterConfig
from ...core.errors import HalotuneError
from ...core.expert_adapter import ExpertAdapter
from ...core.experts import IMPLEMENTATION, AdaptedExperts, AdaptedExpertWeights, ExpertWeights, experts_forward
from ...core.layer import AdaptedLayer
from ...core.operator import WeightShape
from ...methods.registry import Method


def layer_for(module: nn.Module, path: str) -> AdaptedLayer:
    """A layer around a module that has no adapters yet."""
    return (AdaptedExpertWeights if isinstance(module, ExpertWeights) else AdaptedLayer)(module, path)


def create(method: Method, module: nn.Module, shape: WeightShape, config: AdapterConfig) -> Adapter:
    """A new adapter for a module, with a weight of this shape; of experts, for all of them."""
    if not isinstance(module, ExpertWeights):
        return method.create(shape, config)
    if module.bias is not None and config.bias not in ("none", "all"):
        raise HalotuneError(
            f"bias={config.bias!r}: the biases of fused experts lie in one parameter, which no file of adapters holds. Use "
            'bias="none".'
        )
    adapter = ExpertAdapter.of(lambda: method.create(shape, config), module.experts, config.expert_sharing)
    placements = getattr(module.weight, "placements", ())
    cut = [p.dim for p in placements if not p.is_replicate()]
    if any(cut) or (module.is_spread and len(placements) != 1):
        raise HalotuneError(
            f"these experts are sharded as {tuple(placements)}: adapters follow expert parallelism, which gives each process "
            "whole experts, and not tensor parallelism, nor FSDP beside it. Load the model with "
            "DistributedConfig(tp_size=n, ep_size=n), or leave the experts out with exclude_modules."
        )
    if module.is_spread:
        adapter.distribute(module.weight.device_mesh)  # type: ignore[attr-defined]
    return adapter


def attach(experts: AdaptedExperts) -> None:
    """Let transformers' experts interface run a module with adapters on its experts."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # which made the module

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
    experts.attach()
