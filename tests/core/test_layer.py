"""The adapted layer: it stands in its base's place, and knows which adapters apply."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from halotune import BoneConfig, HalotuneError, HRAConfig
from halotune.core import base as bases
from halotune.core.base import Linear, base_for, base_kind, register_base
from halotune.core.layer import AdaptedLayer
from halotune.methods.registry import method_of


def layer_with(*names: str, module: nn.Module | None = None) -> AdaptedLayer:
    """A layer with different adapters of these names, none active."""
    layer = AdaptedLayer(module or nn.Linear(9, 7)).requires_grad_(False)
    for name in names:
        adapter = method_of("BONE").create(layer.base.shape, BoneConfig(r=4))
        nn.init.normal_(adapter.bone_block)
        layer.add(name, adapter)
    return layer


# -- in its base's place


def test_the_bases_attributes_are_reached_through():
    base = nn.Linear(9, 7)
    layer = AdaptedLayer(base)
    assert layer.weight is base.weight and layer.bias is base.bias
    assert (layer.in_features, layer.out_features) == (9, 7)
    with pytest.raises(AttributeError, match=r"Linear.*nothing_such"):
        layer.nothing_such  # noqa: B018
    assert not hasattr(layer, "nothing_such")


@pytest.mark.parametrize(("args", "kwargs"), [((1,), {}), ((), {"scale": 2.0})], ids=["positional", "keyword"])
def test_further_arguments_are_refused(args, kwargs):
    with pytest.raises(HalotuneError, match=r"Linear: an adapted layer takes its input alone.*exclude_modules"):
        layer_with("a")(torch.randn(2, 9), *args, **kwargs)


def test_names_of_parameters():
    assert set(layer_with("a").state_dict()) == {"base_layer.weight", "base_layer.bias", "adapters.a.bone_block"}


@pytest.mark.parametrize(
    "module", [nn.Embedding(3, 4), nn.LayerNorm(3), nn.ConvTranspose1d(2, 3, 1)], ids=lambda m: type(m).__name__
)
def test_what_is_no_linear_operator_is_named(module):
    with pytest.raises(HalotuneError, match=rf"'model\.x' is a {type(module).__name__}, which cannot be adapted"):
        AdaptedLayer(module, "model.x")
    assert base_kind(module) is None


def test_integer_weights_are_no_float_matrix():
    module = nn.Linear(3, 4)
    module.weight = nn.Parameter(torch.zeros(4, 3, dtype=torch.int8), requires_grad=False)
    assert base_kind(module) is None


def test_a_kind_of_base_registered_later_is_asked_first(monkeypatch):
    monkeypatch.setattr(bases, "_KINDS", list(bases._KINDS))

    class Special(nn.Linear): ...

    class SpecialBase(Linear):
        @classmethod
        def matches(cls, module):
            return isinstance(module, Special)

    assert type(base_for(Special(3, 4))) is Linear
    register_base(SpecialBase)
    register_base(SpecialBase)  # again changes nothing
    assert type(base_for(Special(3, 4))) is SpecialBase
    assert type(base_for(nn.Linear(3, 4))) is Linear
    assert bases._KINDS.count(SpecialBase) == 1


# -- which adapters apply


def test_only_active_adapters_apply():
    layer, x = layer_with("a", "b"), torch.randn(2, 9)
    plain = layer.base_layer(x)
    assert torch.equal(layer(x), plain)
    layer.active_adapters = ["b"]
    with_b = layer(x)
    assert not torch.equal(with_b, plain)
    layer.active_adapters = ["a"]
    assert not torch.equal(layer(x), with_b)
    layer.active_adapters = ["elsewhere", "b"]  # an adapter that only other layers have
    assert torch.equal(layer(x), with_b)
    layer.enabled = False
    assert torch.equal(layer(x), plain)


def test_removing_an_adapter():
    layer, x = layer_with("a", "b"), torch.randn(2, 9)
    raw = layer.base_layer.weight.clone()
    layer.active_adapters = ["a", "b"]
    layer.merge(["a"])
    layer.remove("a")
    assert torch.equal(layer.base_layer.weight, raw)
    assert layer.active_adapters == ["b"] and list(layer.adapters) == list(layer.scales) == ["b"]
    layer.remove("nothing such")
    with_b = layer(x)
    layer.remove("b")
    assert not torch.equal(layer(x), with_b) and torch.equal(layer(x), layer.base_layer(x))


# -- merging


def test_merging_one_after_the_other_and_undoing_both():
    layer, x = layer_with("a", "b"), torch.randn(2, 9)
    raw = layer.base_layer.weight.clone()
    layer.active_adapters = ["a", "b"]
    expected = layer(x)
    layer.merge(["a"])
    torch.testing.assert_close(layer(x), expected)
    layer.merge(["b"])
    torch.testing.assert_close(layer.base_layer(x), expected)
    assert layer.merged_adapters == ["a", "b"] and layer.merged
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, raw) and not layer.merged
    layer.unmerge()  # again changes nothing
    assert torch.equal(layer.base_layer.weight, raw)


def test_a_merge_for_good_keeps_no_snapshot():
    layer = layer_with("a")
    layer.merge(["a"], keep=False)
    merged = layer.base_layer.weight.clone()
    with pytest.raises(HalotuneError, match="merged for good, and nothing was kept to restore the weight from"):
        layer.unmerge()
    assert torch.equal(layer.base_layer.weight, merged)


def test_an_untied_merge_leaves_the_shared_weight_alone():
    layer = layer_with("a")
    shared = layer.base_layer.weight
    raw = shared.clone()
    layer.merge(["a"], untie=True)
    assert layer.base_layer.weight is not shared
    assert torch.equal(shared, raw) and not torch.equal(layer.base_layer.weight, raw)
    layer.unmerge()
    assert layer.base_layer.weight is shared


def test_a_merge_reports_what_rounding_cost():
    module = nn.Linear(9, 7, bias=False, dtype=torch.bfloat16)
    layer = layer_with("a", module=module)
    with torch.no_grad():
        module.weight.fill_(1.0)
        layer.adapters["a"].bone_block.fill_(2**-12)  # less than half a step of bfloat16 at 1
        layer.adapters["a"].bone_block[:, 0] = 0.5
    record = layer.merge(["a"])
    assert record.changed == pytest.approx(1 / 7)
    small, large = 6 * 9 * 2.0**-24, 9 * 0.25  # squared deltas: lost, and kept
    assert record.lost == pytest.approx((small / (small + large)) ** 0.5)
    assert record.delta == pytest.approx(((small + large) / 63) ** 0.5)


def test_the_scale_of_a_merged_adapter_is_fixed():
    layer = layer_with("a")
    layer.set_scale("a", 2)
    assert layer.scales == {"a": 2.0}
    layer.merge(["a"])
    with pytest.raises(HalotuneError, match=r"'a' is merged.*unmerge_adapter"):
        layer.set_scale("a", 1.0)


def test_a_zero_scale_is_the_base():
    layer, x = layer_with("a"), torch.randn(2, 9)
    layer.active_adapters = ["a"]
    layer.set_scale("a", 0)
    torch.testing.assert_close(layer(x), layer.base_layer(x))
    hra = AdaptedLayer(nn.Linear(9, 7))
    hra.add("a", method_of("HRA").create(hra.base.shape, HRAConfig(r=3, init_weights=False)))
    hra.active_adapters = ["a"]
    hra.set_scale("a", 0)
    torch.testing.assert_close(hra(x), hra.base_layer(x))
