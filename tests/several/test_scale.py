"""`set_scale(adapter, s)`: `W + s (F(W) − W)`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halotune import HalotuneError, PeftModel
from halotune.core.kinds import Dense

from .models import MLP, adapted, close, composed, config, differ, every_method, layers


@pytest.fixture(autouse=True)
def as_before(crowd: PeftModel):
    yield
    crowd.unmerge_adapter()
    for name in crowd.peft_config:
        crowd.set_scale(name, 1.0)


@pytest.mark.parametrize("scale", [-0.7, 0.25, 1, 2.5])
@every_method
@torch.no_grad()
def test_scale(crowd: PeftModel, plain: MLP, x: Tensor, method: str, scale: float):
    crowd.set_adapter(method)
    crowd.set_scale(method, scale)
    expected = composed(plain, crowd, [method], {method: scale})
    close(crowd(x), expected(x))
    assert differ(expected(x), plain(x)) and differ(crowd(x), composed(plain, crowd, [method])(x)) is (scale != 1)
    crowd.merge_adapter()
    close(crowd(x), expected(x))
    for path, layer in layers(crowd).items():
        close(layer.base_layer.weight, expected.get_submodule(path).weight)


@every_method
@torch.no_grad()
def test_zero_is_the_base_bit_for_bit(crowd: PeftModel, plain: MLP, x: Tensor, method: str):
    crowd.set_adapter(method)
    y = crowd(x)
    crowd.set_scale(method, 0)
    with crowd.disable_adapter():
        base = crowd(x)
    assert torch.equal(base, plain(x)) and differ(y, base)
    if isinstance(layers(crowd)["stem"].adapters[method], Dense):
        close(crowd(x), base)  # the same product, by another kernel
    else:
        assert torch.equal(crowd(x), base)
    report = crowd.merge_adapter()
    assert report.total().changed_weights == 0 and torch.equal(crowd(x), base)
    crowd.unmerge_adapter()
    crowd.set_scale(method, 1)
    assert torch.equal(crowd(x), y)


@every_method
@torch.no_grad()
def test_scales_of_several(crowd: PeftModel, plain: MLP, x: Tensor, method: str):
    names, scales = [method, "hra-r3", "bat-r3"], {method: 0.5, "hra-r3": -0.3, "bat-r3": 1.5}
    names = list(dict.fromkeys(names))
    crowd.set_adapter(names)
    for name in names:
        crowd.set_scale(name, scales[name])
    close(crowd(x), composed(plain, crowd, names, scales)(x))
    crowd.merge_adapter(names[:1])  # the others still apply, scaled
    close(crowd(x), composed(plain, crowd, names, scales)(x))


def test_gradients_are_scaled(plain: MLP, x: Tensor):
    """The delta of LoRA is linear in B: half the scale, half of its gradient at the same outputs' gradient."""
    model = adapted(plain, a=config("lora-r2", ["up"]))
    B = layers(model)["blocks.1.up"].adapters["a"].lora_B.weight
    probe = torch.randn(5, 7, 4, dtype=torch.float64)
    with torch.no_grad():
        for layer in layers(model).values():
            layer.adapters["a"].lora_B.weight.zero_()
    (full,) = torch.autograd.grad(model(x), B, probe)
    model.set_scale("a", 0.5)
    (half,) = torch.autograd.grad(model(x), B, probe)
    assert full.abs().max() > 1e-3
    close(half, full / 2)


@torch.no_grad()
def test_refused_while_merged(plain: MLP, x: Tensor):
    model = adapted(plain, a=config("hra-r4"), b=config("hra-r4"))
    model.merge_adapter()
    y = model(x)
    with pytest.raises(HalotuneError, match=r"'a' is merged, so its scale is fixed. Call unmerge_adapter\(\) first"):
        model.set_scale("a", 0.5)
    assert torch.equal(model(x), y)
    model.set_scale("b", 0.5)  # b is not merged
    model.unmerge_adapter()
    close(model(x), composed(plain, model, ["a"])(x))
    with pytest.raises(HalotuneError, match=r"no adapter named 'c'; the model has \['a', 'b'\]"):
        model.set_scale("c", 0.5)
