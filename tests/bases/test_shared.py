"""A module registered under two names is one module: adapted once, and shared afterwards as it was before."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from halotune import HRAConfig, PeftModel, get_peft_model
from halotune.core.layer import AdaptedLayer

from ..several.models import adapted, close, config, differ, every_method, layers, same_state, state


class Shared(nn.Module):
    """The same layer twice beside itself, and once more in a block."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first
        self.block = nn.ModuleDict({"third": self.first, "own": nn.Linear(6, 6)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second, self.block["third"], self.block["own"]):
            x = torch.tanh(layer(x))
        return x


NAMES = ["first", "second", "third"]


@pytest.fixture
def plain() -> Shared:
    return Shared().double().eval().requires_grad_(False)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 6, dtype=torch.float64)


def composed(plain: Shared, model: PeftModel, names: list[str]) -> Shared:
    out = copy.deepcopy(plain)
    for path, layer in layers(model).items():
        W = out.get_submodule(path).weight
        for n in names:
            if n in layer.adapters:
                W.copy_(layer.adapters[n].weight(W))
    return out


@pytest.mark.parametrize("targets", [NAMES, ["first"], ["second"], ["third", "own"], ["first", "second", "third", "own"]])
@every_method
@torch.no_grad()
def test_shared_before_shared_afterwards(plain: Shared, x: Tensor, method: str, targets: list[str]):
    model = adapted(plain, a=config(method, targets))
    base = model.get_base_model()
    assert base.first is base.second is base.block["third"] and isinstance(base.first, AdaptedLayer)
    assert len(layers(model)) == 1 + ("own" in targets)
    expected = composed(plain, model, ["a"])
    close(model(x), expected(x))
    assert differ(model(x), plain(x))

    before = state(model)
    model.merge_adapter()  # once, and without a word of tied weights
    close(model(x), expected(x))
    model.unmerge_adapter()
    assert same_state(model, before)
    out = model.merge_and_unload()
    assert out.first is out.second is out.block["third"] and type(out.first) is nn.Linear
    close(out(x), expected(x))


def test_gradients_add_up(plain: Shared, x: Tensor):
    model = adapted(plain, a=config("hra-r4", NAMES))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 1
    (whole,) = torch.autograd.grad(model(x).sum(), trained)
    apart = copy.deepcopy(model)  # the same function of three layers that are not shared
    base = apart.get_base_model()
    base.second, base.block["third"] = copy.deepcopy(base.first), copy.deepcopy(base.first)
    parts = torch.autograd.grad(apart(x).sum(), [p for p in apart.parameters() if p.requires_grad])
    assert len(parts) == 3
    close(whole, sum(parts))


@torch.no_grad()
def test_several_adapters_and_files(plain: Shared, x: Tensor, tmp_path):
    model = adapted(plain, a=config("hra-r4", NAMES), b=config("bat-r3", ["second", "own"]))
    model.set_adapter(["b", "a"])
    y = model(x)
    close(y, composed(plain, model, ["b", "a"])(x))
    model.add_weighted_adapter(["a"], [1], "c", "cat")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "b", "b")
    for name in "ac":
        loaded.load_adapter(tmp_path / name, name)
    loaded.set_adapter(["b", "a"])
    assert torch.equal(loaded(x), y)
    loaded.set_adapter(["b", "c"])
    close(loaded(x), y)
    loaded.delete_adapter("b")
    close(loaded(x), composed(plain, model, ["a"])(x))


def test_tied_weights_of_two_modules_are_another_matter(plain: Shared):
    """Two modules with one parameter: each is adapted on its own, and that is said."""
    plain.block["own"].weight = plain.first.weight
    with pytest.warns(UserWarning, match=r"first shares its weight with block\.own\.weight, which stays as it is"):
        model = get_peft_model(plain, HRAConfig(r=4, target_modules=["first"]))
    assert type(model.get_base_model().block["own"]) is nn.Linear
