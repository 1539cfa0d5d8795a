"""Gradients of gradients: gradient penalties, Hessian-vector products."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .cases import ALL, METHODS, WIDTH, adapted, assert_same, linear, sample, trained


class Critic(nn.Module):
    def __init__(self, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.last = layer(), layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def input_gradient(run, x: Tensor) -> tuple[Tensor, Tensor]:
    y = run(x)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return y, dx.square().sum()


def penalty_and_loss(run, parameters, x):
    """`loss.backward()`, as a critic is trained."""
    for t in (*parameters, x):
        t.grad = None
    y, penalty = input_gradient(run, x)
    (y.square().mean() + penalty).backward()
    return [t.grad.clone() for t in (*parameters, x)]


def grad_of_penalty_and_loss(run, parameters, x):
    y, penalty = input_gradient(run, x)
    return torch.autograd.grad(y.square().mean() + penalty, [*parameters, x])


def penalty_alone(run, parameters, x):
    return torch.autograd.grad(input_gradient(run, x)[1], parameters, allow_unused=True)


def hessian_vector_product(run, parameters, x):
    gradients = torch.autograd.grad(run(x).square().mean(), [*parameters, x], create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in gradients), [*parameters, x])


WAYS = [penalty_and_loss, grad_of_penalty_and_loss, penalty_alone, hessian_vector_product]
LAYERS = {
    "linear": (linear, (5, WIDTH)),
    "gpt2": (lambda: Conv1D(WIDTH, WIDTH), (5, WIDTH)),
    "conv1d": (lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding=1), (2, WIDTH, 5)),
}
CELLS = [(method, kind) for method in ALL for kind in LAYERS if kind == "linear" or method in METHODS]


@pytest.mark.parametrize("targets", [["last"], ["first"], ["first", "last"]], ids="+".join)
@pytest.mark.parametrize(("method", "kind"), CELLS)
def test_second_derivatives(method, kind, targets):
    layer, size = LAYERS[kind]
    model, reference = adapted(method, lambda: Critic(layer), targets)
    parameters, x = trained(model), sample(*size)
    for way in WAYS:
        want = way(reference, parameters, x)
        for _ in range(2):
            assert_same(way(model, parameters, x), want, none_is_zero=True)


@pytest.mark.parametrize("method", METHODS)
def test_second_derivatives_with_a_scale(method):
    model, reference = adapted(method, lambda: Critic(linear), ["first", "last"])
    model.set_scale("default", 0.5)
    parameters, x = trained(model), sample(5, WIDTH)
    for way in WAYS:
        want = way(lambda x: reference(x, scale=0.5), parameters, x)
        assert_same(way(model, parameters, x), want, none_is_zero=True)


@pytest.mark.parametrize("method", METHODS)
def test_second_derivatives_through_a_frozen_adapter(method):
    model, reference = adapted(method, lambda: Critic(linear), ["first", "last"])
    model.requires_grad_(False)
    x = sample(5, WIDTH)
    want = penalty_and_loss(reference, [], x)
    assert_same(penalty_and_loss(model, [], x), want)


@pytest.mark.parametrize("method", METHODS)
def test_second_derivatives_as_weights(method):
    """W' of both layers in one node, whose backward is recorded."""
    model, reference = adapted(method, lambda: Critic(linear), ["first", "last"])
    model.set_adapter_form("weights")
    parameters, x = trained(model), sample(5, WIDTH)
    for way in WAYS:
        want = way(reference, parameters, x)
        for _ in range(2):
            assert_same(way(model, parameters, x), want, none_is_zero=True)
