"""`cache_weights`: BAT and LoHa of a large rank keep `W'` between passes without gradients."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from halotune import BoneConfig, HalotuneError, HRAConfig, LoHaConfig, PeftModel
from halotune.methods.bone import ops
from halotune.methods.bone.adapter import Bat, Bone
from halotune.methods.hra.adapter import HRA
from halotune.methods.loha.adapter import LoHa

from .cases import adapted

CONFIGS = {
    "hra": HRAConfig(r=4, target_modules="all-linear"),
    "bone": BoneConfig(r=4, target_modules="all-linear"),
    "bat": BoneConfig(r=4, init_weights="bat", target_modules="all-linear"),
    "loha": LoHaConfig(r=8, alpha=8, target_modules="all-linear"),
}
LAYER = 4 * 16 * 16  # bytes of one W'


def model_with(config) -> PeftModel:
    return adapted(lambda: nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16, bias=False)), config).eval()


@pytest.fixture
def built(monkeypatch) -> list[str]:
    """One entry for every W' that is made."""
    seen: list[str] = []
    for kind in (HRA, LoHa, Bone, Bat):

        def counted(self, W, weight=kind.weight):
            seen.append(type(self).__name__)
            return weight(self, W)

        monkeypatch.setattr(kind, "weight", counted)
    return seen


@pytest.mark.parametrize("name", CONFIGS)
def test_built_once_for_many_passes(name, built):
    model, x = model_with(CONFIGS[name]), torch.randn(3, 16)
    with torch.no_grad():
        want = model(x)
        assert not built
        model.cache_weights(gib=1)
        for _ in range(4):
            torch.testing.assert_close(model(x), want, atol=1e-5, rtol=1e-5)
    assert len(built) == 2
    assert model.cached_weights == (2, 2 * LAYER)


def test_the_budget_holds(built):
    model, x = model_with(CONFIGS["bat"]), torch.randn(3, 16)
    with torch.no_grad():
        want = model(x)
        model.cache_weights(gib=1.5 * LAYER / 2**30)
        for _ in range(3):
            assert torch.equal(model(x), want)
        assert model.cached_weights == (1, LAYER) and len(built) == 1
        model.cache_weights(gib=0)
        assert torch.equal(model(x), want) and model.cached_weights == (0, 0)


def change_data(model):
    model.base_model.model[0].adapters["default"].bone_block.data.mul_(2)  # bumps no version


def change_base(model):
    with torch.no_grad():
        model.base_model.model[0].base_layer.weight.mul_(2)


def merge(model):
    model.merge_adapter()


def disable(model):
    model.disable_adapter_layers()


@pytest.mark.parametrize("change", [change_data, change_base, merge, disable])
def test_what_changed_is_seen(change):
    model, x = model_with(CONFIGS["bat"]), torch.randn(3, 16)
    duplicate = copy.deepcopy(model)
    model.cache_weights(gib=1)
    with torch.no_grad():
        model(x)
        change(model), change(duplicate)
        assert torch.equal(model(x), duplicate(x))
        assert torch.equal(model(x), duplicate(x))


def test_training_gets_its_gradients_and_the_memory():
    model, x = model_with(CONFIGS["bat"]), torch.randn(3, 16)
    model.cache_weights(gib=1)
    with torch.no_grad():
        model(x)
    model.train()
    model(x).sum().backward()
    assert model.cached_weights == (0, 0)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_copies_start_empty():
    model, x = model_with(CONFIGS["bat"]), torch.randn(3, 16)
    model.cache_weights(gib=1)
    with torch.no_grad():
        want = model(x)
        for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert duplicate.cached_weights == (0, 0)
            assert torch.equal(duplicate(x), want)
            assert duplicate.cached_weights == (2, 2 * LAYER)


def test_a_budget_is_a_number_of_gib():
    with pytest.raises(HalotuneError, match="gib: expected"):
        model_with(CONFIGS["bat"]).cache_weights(gib=-1)


def test_the_definition_is_what_is_kept():
    model, x = model_with(CONFIGS["bat"]), torch.randn(3, 16)
    model.cache_weights(gib=1)
    with torch.no_grad():
        model(x)
        layer = model.base_model.model[0]
        W = ops.bat(layer.base_layer.weight, layer.adapters["default"].bone_block)
        kept = model.base_model.scope.cache._kept[layer.adapters["default"]].adapted
    assert torch.equal(kept, W)
