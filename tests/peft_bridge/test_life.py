"""What peft documents for these methods goes on working on a model that was sped up: adapters come, go, switch and merge."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import halotune
from halotune import HalotuneError
from halotune.integrations.peft_bridge.layer import FastLayer

from ..interop.models import base, error, inputs, output, randomize
from .models import LLAMA, MLP, QV, Single, calm, every, fast_layers, in_order, live, pair, peft, same, tensors, two

pytestmark = calm


# -- adapters


def by_peft(model: Any) -> torch.Tensor:
    """What peft's own layers would answer."""
    return output(halotune.slow_down(copy.deepcopy(model)))


@in_order
def test_an_adapter_on_other_modules_is_covered(config: Any) -> None:
    model = halotune.speed_up(live(config()))
    model.add_adapter("b", config(target_modules=["q_proj", "o_proj"]))
    model.set_adapter("b")
    randomize(model, seed=1).eval()
    assert error(output(model), by_peft(model)) < 1e-5
    assert len(fast_layers(model)) == 6
    model.base_model.set_adapter(["default", "b"])
    assert error(output(model), by_peft(model)) < 1e-5


@every
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False], ids=["meta", "plain"])
def test_loading_later(config: Any, low_cpu_mem_usage: bool, tmp_path) -> None:
    other = live(config(target_modules=[*QV, "down_proj"] if config is not LLAMA["bat"] else QV), seed=3)
    expected = output(other)
    other.save_pretrained(tmp_path)
    model = halotune.speed_up(live(config()))
    output(model)
    model.load_adapter(tmp_path, "other", low_cpu_mem_usage=low_cpu_mem_usage)
    model.set_adapter("other")
    assert error(output(model), expected) < 1e-5
    assert fast_layers(model) == fast_layers(halotune.speed_up(other))


@every
def test_loading_without_memory_and_speeding_up_at_once(config: Any, tmp_path) -> None:
    other = live(config())
    other.save_pretrained(tmp_path)
    model = halotune.speed_up(peft.PeftModel.from_pretrained(base("llama"), tmp_path, low_cpu_mem_usage=True).eval())
    assert error(output(model), output(other)) < 1e-5
    empty = peft.get_peft_model(base("llama"), config(), low_cpu_mem_usage=True).eval()
    halotune.speed_up(empty)
    peft.set_peft_model_state_dict(empty, peft.get_peft_model_state_dict(other), low_cpu_mem_usage=True)
    assert error(output(empty), output(other)) < 1e-5


@in_order
def test_switching_several_and_deleting(config: Any) -> None:
    theirs, ours = pair(two(config))
    seen = []
    for names in ("b", "default", ["default", "b"], ["b", "default"]):
        for model in (theirs, ours):
            model.base_model.set_adapter(names)
        seen.append(output(ours))
        assert error(seen[-1], output(theirs)) < 1e-5
        assert ours.active_adapters == theirs.active_adapters
        assert [p.requires_grad for p in ours.parameters()] == [p.requires_grad for p in theirs.parameters()]
    assert error(seen[0], seen[1]) > 1e-3
    for model in (theirs, ours):
        model.delete_adapter("b")
    assert error(output(ours), output(theirs)) < 1e-5
    assert list(tensors(ours)) == list(tensors(theirs))
    assert not any("b" in m._halotune.adapters for m in ours.modules() if isinstance(m, FastLayer))


@every
def test_disabling(config: Any) -> None:
    model = halotune.speed_up(live(config()))
    expected, plain = output(model), output(base("llama"))
    with model.disable_adapter():
        assert torch.equal(output(model), plain)
    assert torch.equal(output(model), expected)


@every
def test_parameters_may_be_replaced(config: Any) -> None:
    """New `Parameter` objects, and a new dtype, are taken over; nothing of the old ones is used."""
    theirs, ours = pair(live(config()))
    output(ours)
    state = {name: t * 1.25 for name, t in tensors(ours).items()}
    for model in (theirs, ours):
        model.load_state_dict(state, assign=True)
    assert error(output(ours), output(theirs)) < 1e-5
    assert error(output(ours.double()), output(theirs.double())) < 1e-6  # peft rounds LoHa's scale to fp32


def test_loha_scales() -> None:
    theirs, ours = pair(live(LLAMA["loha"]()))
    for change in (lambda m: m.set_scale("default", 0.3), lambda m: m.scale_layer(2.0), lambda m: m.unscale_layer()):
        for model in (theirs, ours):
            for m in model.modules():
                if isinstance(m, peft.tuners.loha.LoHaLayer):
                    change(m)
        assert error(output(ours), output(theirs)) < 1e-5


@every
def test_modules_to_save(config: Any) -> None:
    theirs, ours = pair(live(config(modules_to_save=["lm_head"])))
    assert error(output(ours), output(theirs)) < 1e-5
    with ours.disable_adapter():
        assert torch.equal(output(ours), output(base("llama")))
    assert error(output(ours.merge_and_unload()), output(theirs)) < 1e-5


# -- merging


@in_order
@pytest.mark.parametrize("safe", [True, False])
def test_merging_and_unmerging(config: Any, safe: bool) -> None:
    model = halotune.speed_up(two(config))
    state, expected = tensors(model), output(model)
    model.merge_adapter(safe_merge=safe)
    assert error(output(model), expected) < 1e-5
    assert all(m.merged_adapters == ["default"] for m in model.modules() if isinstance(m, FastLayer))
    assert not same(tensors(model), state)
    model.unmerge_adapter()
    assert same(tensors(model), state)
    model.base_model.set_adapter(["default", "b"])
    expected = output(model)
    model.merge_adapter(["default", "b"], safe_merge=safe)
    assert error(output(model), expected) < 1e-5
    with model.disable_adapter():  # unmerges, as peft does
        assert torch.equal(output(model), output(base("llama")))
    assert same(tensors(model), state)
    assert error(output(model), expected) < 1e-5
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


@in_order
def test_merged_one_after_the_other(config: Any) -> None:
    model = two(config)
    model.base_model.set_adapter(["default", "b"])
    halotune.speed_up(model)
    state, expected = tensors(model), output(model)
    with pytest.warns(UserWarning, match="stay active"):
        model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="Already following adapters were merged default"):
        model.merge_adapter(["default", "b"])
    assert error(output(model), expected) < 1e-5
    model.unmerge_adapter()
    assert same(tensors(model), state)


@in_order
def test_merged_by_peft_before(config: Any) -> None:
    """What we merge on top of it is taken out exactly, and then peft unmerges its own."""
    model = two(config)
    model.base_model.set_adapter(["default", "b"])
    state, expected = tensors(model), output(model)
    model.merge_adapter(["default"])
    halotune.speed_up(model)
    assert error(output(model), expected) < 1e-5
    with pytest.warns(UserWarning, match="Already following adapters were merged"):
        model.merge_adapter(["default", "b"])
    assert error(output(model), expected) < 1e-5
    model.unmerge_adapter()
    assert error(output(model), expected) < 1e-4
    assert all(error(t, state[name]) < 1e-4 for name, t in tensors(model).items())
    assert not any(m.merged for m in model.modules() if isinstance(m, FastLayer))


@every
@pytest.mark.parametrize("method", ["merge_and_unload", "unload"])
def test_unloading_leaves_no_trace(config: Any, method: str) -> None:
    model = halotune.speed_up(live(config()))
    expected, plain = output(model), base("llama")
    tuner = type(model.base_model).__bases__[1]
    left = getattr(model, method)()
    assert error(output(left), expected if method == "merge_and_unload" else output(plain)) < 1e-5
    assert [type(m) for m in left.modules()] == [type(m) for m in plain.modules()]
    assert [set(m.__dict__) for m in left.modules()] == [set(m.__dict__) for m in plain.modules()]
    assert not left._forward_pre_hooks and not left._forward_hooks
    assert type(model.base_model) is tuner
    again = halotune.speed_up(peft.get_peft_model(left, config()))
    assert len(fast_layers(again)) == 4


# -- other ways into and out of peft


@every
@pytest.mark.parametrize("how", ["tuner", "injected"])
def test_other_ways_into_peft(config: Any, how: str) -> None:
    if how == "tuner":
        model = type(live(config()).base_model)(base("llama"), config(), "default")
    else:
        model = peft.inject_adapter_in_model(config(), base("llama"))
    expected = output(randomize(model).eval())
    halotune.speed_up(model)
    assert len(fast_layers(model)) == 4
    assert error(output(model), expected) < 1e-5
    assert not fast_layers(halotune.slow_down(model))
    assert torch.equal(output(model), expected)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")  # transformers' own way to a second adapter
def test_adapters_of_a_transformers_model() -> None:
    model = base("llama")
    model.add_adapter(LLAMA["hra"]())
    randomize(halotune.speed_up(model)).eval()
    assert error(output(model), by_peft(model)) < 1e-5
    model.add_adapter(LLAMA["hra"](target_modules=["o_proj"]), "b")
    model.set_adapter("b")
    randomize(model, seed=1)
    assert error(output(model), by_peft(model)) < 1e-5
    assert len(fast_layers(model)) == 6
    model.disable_adapters()
    assert torch.equal(output(model), output(base("llama")))


@every
def test_generating(config: Any) -> None:
    theirs, ours = pair(live(config(task_type="CAUSAL_LM")))
    for options in ({}, {"num_beams": 2}):
        tokens = [m.generate(inputs(m), max_new_tokens=5, do_sample=False, **options) for m in (ours, theirs)]
        assert torch.equal(*tokens)


def test_a_layer_called_alone_and_with_further_arguments() -> None:
    theirs, ours = pair(live(LLAMA["miss"]()))
    layers = [m.get_base_model().model.layers[0].self_attn.q_proj for m in (ours, theirs)]
    x = torch.randn(3, layers[0].in_features)
    assert error(layers[0](x), layers[1](x)) < 1e-6
    for layer in layers:
        layer.base_layer.forward = lambda x, factor=1.0, layer=layer.base_layer: factor * type(layer).forward(layer, x)
    assert error(layers[0](x, factor=3.0), layers[1](x, factor=3.0)) < 1e-6
    assert error(layers[0](x), layers[1](x)) < 1e-6


def test_hooks_of_accelerate_stay() -> None:
    """They replace a module's forward by one that is bound to its class."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = live(LLAMA["hra"]())
    expected = output(model)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    hooks.add_hook_to_module(layer, hooks.ModelHook())
    halotune.speed_up(model)
    with torch.no_grad():
        calls = []
        layer._halotune.base_layer.register_forward_hook(lambda m, args, y: calls.append(args[0]))
        assert error(output(model), expected) < 1e-5
    plain = output(base("llama"))
    assert calls and error(output(model), plain) > 1e-3  # the base layer met a rotated input
    hooks.remove_hook_from_module(layer)
    assert layer.forward.__func__ is FastLayer.forward
    assert error(output(model), expected) < 1e-5
    halotune.slow_down(model)
    assert layer.forward.__func__ is peft.tuners.hra.layer.HRALinear.forward
    assert error(output(model), expected) < 1e-6


def test_memory_is_not_kept() -> None:
    """Forward keeps no matrix of the weight's size, where peft keeps several."""
    model = halotune.speed_up(live(peft.HRAConfig(r=2, target_modules=["layer"]), Single(nn.Linear(64, 64))))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.untyped_storage().nbytes()) or t, lambda t: t):
        model(torch.randn(2, 64, requires_grad=True))
    weights = [p.untyped_storage().nbytes() for p in model.parameters() if p.dim() == 2]
    assert sum(size >= max(weights) for size in kept) <= 1  # the weight itself


def test_beside_a_lora_model() -> None:
    """A tuner without layers of ours keeps its class: peft's LoRA has ways of its own with `adapter_names`."""
    models = nn.ModuleList([peft.get_peft_model(base("llama"), peft.LoraConfig(target_modules=QV)), live(LLAMA["hra"]())])
    lora, hra = (type(m.base_model) for m in models)
    halotune.speed_up(models)
    assert type(models[0].base_model) is lora and isinstance(models[1].base_model, hra)
    assert not models[0].get_base_model()._forward_pre_hooks
    assert len(fast_layers(models)) == 4


# -- what cannot be sped up


def test_refusals() -> None:
    for model, message in (
        (peft.get_peft_model(base("llama"), peft.LoraConfig(target_modules=QV)), "no layer of peft's .*HRA"),
        (halotune.get_peft_model(base("llama"), halotune.HRAConfig(target_modules=QV)), "fast as they are"),
        (base("llama"), "no layer of peft's .*HRA"),
    ):
        classes = [type(m) for m in model.modules()]
        with pytest.raises(HalotuneError, match=message):
            halotune.speed_up(model)
        assert [type(m) for m in model.modules()] == classes
        assert not any(hook for m in model.modules() for hook in m._forward_pre_hooks if not hasattr(model, "base_model"))
    with pytest.raises(HalotuneError, match="expected a model; got a str"):
        halotune.speed_up("model")  # type: ignore[type-var]


def test_layers_that_cannot_run_here_stay_pefts() -> None:
    """A tuner's layer around another tuner's, and a forward that somebody replaced: named, and as before."""
    model = peft.get_peft_model(base("llama"), peft.LoraConfig(target_modules=["q_proj"]), mixed=True)
    model.add_adapter("loha", LLAMA["loha"](target_modules=["q_proj", *MLP]))
    model.set_adapter(["default", "loha"])
    randomize(model).eval()
    expected = output(model)
    with pytest.warns(UserWarning, match=r"layers\.0\.self_attn\.q_proj and 1 more layer stay peft's own, .*cannot be adapted"):
        halotune.speed_up(model)
    assert len(fast_layers(model)) == 6
    assert error(output(model), expected) < 1e-5
    model = live(LLAMA["hra"]())
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.forward = lambda x: layer.base_layer(x)
    expected = output(model)
    with pytest.warns(UserWarning, match="replaced its forward"):
        halotune.speed_up(model)
    assert len(fast_layers(model)) == 3
    assert error(output(model), expected) < 1e-5
