"""Every method on small models, and an oracle of what several adapters compute: a plain model with other weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from halotune import HRAConfig, PeftModel, get_peft_model
from halotune.core.config import AdapterConfig
from halotune.engine.injection.modules import adapted_layers, modules_to_save_wrappers

from ..conftest import MLP
from ..laws.cases import VARIANTS, matrix, train

# HRA is drawn at random, so that it has no notices to give; all parameters are drawn again anyway.
METHODS: dict[str, AdapterConfig] = {
    v.name: replace(v.config, init_weights=False) if isinstance(v.config, HRAConfig) else v.config
    for v in VARIANTS
    if not v.needs_kernel
}
TARGETS = ["stem", "up", "down"]  # of the MLP: a convolution, and linear layers with and without bias

every_method = pytest.mark.parametrize("method", METHODS)


def config(method: str, targets: Sequence[str] = TARGETS, **changes: Any) -> AdapterConfig:
    return replace(METHODS[method], target_modules=list(targets), **changes)


def adapted(plain: nn.Module, **configs: AdapterConfig) -> PeftModel:
    """A copy of a model with these adapters, all as if trained for a while; the first is active."""
    (first, *others) = configs.items()
    model = get_peft_model(copy.deepcopy(plain), first[1], first[0])
    for name, other in others:
        model.add_adapter(name, other)
    return randomized(model).train(plain.training)


def randomized(model: PeftModel) -> PeftModel:
    for layer in adapted_layers(model).values():
        train(layer.adapters)
    for wrapper in modules_to_save_wrappers(model).values():
        train(wrapper.modules_to_save)
    return model


def layers(model: PeftModel) -> dict[str, Any]:
    """The adapted layers, by their path in the base model."""
    return dict(adapted_layers(model.get_base_model()))


@torch.no_grad()
def weights(plain: nn.Module, model: PeftModel, names: Sequence[str], scales: Mapping[str, float]) -> dict[str, Tensor]:
    """For every adapted layer, the matrix that the adapters named make of the plain model's, one after the other."""
    out = {}
    for path, layer in layers(model).items():
        W = matrix(plain.get_submodule(path))
        for name in names:
            if name in layer.adapters:
                W = W + scales.get(name, 1.0) * (layer.adapters[name].weight(W) - W)
        out[path] = W
    return out


@torch.no_grad()
def composed(plain: nn.Module, model: PeftModel, names: Sequence[str], scales: Mapping[str, float] | None = None) -> nn.Module:
    """A copy of the plain model that holds those weights: what `model` must equal with these adapters active."""
    out = copy.deepcopy(plain)
    for path, W in weights(plain, model, names, scales or {}).items():
        module = out.get_submodule(path)
        module.weight.copy_(W.t() if isinstance(module, Conv1D) else W.reshape(module.weight.shape))
    return out


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: t.clone() for k, t in model.state_dict().items()}


def same_state(model: nn.Module, before: Mapping[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[k], t) for k, t in before.items())


def close(a: Tensor, b: Tensor) -> None:
    """Equal up to the rounding of their dtype, and never by shape alone."""
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5}[a.dtype]
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def differ(a: Tensor, b: Tensor) -> bool:
    a, b = a.detach(), b.detach()
    return float((a - b).norm() / b.norm()) > 1e-3


__all__ = [
    "METHODS",
    "MLP",
    "TARGETS",
    "adapted",
    "close",
    "composed",
    "config",
    "differ",
    "every_method",
    "layers",
    "randomized",
    "same_state",
    "state",
    "weights",
]
