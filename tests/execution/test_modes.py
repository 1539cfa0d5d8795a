"""Passes under fake tensors, vmap and inference mode leave nothing that another pass trips over."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, vmap

from halotune.core.layer import AdaptedLayer

from .cases import (
    Net,
    adapted,
    adapter_parameters,
    add,
    assert_agree,
    assert_same,
    every_method,
    every_method_and_sped_up,
    named,
    sample,
    step,
    trained,
)


def under_vmap(model, x) -> None:
    values = {name: torch.stack([p.detach(), 2 * p.detach()]) for name, p in named(model).items()}
    with torch.no_grad():
        vmap(lambda v, x: functional_call(model, v, (x,)), (0, None))(values, x)


def under_fake_tensors(model, x) -> None:
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(x)).shape == x.shape


def under_fake_tensors_in_training(model, x) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(x)).shape == x.shape


def under_inference_mode(model, x) -> None:
    with torch.inference_mode():
        model(x)
        model(x)


def on_the_meta_device(model, x) -> None:
    copy.deepcopy(model).to("meta")(x.to("meta"))


WAYS = [under_vmap, under_fake_tensors, under_fake_tensors_in_training, under_inference_mode, on_the_meta_device]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@every_method
def test_ordinary_passes_after_it(method, way):
    model, reference = adapted(method, lambda: Net(1))
    if way is not under_fake_tensors_in_training:
        model.eval()
        model.cache_weights(gib=1)
    x = sample()
    way(model, x.detach())
    assert_agree(model, reference, x, passes=1)
    way(model, x.detach())  # what is kept by now does not disturb it, either
    with torch.no_grad():
        for _ in range(2):
            assert_same([model(x)], [reference(x)])
    assert_agree(model, reference, x, passes=1)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@every_method_and_sped_up
def test_a_gradient_through_a_frozen_adapter_after_inference(method, train):
    """Saliency of the input; an earlier layer that is trained."""
    model, reference = adapted(method)
    for p in trained(model):
        p.requires_grad_(False)
    front, x = nn.Linear(12, 12).double(), sample()
    leaves = [*front.parameters(), x]
    want = step(lambda: reference(front(x)), leaves)
    for _ in range(2):
        model.eval()
        under_inference_mode(model, x)
        model.train(train)
        assert_same(step(lambda: model(front(x)), leaves), want)


@every_method
def test_a_new_adapter_over_a_frozen_one_after_inference(method):
    model, reference = adapted(method)
    add(model, reference, "new", "lora")
    model.set_adapter(["default", "new"])
    for p in adapter_parameters(model, "default").values():
        p.requires_grad_(False)
    leaves, x = trained(model), sample()
    assert len(leaves) == len(adapter_parameters(model, "new"))
    want = step(lambda: reference(x, active=("default", "new")), leaves)
    for train in (True, False):
        model.eval()
        under_inference_mode(model, x)
        model.train(train)
        assert_same(step(lambda: model(x), leaves), want)


@every_method
def test_parameters_frozen_in_turn(method):
    """One layer after another: what was prepared without gradients does not stand in for what needs them."""
    model, reference = adapted(method)
    every, x = trained(model), sample()
    for i in range(0, len(every), 2):
        for k, p in enumerate(every):
            p.requires_grad_(k != i)
        leaves = [*trained(model), x]
        want = step(lambda: reference(x), leaves)
        assert_same(step(lambda: model(x), leaves), want)


@every_method
def test_backward_under_autocast(method):
    """A backward may be called inside of an autocast in which the forward was not."""
    model, reference = adapted(method, lambda: Net(1), dtype=torch.float32, std=0.1)
    parameters = trained(model)
    want = torch.autograd.grad(reference(sample(dtype=torch.float32)).square().sum(), parameters)
    y = model(sample(dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(y.square().sum(), parameters)
    for a, b in zip(got, want, strict=True):
        assert a.dtype is torch.float32
        assert float((a - b).norm() / b.norm()) < 0.05


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("form", ["activations", "weights"])
@every_method
def test_half_precision_base_under_autocast(method, form, device):
    """As Trainers do: the base in bf16, adapters in fp32, training and evaluation under autocast, more rows than few."""
    model, reference = adapted(method, lambda: Net(1), dtype=torch.float32, std=0.1)
    model.to(device)
    reference.plain.to(device)
    model.set_adapter_form(form)
    x = sample(2500, 12, dtype=torch.float32, requires_grad=False).to(device)
    want = reference(x)
    gradients = torch.autograd.grad(want.square().mean(), trained(model))
    for layer in model.modules():
        if isinstance(layer, AdaptedLayer):
            layer.base_layer.bfloat16()
    for training in (True, False):
        model.train(training)
        with torch.autocast(device, torch.bfloat16), torch.set_grad_enabled(training):
            got = model(x)
        assert float((got - want).detach().norm() / want.detach().norm()) < 0.03
        if training:
            found = torch.autograd.grad(got.float().square().mean(), trained(model))
            for a, b in zip(found, gradients, strict=True):
                assert a.dtype is torch.float32
                assert float((a - b).norm() / b.norm()) < 0.06
