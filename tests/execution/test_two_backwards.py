"""Several backward passes through one forward, each of its own part, or again through the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from .cases import Net, adapted, assert_same, every_method, every_method_and_sped_up, linear, sample, trained


class ActorCritic(nn.Module):
    """Two heads, of one input or of two; a trunk in front or none."""

    def __init__(self, one_input: bool) -> None:
        super().__init__()
        self.policy, self.value = linear(), linear()
        self.one_input = one_input

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.policy(x), self.value(x if self.one_input else 2 * x)


@pytest.mark.parametrize("one_input", [True, False], ids=["one_input", "two_inputs"])
@every_method_and_sped_up
def test_one_for_each_output(method, one_input):
    model, reference = adapted(method, lambda: ActorCritic(one_input), ["policy", "value"])
    parameters = trained(model)

    def run(model, x):
        for t in (*parameters, x):
            t.grad = None
        policy, value = model(x)
        value.square().mean().backward()
        policy.square().mean().backward()
        return [p.grad for p in parameters] + [x.grad]

    for seed in range(3):
        for requires_grad in (False, True):
            x = sample(4, 12, seed=seed, requires_grad=requires_grad)
            want = run(reference, x)
            assert_same(run(model, x), want)


@every_method_and_sped_up
def test_again_through_the_same(method):
    """`retain_graph=True`, and gradients of every parameter asked for one by one."""
    model, reference = adapted(method)
    parameters, x = trained(model), sample()

    def run(model):
        y = model(x)
        rows = [torch.autograd.grad(row.sum(), [*parameters, x], retain_graph=True) for row in y]
        single = [torch.autograd.grad(y.square().sum(), [p], retain_graph=True)[0] for p in parameters]
        return [t for row in rows for t in row] + single

    want = run(reference)
    for _ in range(2):
        assert_same(run(model), want)


@every_method
def test_forwards_first_then_backwards(method):
    """Micro-batches of a pipeline: two forwards, then their backwards, in both orders."""
    model, reference = adapted(method, lambda: Net(1))
    parameters, xs = trained(model), [sample(seed=1), sample(3, 12, seed=2)]

    def run(model, order):
        ys = [model(x) for x in xs]
        return [t for i in order for t in torch.autograd.grad(ys[i].square().sum(), [*parameters, xs[i]])]

    for order in ((0, 1), (1, 0)):
        want = run(reference, order)
        for _ in range(2):
            assert_same(run(model, order), want)


@every_method
def test_gradients_accumulate(method):
    model, reference = adapted(method)
    parameters = trained(model)

    def run(model):
        for p in parameters:
            p.grad = None
        for seed in range(3):
            model(sample(seed=seed)).square().sum().backward()
        return [p.grad for p in parameters]

    assert_same(run(model), run(reference))
