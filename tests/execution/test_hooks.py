"""Hooks on adapted layers, on the layers below them and on the model: they fire, and what they change counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halotune.core.layer import AdaptedLayer

from .cases import (
    Net,
    adapted,
    add,
    assert_agree,
    assert_same,
    every_method,
    every_method_and_sped_up,
    inner,
    sample,
    step,
    switches,
    trained,
)


def layer(model: nn.Module) -> Any:
    return inner(model).blocks[1].k


def scaled_output(module, args, y):
    return 2 * torch.tanh(y)


def scaled_input(module, args):
    return (args[0] * 0.5 + 0.1,)


def shifted(module, args, y):
    return y + 1


def scaled_gradient(module, grad_input, grad_output):
    return tuple(None if g is None else 2 * g for g in grad_input)


ON_THE_LAYER: list[Callable[[nn.Module], Any]] = [
    lambda module: module.register_forward_hook(scaled_output),
    lambda module: module.register_forward_pre_hook(scaled_input),
    lambda module: module.register_full_backward_hook(scaled_gradient),
]
# A shift commutes with what additive forms do beside the base layer.
ON_THE_BASE: list[Callable[[nn.Module], Any]] = [lambda module: module.register_forward_hook(shifted)]


@pytest.mark.parametrize("late", [False, True], ids=["first", "after passes"])
@pytest.mark.parametrize("hook", ON_THE_LAYER, ids=["output", "input", "gradient"])
@every_method_and_sped_up
def test_hooks_on_an_adapted_layer(method, hook, late):
    model, reference = adapted(method)
    x = sample()
    if late:
        assert_agree(model, reference, x, passes=2)
    handles = [hook(layer(model)), hook(reference.plain.get_submodule("blocks.1.k"))]
    assert_agree(model, reference, x, passes=2)
    for handle in handles:
        handle.remove()
    assert_agree(model, reference, x, passes=1)


@pytest.mark.parametrize("late", [False, True], ids=["first", "after passes"])
@every_method_and_sped_up
def test_a_hook_on_the_base_layer(method, late):
    model, reference = adapted(method)
    x = sample()
    if late:
        assert_agree(model, reference, x, passes=2)
    handles = [hook(m) for hook in ON_THE_BASE for m in (layer(model).base_layer, reference.plain.get_submodule("blocks.1.k"))]
    assert_agree(model, reference, x, passes=2)
    for handle in handles:
        handle.remove()
    assert_agree(model, reference, x, passes=1)


@every_method
def test_a_hook_that_changes_the_model_while_it_runs(method):
    """Adapters off after the first block, on again after the last; the next pass another adapter."""
    model, reference = adapted(method)
    add(model, reference, "other", method)
    x, first, last = sample(), *inner(model).blocks
    off = first.register_forward_hook(lambda *_: [m.enable_adapters(False) for m in switches(model)] and None)
    on = last.register_forward_hook(lambda *_: [m.enable_adapters(True) for m in switches(model)] and None)
    parts = [reference.part("blocks.0"), reference.part("blocks.1")]
    for adapter in ("default", "other", "default"):
        model.set_adapter(adapter)
        leaves = [*trained(model), x]
        want = step(lambda adapter=adapter: parts[1](parts[0](x, active=(adapter,)), active=()), leaves)
        for _ in range(2):
            assert_same(step(lambda: model(x), leaves), want)
            with torch.no_grad():
                assert_same([model(x)], want[:1])
    off.remove()
    on.remove()
    assert_agree(model, reference, x, passes=1)


class Recording(Net):
    """Features of inner layers, as probes take them, and a loss on them."""

    def forward(self, x: Tensor) -> Tensor:
        features: list[Tensor] = []
        handles = [block.k.register_forward_hook(lambda m, a, y: features.append(y)) for block in self.blocks]
        y = super().forward(x)
        for handle in handles:
            handle.remove()
        return torch.stack([y, *features])


@every_method_and_sped_up
def test_hooks_that_come_and_go_in_a_forward(method):
    model, reference = adapted(method, Recording)
    assert_agree(model, reference, sample())


@every_method
def test_parameters_that_are_whole_only_while_their_layer_runs(method):
    """As ZeRO-3 shards them, after passes in which they were whole."""
    model, reference = adapted(method)
    x = sample(requires_grad=False)
    with torch.no_grad():
        assert_same([model(x)], [want := reference(x)])

    def gather(layer, args) -> None:
        for p in layer.adapters.parameters():
            p.data = wholes[p]

    def shard(layer, *args) -> None:
        for p in layer.adapters.parameters():
            p.data = p.new_empty(0)

    wholes = {p: p.data for p in trained(model)}
    for layer in [m for m in model.modules() if isinstance(m, AdaptedLayer)]:
        shard(layer)
        layer.register_forward_pre_hook(gather)
        layer.register_forward_hook(shard)
    with torch.no_grad():
        for _ in range(2):
            assert_same([model(x)], [want])
