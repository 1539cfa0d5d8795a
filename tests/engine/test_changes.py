"""Whatever changes between two passes, or while nobody looks, is seen by the next one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType

import pytest
import torch
from torch import Tensor, nn

from halotune import HRAConfig, LoraConfig, PeftModel
from halotune.core.layer import AdaptedLayer

from .cases import CONFIGS, adapted


def model_of(config) -> PeftModel:
    def base() -> nn.Module:
        layers = nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16, bias=False)
        return nn.Sequential(*layers).double()

    return adapted(base, config).eval()


def first(model: nn.Module) -> AdaptedLayer:
    return next(m for m in model.modules() if isinstance(m, AdaptedLayer))


def parameter(layer: AdaptedLayer) -> nn.Parameter:
    return next(layer.adapters.parameters())


def doubled(t: Tensor) -> nn.Parameter:
    return nn.Parameter(2 * t.detach(), requires_grad=False)


def write_past_the_version(layer: AdaptedLayer) -> None:
    parameter(layer).data.mul_(torch.linspace(-1, 2, parameter(layer).numel()).view_as(parameter(layer)))


def write_a_parameter(layer: AdaptedLayer) -> None:
    with torch.no_grad():
        write_past_the_version(layer)


def replace_a_parameter(layer: AdaptedLayer) -> None:
    owner = next(m for m in layer.adapters.modules() if m._parameters)
    name, p = next(iter(owner.named_parameters()))
    owner.register_parameter(name, nn.Parameter(p.detach().flip(0), requires_grad=p.requires_grad))


def replace_the_adapter(layer: AdaptedLayer) -> None:
    layer.adapters["default"] = copy.deepcopy(layer.adapters["default"])
    write_a_parameter(layer)


def replace_the_base(layer: AdaptedLayer) -> None:
    layer.base_layer = nn.Linear(16, 16).double().requires_grad_(False)


def replace_the_weight(layer: AdaptedLayer) -> None:
    layer.base_layer.weight = doubled(layer.base_layer.weight)


def replace_the_bias(layer: AdaptedLayer) -> None:
    layer.base_layer.bias = doubled(layer.base_layer.bias)


def write_the_weight(layer: AdaptedLayer) -> None:
    with torch.no_grad():
        layer.base_layer.weight.mul_(2)


def twice_the_product(self: nn.Linear, x: Tensor) -> Tensor:
    return 2 * nn.functional.linear(x, self.weight)


def patch_the_base(layer: AdaptedLayer) -> None:
    layer.base_layer.forward = MethodType(twice_the_product, layer.base_layer)  # type: ignore[method-assign]


def hook_the_base(layer: AdaptedLayer) -> None:
    layer.base_layer.register_forward_hook(lambda module, args, y: 2 * y)


CHANGES: list[Callable[[AdaptedLayer], object]] = [
    write_a_parameter,
    write_past_the_version,
    replace_a_parameter,
    replace_the_adapter,
    replace_the_base,
    replace_the_weight,
    replace_the_bias,
    write_the_weight,
    patch_the_base,
    hook_the_base,
    lambda layer: layer.enable_adapters(False),
    lambda layer: layer.set_scale("default", 0.25),
    lambda layer: layer.set_adapter([]),
    lambda layer: layer.delete_adapter("default"),
]
names = [change.__name__.replace("<lambda>", f"call-{i}") for i, change in enumerate(CHANGES)]


@pytest.mark.parametrize("change", CHANGES, ids=names)
@pytest.mark.parametrize("mode", ["no_grad", "cached", "grad"])
@pytest.mark.parametrize("name", ["hra", "bat", "lora"])
def test_a_change_is_seen_by_the_next_pass(name, mode, change):
    model, x = model_of(CONFIGS[name]), torch.randn(3, 16, dtype=torch.float64)
    if mode == "cached":
        model.cache_weights(gib=1)
    with torch.set_grad_enabled(mode == "grad"):
        before = [model(x) for _ in range(3)][-1]
        change(first(model))
        fresh = copy.deepcopy(model)  # a copy prepares itself anew
        after = [model(x) for _ in range(3)]
        want = fresh(x)
    assert not torch.allclose(want, before)
    for y in after:
        torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["no_grad", "grad"])
def test_dropout_is_seen(mode):
    model, x = model_of(LoraConfig(r=3, lora_dropout=0.5, target_modules="all-linear")), torch.randn(3, 16).double()
    with torch.set_grad_enabled(mode == "grad"):
        still = [model(x) for _ in range(3)]
        model.train()
        assert not torch.allclose(model(x), model(x))
        model.eval()
        torch.testing.assert_close(model(x), still[0])


def test_a_hook_on_all_modules_is_seen():
    model, x = model_of(HRAConfig(r=4, target_modules="all-linear")), torch.randn(3, 16).double()
    called: list[nn.Module] = []
    with torch.no_grad():
        for _ in range(3):
            model(x)
        handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: called.append(module))
        try:
            model(x)
        finally:
            handle.remove()
    assert first(model).base_layer in called


def test_gradients_and_none_in_turn():
    model, x = model_of(CONFIGS["hra"]), torch.randn(3, 16, dtype=torch.float64)
    model.cache_weights(gib=1)
    for _ in range(3):
        with torch.no_grad():
            without = model(x)
        model.zero_grad()
        model.train()
        y = model(x)
        y.square().sum().backward()
        model.eval()
        torch.testing.assert_close(y.detach(), without, rtol=1e-9, atol=1e-9)
        assert parameter(first(model)).grad is not None
        with torch.no_grad():
            parameter(first(model)).add_(0.1)
