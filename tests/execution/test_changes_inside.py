"""What changes while a model's forward runs acts on the layers that run after it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from .cases import (
    METHODS,
    SPED_UP,
    Net,
    adapted,
    adapter_parameters,
    add,
    assert_same,
    every_method,
    inner,
    named,
    sample,
    square_sum,
    step,
    switches,
    trained,
)


class Guided(nn.Module):
    """Runs its net three times, the second time while something is changed."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.changed: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        with self.changed() as call:
            z = (call or self.net)(x)
        return torch.stack([y, z, self.net(x)])


# A change: given the adapted model, a context in which it is made. It yields what is called in it, None for the net.
# `want` is what the reference does instead: arguments of `Reference.weights`.


@contextmanager
def layers_disabled(model) -> Iterator[None]:
    for layer in switches(model):
        layer.enable_adapters(False)
    yield
    for layer in switches(model):
        layer.enable_adapters(True)


@contextmanager
def adapters_disabled(model) -> Iterator[None]:
    with model.disable_adapter():
        yield


@contextmanager
def another_adapter(model) -> Iterator[None]:
    model.set_adapter("other")
    yield
    model.set_adapter("default")


@contextmanager
def two_adapters(model) -> Iterator[None]:
    model.set_adapter(["other", "default"])
    yield
    model.set_adapter("default")


@contextmanager
def half_the_scale(model) -> Iterator[None]:
    model.set_scale("default", 0.5)
    yield
    model.set_scale("default", 1.0)


def frozen_values(model) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in adapter_parameters(model).items()}


@contextmanager
def parameters_frozen(model) -> Iterator[None]:
    parameters = trained(model)
    for p in parameters:
        p.requires_grad_(False)
    yield
    for p in parameters:
        p.requires_grad_(True)


@contextmanager
def no_grad(model) -> Iterator[None]:
    with torch.no_grad():
        yield


def other_values(model) -> dict[str, Tensor]:
    return {name: 2 * p + 0.1 for name, p in adapter_parameters(model).items()}


@contextmanager
def called_with_other_parameters(model) -> Iterator[Any]:
    start = "base_model.model.net."
    values = {name.removeprefix(start): p for name, p in other_values(model).items()}
    yield lambda x: functional_call(inner(model).net, values, (x,))


CHANGES = {
    layers_disabled: lambda model: {"active": ()},
    adapters_disabled: lambda model: {"active": ()},
    another_adapter: lambda model: {"active": ("other",)},
    two_adapters: lambda model: {"active": ("other", "default")},
    half_the_scale: lambda model: {"scale": 0.5},
    parameters_frozen: lambda model: {"values": frozen_values(model)},
    no_grad: lambda model: {"values": frozen_values(model)},
    called_with_other_parameters: lambda model: {"values": other_values(model)},
}
SPED_UP_CHANGES = [layers_disabled, adapters_disabled, parameters_frozen, no_grad]
CELLS = [(m, c) for m in METHODS for c in CHANGES] + [(m, c) for m in SPED_UP for c in SPED_UP_CHANGES]


@pytest.mark.parametrize(("method", "change"), CELLS, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_a_change_inside_a_forward(method, change):
    model, reference = adapted(method, Guided)
    if change in (another_adapter, two_adapters):
        add(model, reference, "other", "lora" if method == "hra" else method)
    inner(model).changed = lambda: change(model)
    x, net = sample(requires_grad=change is not no_grad), reference.part("net")

    def want(x=x):
        return torch.stack([net(x), net(x, **CHANGES[change](model)), net(x)])

    with torch.no_grad():
        for _ in range(3):
            assert_same([model(x)], [want()])
    leaves = [*trained(model), *([x] if x.requires_grad else [])]
    for _ in range(2):
        assert_same(step(lambda: model(x), leaves), step(want, leaves))


class Opened(nn.Module):
    """`q` and `k`, which prepare together, run while something is changed, in a pass that `o` of another shape has opened."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(12, 8)
        self.changed: Any = nullcontext

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.o(x))
        with self.changed():
            return self.q(torch.tanh(self.k(y)))


@every_method
def test_one_of_the_layers_that_prepare_together_is_frozen_inside_a_forward(method):
    model, reference = adapted(method, Opened, ["q", "k", "o"])
    of_q = [p for name, p in adapter_parameters(model).items() if ".q." in name]
    x, leaves = torch.randn(2, 12, dtype=torch.float64), trained(model)

    @contextmanager
    def q_frozen() -> Iterator[None]:
        for p in of_q:
            p.requires_grad_(False)
        yield
        for p in of_q:
            p.requires_grad_(True)

    def want() -> Tensor:
        parameters = adapter_parameters(model).items()
        return reference(x, values={name: p.detach() if ".q." in name else p for name, p in parameters})

    inner(model).changed = q_frozen
    assert_same(step(lambda: model(x), leaves), step(want, leaves))


@pytest.mark.parametrize("what", ["adapters", "base"])
@pytest.mark.parametrize("keep", [0, 1], ids=["", "cached"])
@every_method
def test_a_parameter_written_inside_a_forward(method, keep, what):
    """Without gradients: with them, autograd forbids it."""
    model, reference = adapted(method, Guided)
    model.eval()
    model.cache_weights(gib=keep)
    of = [lambda: adapter_parameters(model).values()] if what == "adapters" else []
    if what == "base":
        of = [
            lambda: [p for n, p in model.named_parameters() if n.endswith(("base_layer.weight", "base_layer.bias"))],
            reference.plain.parameters,
        ]

    def write(factor):
        for parameters in of:
            for p in parameters():
                p.mul_(factor)

    @contextmanager
    def written(sides=slice(None)):
        nonlocal of
        every = of
        of = every[sides]
        write(2.0)
        yield
        write(0.5)
        of = every

    inner(model).changed = lambda: written(slice(0, 1))
    x, net = sample(requires_grad=False), reference.part("net")
    with torch.no_grad():
        for _ in range(3):
            y = net(x)
            with written(slice(0, 1) if what == "adapters" else slice(1, 2)):
                z = net(x)
            assert_same([model(x)], [torch.stack([y, z, y])])


# -- autocast


class Casting(nn.Module):
    """Enters autocast by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x).float()


def decorated() -> nn.Module:
    """As accelerate enters it: the forward of the model itself is replaced."""
    net = Net()
    net.forward = torch.autocast("cpu", torch.bfloat16)(net.forward)  # type: ignore[method-assign]
    return net


class Alternating(nn.Module):
    """Enters it for its second block."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> Tensor:
        x = self.net.blocks[0](x)
        with torch.autocast("cpu", torch.bfloat16):
            x = self.net.blocks[1](x).float()
        return self.net.blocks[0](x)


def bound_again(model: nn.Module) -> None:
    """A decorated forward is bound to the module that was copied."""
    if "forward" in inner(model).__dict__:
        inner(model).forward = torch.autocast("cpu", torch.bfloat16)(type(inner(model)).forward.__get__(inner(model)))


@pytest.mark.parametrize("inject", [False, True], ids=["wrapped", "injected"])
@pytest.mark.parametrize("make", [Casting, decorated, Alternating])
@every_method
def test_autocast_entered_inside_a_forward(method, make, inject):
    model, reference = adapted(method, make, inject=inject, dtype=torch.float32, std=0.15)
    bound_again(model)
    x = sample(dtype=torch.float32)
    leaves = [*trained(model), x]

    def run(model):
        return model(x).float()

    want = step(lambda: run(reference), leaves)
    exact = copy.deepcopy(want)
    for _ in range(3):
        got = step(lambda: run(model), leaves)
        assert_close_in_bf16(got, exact)
    with torch.no_grad():
        assert_close_in_bf16([run(model)], [want[0]])


def assert_close_in_bf16(got, want) -> None:
    for a, b in zip(got, want, strict=True):
        assert float((a - b).norm()) <= 0.05 * float(b.norm()), f"{float((a - b).norm() / b.norm()):.3f}"


@every_method
def test_autocast_by_turns(method):
    """A pass under it, one without, and a layer prepared without it that then runs under it."""
    model, reference = adapted(method, dtype=torch.float32, std=0.15)
    x = sample(dtype=torch.float32)
    leaves = [*trained(model), x]
    for on in (False, True, False, False, True, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            want = step(lambda: reference(x), leaves, lambda y: square_sum(y.float()))
            got = step(lambda: model(x), leaves, lambda y: square_sum(y.float()))
        if on:
            assert_close_in_bf16([t.float() for t in got], [t.float() for t in want])
        else:
            assert_same(got, want, tolerance=1e-4)
        assert named(model)
