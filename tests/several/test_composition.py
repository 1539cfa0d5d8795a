"""Several adapters on one model: which of them run, in which order, and which are trained."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import Tensor

from halotune import BoneConfig, HalotuneError, MissConfig, PeftModel
from halotune.core.config import AdapterConfig
from halotune.core.kinds import LowRank
from halotune.methods.loha import LoHa

from .models import (
    METHODS,
    MLP,
    adapted,
    close,
    composed,
    config,
    differ,
    every_method,
    layers,
    randomized,
    same_state,
    state,
)


def trained(model: PeftModel) -> set[str]:
    """The names of the adapters with parameters that are trained."""
    return {n.split(".adapters.")[1].split(".")[0] for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(METHODS, 2)))
@torch.no_grad()
def test_pairs_compose_in_order(crowd: PeftModel, plain: MLP, x: Tensor, first: str, second: str):
    crowd.set_adapter([first, second])
    y = crowd(x)
    close(y, composed(plain, crowd, [first, second])(x))
    assert trained(crowd) == {first, second}
    assert crowd.active_adapter == [first, second]
    crowd.set_adapter([second, first])
    adapters = layers(crowd)["stem"].adapters
    constant = all(isinstance(adapters[n], LowRank) or type(adapters[n]) is LoHa for n in (first, second))
    assert differ(crowd(x), y) is not constant  # maps commute where each adds a constant


@torch.no_grad()
def test_all_at_once(crowd: PeftModel, plain: MLP, x: Tensor):
    names = list(METHODS)
    crowd.set_adapter(names)
    forwards = crowd(x)
    close(forwards, composed(plain, crowd, names)(x))
    crowd.set_adapter(names[::-1])
    close(crowd(x), composed(plain, crowd, names[::-1])(x))
    assert differ(crowd(x), forwards)


@torch.no_grad()
def test_adapters_on_different_layers(plain: MLP, x: Tensor):
    model = adapted(plain, a=config("hra-r4", ["up"]), b=config("bat-r3", ["up", "down"]), c=config("loha-r2", ["stem"]))
    for names in itertools.permutations("abc"):
        model.set_adapter(list(names))
        close(model(x), composed(plain, model, names)(x))


@every_method
def test_one_trained_beside_one_frozen(plain: MLP, x: Tensor, method: str):
    """Gradients go through the frozen adapter into the other."""
    model = adapted(plain, a=config(method), b=config("hra-r4", ["up"]))
    model.set_adapter(["a", "b"])
    for layer in layers(model).values():
        layer.adapters["a"].requires_grad_(False)
    model(x).square().sum().backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {n for n, _ in model.named_parameters() if ".adapters.b." in n}

    parameter = layers(model)["blocks.0.up"].adapters["b"].hra_u
    direction = torch.randn_like(parameter)
    slope = float((parameter.grad * direction).sum())
    loss, h = [], 1e-6
    for step in (h, -2 * h):
        with torch.no_grad():
            parameter += step * direction
            loss.append(float(composed(plain, model, ["a", "b"])(x).square().sum()))
    assert slope == pytest.approx((loss[0] - loss[1]) / (2 * h), rel=1e-5)


# -- what is trained


@torch.no_grad()
def test_set_adapter_trains_exactly_the_active_ones(plain: MLP):
    model = adapted(plain, a=config("hra-r4"), b=config("lora-r2"), c=config("bat-r3"))
    assert model.active_adapter == "a" and trained(model) == {"a"}
    model.set_adapter("b")
    assert trained(model) == {"b"}
    model.set_adapter(["c", "a"], inference_mode=True)
    assert model.active_adapters == ["c", "a"] and trained(model) == set()
    model.set_adapter(["c", "a"])
    assert trained(model) == {"a", "c"}


def test_names_that_cannot_be_set(plain: MLP):
    model = adapted(plain, a=config("hra-r4"), b=config("lora-r2"))
    model.set_adapter(["b", "a"])
    with pytest.raises(HalotuneError, match=r"\['a', 'a'\] names an adapter twice"):
        model.set_adapter(["a", "a"])
    with pytest.raises(HalotuneError, match=r"no adapter named 'c'; the model has \['a', 'b'\]"):
        model.set_adapter(["a", "c"])
    assert model.active_adapters == ["b", "a"] and trained(model) == {"a", "b"}


# -- coming and going


@every_method
@torch.no_grad()
def test_an_adapter_of_another_method_comes_and_goes(plain: MLP, x: Tensor, method: str):
    model = adapted(plain, first=config("hra-r4", ["stem", "up"]))
    before, y = state(model), model(x)
    model.add_adapter("second", config(method, ["up", "down"]))
    assert torch.equal(model(x), y) and trained(model) == {"first"}  # it waits

    randomized(model)
    model.set_adapter(["first", "second"])
    close(model(x), composed(plain, model, ["first", "second"])(x))
    y = composed(plain, model, ["first"])(x)
    model.delete_adapter("second")
    assert model.active_adapters == ["first"] and list(model.peft_config) == ["first"]
    assert state(model).keys() == before.keys()
    close(model(x), y)


@torch.no_grad()
def test_deleting_one_of_several(plain: MLP, x: Tensor):
    model = adapted(plain, a=config("hra-r4"), b=config("bat-r3"), c=config("hra-r3"))
    model.set_adapter(["c", "b", "a"])
    model.delete_adapter("b")
    assert model.active_adapters == ["c", "a"] and trained(model) == {"a", "c"}
    close(model(x), composed(plain, model, ["c", "a"])(x))
    model.delete_adapter("c")
    with pytest.raises(HalotuneError, match=r"no adapter named 'c'; the model has \['a'\]"):
        model.delete_adapter("c")
    model.add_adapter("d", config("lora-r2"))
    with pytest.warns(UserWarning, match="active adapter 'a' was deleted; 'd' is active now"):
        model.delete_adapter("a")
    assert model.active_adapter == "d" and trained(model) == {"d"}
    close(model(x), composed(plain, model, ["d"])(x))


@torch.no_grad()
def test_an_adapter_added_while_another_is_merged(plain: MLP, x: Tensor):
    model = adapted(plain, a=config("hra-r4"))
    model.merge_adapter()
    model.add_adapter("b", config("bat-r3"))
    for layer in layers(model).values():
        layer.adapters["b"].bone_block.normal_(std=0.3)
    merged = model(x)
    with pytest.warns(UserWarning, match="base weights are restored"):
        model.set_adapter(["a", "b"])
    assert model.base_model.merged_adapters == []
    close(model(x), composed(plain, model, ["a", "b"])(x))
    close(merged, composed(plain, model, ["a"])(x))


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("how", ["unload", "merge_and_unload"])
@torch.no_grad()
def test_nothing_is_left_of_a_model_taken_apart(plain: MLP, x: Tensor, copied, how: str):
    """Nor of a copy that has run: no wrapper, and no hook."""
    model = copied(adapted(plain, a=config("hra-r4"), b=config("bat-r3", ["up"])))
    model.set_adapter(["a", "b"])
    expected = composed(plain, model, ["a", "b"] if how == "merge_and_unload" else [])(x)
    model(x)
    out = getattr(model, how)()
    close(out(x), expected)
    assert [type(m) for m in out.modules()] == [type(m) for m in plain.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in out.modules())


# -- two kinds of one method: in peft two kinds of MiSS on one model crash

KINDS = {
    "bone-bat": (BoneConfig(r=3), BoneConfig(r=3, init_weights="bat")),
    "bone-r3-r7": (BoneConfig(r=3), BoneConfig(r=7)),
    "bone-r7-bat-r3": (BoneConfig(r=7), BoneConfig(r=3, init_weights="bat")),
    "bat-r3-r1": (BoneConfig(r=3, init_weights="bat"), BoneConfig(r=1, init_weights="bat")),
    "balance-mini": (MissConfig(r=3), MissConfig(r=3, mini_r=3, init_weights="mini")),
    "mini-balance-r7": (MissConfig(r=2, mini_r=1, init_weights="mini"), MissConfig(r=7)),
    "mini-mini": (
        MissConfig(r=3, mini_r=1, init_weights="mini"),
        MissConfig(r=3, mini_r=3, init_weights="mini"),
    ),
    "miss-bat-mini": (MissConfig(r=3, init_weights="bat"), MissConfig(r=3, mini_r=3, init_weights="mini")),
    "bone-miss": (BoneConfig(r=3), MissConfig(r=3)),
}


@pytest.mark.parametrize("kinds", KINDS)
@torch.no_grad()
def test_two_kinds_side_by_side(plain: MLP, x: Tensor, tmp_path, kinds: str):
    first, second = KINDS[kinds]
    first.target_modules, second.target_modules = {"up", "down"}, {"stem", "up"}
    model = adapted(plain, a=first, b=second)
    for names in (["a"], ["b"], ["a", "b"], ["b", "a"]):
        model.set_adapter(names)
        close(model(x), composed(plain, model, names)(x))

    y = model(x)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "b", "b")
    loaded.load_adapter(tmp_path / "a", "a")
    loaded.set_adapter(["b", "a"])
    assert torch.equal(loaded(x), y)


@torch.no_grad()
def test_every_method_of_one_model_saved_and_loaded(crowd: PeftModel, plain: MLP, x: Tensor, tmp_path):
    crowd.save_pretrained(tmp_path)
    first, *others = METHODS
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / first, first)
    for name in others:
        loaded.load_adapter(tmp_path / name, name)
    for name in METHODS:
        for model in (crowd, loaded):
            model.set_adapter(name)
        assert torch.equal(loaded(x), crowd(x))
    for model in (crowd, loaded):
        model.set_adapter(others)
    assert torch.equal(loaded(x), crowd(x))


# -- modules fully fine-tuned


def whole(method: str) -> AdapterConfig:
    return config(method, ["up"], modules_to_save=["head"])


@torch.no_grad()
def test_only_one_trained_copy_of_a_module_can_run(plain: MLP, x: Tensor):
    model = adapted(plain, a=whole("hra-r4"), b=config("bat-r3"), c=whole("lora-r2"))
    model.set_adapter(["a", "b"])
    before, y = state(model), model(x)
    with pytest.raises(HalotuneError, match="head: a, c each hold a trained copy of this module, and only one can run"):
        model.set_adapter(["a", "c"])
    assert model.active_adapters == ["a", "b"] and same_state(model, before) and torch.equal(model(x), y)

    expected = composed(plain, model, ["b", "c"])
    expected.head.load_state_dict(model.get_base_model().head.modules_to_save["c"].state_dict())
    model.set_adapter(["b", "c"])
    close(model(x), expected(x))
    model.set_adapter("b")  # has no copy: the original runs
    close(model(x), composed(plain, model, ["b"])(x))
