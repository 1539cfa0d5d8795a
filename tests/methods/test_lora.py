"""LoRA: the baseline."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from halotune import LoraConfig
from halotune.core.layer import AdaptedLayer
from halotune.core.operator import WeightShape
from halotune.methods.lora import Lora


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 6 / 4), (True, 6 / 2)])
def test_weight_is_the_scaled_product(rslora, scaling):
    adapter = Lora.create(WeightShape(9, 13), LoraConfig(r=4, lora_alpha=6, use_rslora=rslora, init_weights=False))
    W = torch.randn(9, 13)
    expected = W + scaling * adapter.lora_B.weight @ adapter.lora_A.weight
    torch.testing.assert_close(adapter.weight(W), expected)


def test_a_convolutions_factors_are_kernels():
    """The two convolutions that peft applies, one after the other."""
    conv = nn.Conv2d(3, 10, (3, 2), stride=(2, 1), padding=(1, 0)).double()
    layer = AdaptedLayer(conv)
    adapter = Lora.create(layer.base.shape, LoraConfig(r=4, lora_alpha=6, init_weights=False)).double()
    layer.add("default", adapter)
    layer.active_adapters = ["default"]
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    z = nn.functional.conv2d(x, adapter.lora_A.weight, stride=conv.stride, padding=conv.padding)
    torch.testing.assert_close(layer(x), conv(x) + 1.5 * nn.functional.conv2d(z, adapter.lora_B.weight))


@pytest.mark.parametrize(("init", "identity"), [(True, True), ("gaussian", True), (False, False)])
def test_init(init, identity):
    adapter = Lora.create(WeightShape(60, 50), LoraConfig(r=40, init_weights=init))
    A, B = adapter.lora_A.weight.detach(), adapter.lora_B.weight.detach()
    assert bool((B == 0).all()) is identity
    assert abs(float(A.std()) / (1 / 40 if init == "gaussian" else (3 * 50) ** -0.5) - 1) < 0.1  # else Kaiming-uniform


def test_dropout_acts_in_training_only():
    layer = AdaptedLayer(nn.Linear(13, 9))
    layer.add("default", Lora.create(layer.base.shape, LoraConfig(r=4, lora_dropout=0.5, init_weights=False)))
    layer.active_adapters = ["default"]
    x = torch.randn(5, 13)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
