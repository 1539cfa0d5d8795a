"""torch.func over adapter parameters and inputs; forward-mode derivatives; `functional_call`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from .cases import Net, adapted, adapter_parameters, add, assert_same, every_method, every_method_and_sped_up, named, sample

# torch's own forward-mode derivatives are scripted when they are first asked for.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated:DeprecationWarning")

Values = dict[str, Tensor]


def batched(values: Values) -> Values:
    return {name: torch.stack([p, 1.1 * p]) for name, p in values.items()}


def flat(tree: object) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, Tensor)]


# Each is given the model as a function of parameters and input.


def gradients(call, values, x):
    return grad(lambda v: call(v, x).square().sum())(values)


def gradients_per_sample(call, values, x):
    return vmap(grad(lambda v, row: call(v, row[None]).square().sum()), (None, 0))(values, x)


def along_parameters(call, values, x):
    return jvp(lambda v: call(v, x), (values,), ({name: torch.ones_like(p) for name, p in values.items()},))


def along_the_input(call, values, x):
    return jvp(lambda x: call(values, x), (x,), (torch.ones_like(x),))


def pulled_back(call, values, x):
    y, pull = vjp(call, values, x)
    return y, pull(torch.ones_like(y))


def jacobian(call, values, x):
    return jacrev(lambda v: call(v, x[:1]).sum(-1))(values), jacfwd(lambda x: call(values, x[:1]))(x)


def second_derivatives(call, values, x):
    return hessian(lambda x: call(values, x).square().sum())(x[:1])


def ensemble(call, values, x):
    return vmap(call, (0, None))(batched(values), x)


def ensemble_without_gradients(call, values, x):
    with torch.no_grad():
        return ensemble(call, values, x)


def dual_numbers(call, values, x):
    with forward_ad.dual_level():
        y = call(values, forward_ad.make_dual(x, torch.ones_like(x)))
        return forward_ad.unpack_dual(y).tangent


WAYS = [
    gradients, gradients_per_sample, along_parameters, along_the_input, pulled_back, jacobian, second_derivatives, ensemble,
    ensemble_without_gradients, dual_numbers,
]  # fmt: skip
every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


@every_way
@every_method_and_sped_up
def test_transforms(method, way):
    model, reference = adapted(method, lambda: Net(1))
    values = {name: p.detach() for name, p in named(model).items()}
    x = sample(3, 12, requires_grad=False)
    want = flat(way(lambda v, x: reference(x, values=v), values, x))
    for _ in range(2):
        assert_same(flat(way(lambda v, x: functional_call(model, v, (x,)), values, x)), want, none_is_zero=True)
    y = reference(x)
    assert_same([model(x)], [y])
    with torch.no_grad():
        for _ in range(2):
            assert_same([model(x)], [y])


@every_method
def test_gradients_through_parameters_that_are_computed(method):
    """As hypernetworks and meta-learning do: an inner step, then the gradient of what it led to."""
    model, reference = adapted(method, lambda: Net(1))
    start, x = named(model), sample(3, 12, requires_grad=False)

    def meta(call):
        loss = call(start, x).square().sum()
        slopes = torch.autograd.grad(loss, list(start.values()), create_graph=True)
        moved = {n: p - 0.01 * g for (n, p), g in zip(start.items(), slopes, strict=True)}
        return torch.autograd.grad(call(moved, x).square().sum(), list(start.values()))

    want = meta(lambda v, x: reference(x, values=v))
    for _ in range(2):
        assert_same(meta(lambda v, x: functional_call(model, v, (x,))), want)


@every_method
def test_an_adapter_over_a_frozen_one_with_parameters_that_are_replaced(method):
    """In backward the frozen one has its own parameters again; what it made of W is made again from the others."""
    model, reference = adapted(method)
    add(model, reference, "frozen", "bone")
    model.set_adapter(["frozen", "default"])
    values = {name: (p + 0.05).detach() for name, p in adapter_parameters(model).items()}
    leaves = [v.requires_grad_() for name, v in values.items() if ".frozen." not in name]
    x = sample()
    found = torch.autograd.grad(functional_call(model, values, (x,)).square().sum(), leaves)
    y = reference(x, active=("frozen", "default"), values=values)
    assert_same(found, torch.autograd.grad(y.square().sum(), leaves))
