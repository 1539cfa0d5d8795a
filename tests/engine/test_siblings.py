"""Layers that are given the same input run together, and nobody can tell but by the clock."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from halotune import LoraConfig, PeftModel
from halotune.core.layer import AdaptedLayer
from halotune.engine.lending import Lending

from .cases import CONFIGS, adapted, trained

families = pytest.mark.parametrize("name", [name for name in CONFIGS if name != "oft"])  # its layers stay alone


class Attention(nn.Module):
    """q, k and v of one input, called as `calls` says, and an output."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 16)
        self.o = nn.Linear(16, 16)
        self.calls: Callable[[Attention, Tensor], list[Tensor]] = together

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.calls(self, x)
        return x + self.o(torch.tanh(q * k) + v)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Attention(), Attention()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def together(self: Attention, x: Tensor) -> list[Tensor]:
    return [self.q(x), self.k(x), self.v(x)]


def another_input(self: Attention, x: Tensor) -> list[Tensor]:
    return [self.q(x), self.k(x * 2), self.v(x)]


def written_between(self: Attention, x: Tensor) -> list[Tensor]:
    x = x.clone()
    q = self.q(x)
    return [q, self.k(x.mul_(2)), self.v(x)]


def another_order(self: Attention, x: Tensor) -> list[Tensor]:
    v, k = self.v(x), self.k(x)
    return [self.q(x), k, v]


def one_left_out(self: Attention, x: Tensor) -> list[Tensor]:
    q = self.q(x)
    return [q, self.k(x), q]


def one_twice(self: Attention, x: Tensor) -> list[Tensor]:
    return [self.q(x), self.k(x) + self.k(x), self.v(x)]


def one_without_gradients(self: Attention, x: Tensor) -> list[Tensor]:
    q = self.q(x)
    with torch.no_grad():
        k = self.k(x)
    return [q, k, self.v(x)]


def one_unused(self: Attention, x: Tensor) -> list[Tensor]:
    q, k, v = self.q(x), self.k(x), self.v(x)
    return [q, k.detach(), v]


def checkpointed(self: Attention, x: Tensor) -> list[Tensor]:
    return list(checkpoint(lambda x: (self.q(x), self.k(x), self.v(x)), x, use_reentrant=False))


def checkpointed_reentrant(self: Attention, x: Tensor) -> list[Tensor]:
    return list(checkpoint(lambda x: (self.q(x), self.k(x), self.v(x)), x, use_reentrant=True))


WAYS = [
    another_input, another_order, one_left_out, one_twice, one_without_gradients, one_unused, checkpointed,
    checkpointed_reentrant,
]  # fmt: skip


def model_of(name: str) -> PeftModel:
    return adapted(lambda: Model().double(), CONFIGS[name])


def attentions(model: nn.Module) -> list[Attention]:
    return [m for m in model.modules() if isinstance(m, Attention)]


def lending(model: nn.Module) -> Lending:
    hooks = [hook for m in model.modules() for hook in m._forward_pre_hooks.values()]
    return next(owner for hook in hooks if isinstance(owner := getattr(hook, "__self__", None), Lending))


def sizes(model: nn.Module) -> list[int]:
    return sorted(len(family.layers) for family in lending(model).families)


def sample() -> Tensor:
    return torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and of all parameters."""
    x = x.clone().requires_grad_()
    for p in trained(model):
        p.grad = None
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad if p.grad is not None else torch.zeros_like(p) for p in trained(model))]  # type: ignore[list-item]


def defined(model: nn.Module) -> nn.Module:
    """The same by `W'` of every layer."""
    model = copy.deepcopy(model)
    for block in attentions(model):
        block._compiled_call_impl = None
    for layer in [m for m in model.modules() if isinstance(m, AdaptedLayer)]:

        def forward(x: Tensor, layer: AdaptedLayer = layer) -> Tensor:
            adapter = layer.adapters["default"]
            return nn.functional.linear(x, adapter.weight(layer.base_layer.weight), layer.base_layer.bias)

        layer.forward = forward  # type: ignore[method-assign]
    return model


def by_definition(model: nn.Module, x: Tensor) -> list[Tensor]:
    return gradients(defined(model), x)


@families
def test_they_are_found_by_one_pass_and_compute_the_same(name):
    model, x = model_of(name), sample()
    alone = gradients(model, x)
    assert sizes(model) == [1, 1, 3, 3]
    torch.testing.assert_close(gradients(model, x), alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(alone, by_definition(model, x), rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(model(x), alone[0], rtol=1e-12, atol=1e-12)
    assert sizes(model) == [1, 1, 3, 3]


@families
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_model_that_calls_them_in_another_way(name, way):
    """After they were found together: results are those of the definition in this pass and in the next."""
    model, x = model_of(name), sample()
    model(x)
    assert sizes(model) == [1, 1, 3, 3]
    for block in attentions(model):
        block.calls = way
    expected = by_definition(model, x)
    for _ in range(2):
        torch.testing.assert_close(gradients(model, x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("way", [another_input, one_twice, one_left_out], ids=lambda way: way.__name__)
def test_those_that_were_never_siblings(way):
    model, x = model_of("hra"), sample()
    for block in attentions(model):
        block.calls = way
    gradients(model, x)
    torch.testing.assert_close(gradients(model, x), by_definition(model, x), rtol=1e-9, atol=1e-9)
    assert 3 not in sizes(model)


def test_a_family_that_broke_is_given_up():
    model, x = model_of("hra"), sample()
    model(x)
    attentions(model)[0].calls = another_input
    model(x)
    assert sizes(model) == [1, 1, 1, 1, 1, 3]


def test_a_pass_that_failed_is_not_learned_from():
    model, x = model_of("hra"), sample()
    with pytest.raises(RuntimeError):
        model(x[..., :3])
    model(x)
    assert sizes(model) == [1, 1, 3, 3]


# torch's own compiler does both:
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_layers_that_run_in_a_compiled_graph_are_left_to_it():
    torch.compiler.reset()
    model, x = model_of("hra"), sample()
    for block in attentions(model):
        block.compile(fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(gradients(model, x), by_definition(model, x), rtol=1e-9, atol=1e-9)
        assert sizes(model) == []


def test_adapters_of_two_dtypes_are_no_siblings():
    model, x = model_of("hra"), sample()
    attentions(model)[0].k.float()
    attentions(model)[0].k.base_layer.double()  # type: ignore[union-attr]
    for _ in range(2):
        torch.testing.assert_close(gradients(model, x)[0], by_definition(model, x)[0], rtol=1e-5, atol=1e-5)
    assert sizes(model) == [1, 1, 1, 2, 3]


def test_nothing_is_held_after_a_pass():
    model, x = model_of("hra"), torch.randn(3, 13, 16, dtype=torch.float64)
    model(x)
    attentions(model)[0].calls = one_left_out
    y = model(x)
    assert not any(w for family in lending(model).families for w in family.waiting)
    assert all(layer.quick is None for family in lending(model).families for layer in family.layers)
    del y
    gc.collect()
    held = [t for t in gc.get_objects() if type(t) is Tensor and t.shape == x.shape and t is not x]
    assert not held


@families
def test_a_hook_or_a_trained_weight_on_one_of_them(name):
    """Its base is no plain matrix then."""
    model, x = model_of(name), sample()
    expected = gradients(model, x)
    layer = attentions(model)[0].k
    assert isinstance(layer, AdaptedLayer)
    calls: list[int] = []
    handle = layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(gradients(model, x), expected, rtol=1e-9, atol=1e-9)
    assert sizes(model) == [1, 1, 1, 1, 1, 3]
    assert calls or name in ("loha-dense", "bat")  # those build W' and put it in the base's place
    handle.remove()
    torch.testing.assert_close(gradients(model, x), expected, rtol=1e-9, atol=1e-9)


@families
def test_one_frozen_adapter(name):
    model, x = model_of(name), sample()
    for p in attentions(model)[1].q.parameters():
        p.requires_grad_(False)
    model(x)
    torch.testing.assert_close(gradients(model, x), by_definition(model, x), rtol=1e-9, atol=1e-9)


@families
def test_without_gradients_for_the_input(name):
    model, x = model_of(name), sample()
    expected = by_definition(model, x)[2:]
    model(x)
    for p in trained(model):
        p.grad = None
    model(x).square().sum().backward()
    torch.testing.assert_close([p.grad for p in trained(model)], expected, rtol=1e-9, atol=1e-9)


@families
def test_without_gradients_every_pass_gives_the_same_bits(name):
    model, x = model_of(name).float(), sample().float()
    with torch.no_grad():
        first = model(x)
    gradients(model, x)
    assert 3 in sizes(model)
    with torch.no_grad():
        assert torch.equal(model(x), first)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_an_input_that_is_written_to_in_between(mode):
    model, x = model_of("hra"), sample()
    model(x)
    with mode():
        plain = defined(model)(x)
        torch.testing.assert_close(model(x), plain)
        for block in attentions(model):
            block.calls = written_between
        written = defined(model)(x)
        for _ in range(2):
            torch.testing.assert_close(model(x), written)
    assert not torch.allclose(written, plain)


@families
def test_another_adapter_has_siblings_of_its_own(name):
    model, x = model_of(name), sample()
    first = gradients(model, x)[0]
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q", "k", "o"], init_weights=False))
    model.set_adapter("other")
    model(x)
    assert sizes(model) == [1, 1, 2, 2]
    model.set_adapter("default")
    torch.testing.assert_close(model(x).detach(), first)
    torch.testing.assert_close(model(x).detach(), first)


def test_a_copy_and_the_original():
    model, x = model_of("hra"), sample()
    expected = gradients(model, x)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in trained(twin):
            p.zero_()
    twin(x)
    twin(x)
    torch.testing.assert_close(gradients(model, x), expected, rtol=1e-12, atol=1e-12)
