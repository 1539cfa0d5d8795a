"""Layers that compute their weight when they are called, and classes with a forward of their own."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import halotune
from halotune import BoneConfig, HalotuneError, HRAConfig, LoHaConfig, PeftModel

from ..interop.models import randomize

BAT = BoneConfig(r=4, init_weights="bat", target_modules=["layer"])
CONFIGS = {
    "hra": HRAConfig(r=4, target_modules=["layer"]),
    "bone": BoneConfig(r=4, target_modules=["layer"]),
    "loha": LoHaConfig(r=2, alpha=3, target_modules=["layer"]),
    "loha-dense": LoHaConfig(r=8, alpha=3, target_modules=["layer"]),
}
LAYERS = {"linear": (lambda: nn.Linear(12, 12), (5, 12)), "convolution": (lambda: nn.Conv1d(12, 12, 3), (2, 12, 9))}
HOOKS = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")


class Quarter(nn.Linear):
    """Multiplies by less than its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 0.25, self.bias)


class Written(nn.Linear):
    """Multiplies by its weight, in its own words."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


def layer_of(kind: str, hook: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, size = LAYERS[kind]
    return HOOKS[hook](make()).double().eval(), torch.randn(size, dtype=torch.float64)


def holding(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layer=layer))


def adapted(layer: nn.Module, config) -> PeftModel:
    torch.manual_seed(0)
    return randomize(halotune.get_peft_model(holding(layer), config, autocast_adapter_dtype=False)).eval()


def delta(model: PeftModel, W: Tensor) -> Tensor:
    """What the adapter adds to a weight."""
    (layer,) = (m for m in model.modules() if isinstance(m, halotune.core.layer.AdaptedLayer))
    return (layer.adapters["default"].weight(W.flatten(1)) - W.flatten(1)).view_as(W)


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_layers_that_compute_their_weight_are_called_as_they_are(name: str, kind: str, hook: str) -> None:
    layer, x = layer_of(kind, hook)
    y = layer(x).detach()
    W, bias = layer.weight.detach(), layer.bias
    model = adapted(layer, CONFIGS[name])
    run = F.linear if kind == "linear" else F.conv1d
    expected = run(x, W + delta(model, W), bias)
    torch.testing.assert_close(model(x), expected)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    with pytest.raises(
        HalotuneError, match=r"computes its weight.*Nothing was merged.*make the weight a plain parameter first"
    ):
        model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), y)


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("kind", LAYERS)
def test_maps_on_the_weight_are_refused_where_it_is_computed(kind: str, hook: str) -> None:
    layer, x = layer_of(kind, hook)
    plain = holding(layer)
    y = plain(x)
    with pytest.raises(HalotuneError, match=r"^layer: Bat is a map on the weight itself, and this .*exclude_modules"):
        halotune.get_peft_model(plain, BAT)
    assert plain.layer is layer and torch.equal(plain(x), y)


@pytest.mark.parametrize("name", CONFIGS)
def test_parametrized_layers_refuse_a_merge(name: str) -> None:
    layer, x = parametrizations.weight_norm(nn.Linear(12, 12)), torch.randn(5, 12)
    before = layer.weight.detach().clone()
    model = adapted(layer, CONFIGS[name])
    with torch.no_grad():
        torch.testing.assert_close(model(x), F.linear(x, before + delta(model, before), layer.bias))
    with pytest.raises(HalotuneError, match="a parametrization"):
        model.merge_and_unload()
    assert torch.equal(layer.weight, before)
    parametrize.remove_parametrizations(layer, "weight")
    y = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), y)


@pytest.mark.parametrize("name", ["bone", "loha", "loha-dense"])
def test_a_forward_of_its_own_is_called_as_it_is(name: str) -> None:
    layer, x = Quarter(12, 12), torch.randn(5, 12)
    y = layer(x)
    model = adapted(layer, CONFIGS[name])
    torch.testing.assert_close(model(x), y + F.linear(x, delta(model, layer.weight.detach())))
    with pytest.raises(HalotuneError, match=r"this Quarter.*forward of its own"):
        model.merge_adapter()
    with pytest.raises(HalotuneError, match="Bat is a map on the weight itself, and this Quarter"):
        halotune.get_peft_model(holding(Quarter(12, 12)), BAT)


@torch.no_grad()
def test_a_forward_of_its_own_that_multiplies_by_the_weight_is_a_plain_one() -> None:
    model, x = adapted(Written(12, 12), BAT), torch.randn(5, 12)
    y = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), y)


class ReadOnly(nn.Parameter):
    """Takes writes, and stays as it is."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is Tensor.copy_:
            return args[0]
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_loss_that_rounding_does_not_explain_is_an_error(dtype: torch.dtype) -> None:
    layer = nn.Linear(12, 12).to(dtype)
    layer.weight = ReadOnly(layer.weight.detach(), requires_grad=False)
    model = adapted(layer, CONFIGS["bone"])
    with pytest.raises(HalotuneError, match=r"layer: the weight of this Linear was written.*lacks 100% of the adapter's delta"):
        model.merge_adapter()
    assert not model.merged_adapters


@torch.no_grad()
def test_memory_that_two_parameters_share_is_left_to_the_other() -> None:
    """Tied by `.data`, as older code does it."""
    model = nn.Sequential(OrderedDict(first=nn.Linear(6, 6), layer=nn.Linear(6, 6)))
    model.layer.weight.data = model.first.weight.data
    W, x = model.first.weight.clone(), torch.randn(3, 6)
    with pytest.warns(UserWarning, match="layer shares its weight with first.weight"):
        wrapped = randomize(halotune.get_peft_model(model, HRAConfig(r=2, target_modules=["layer"])))
    y = wrapped(x)
    with pytest.warns(UserWarning, match="layer shares its weight with another module"):
        merged = wrapped.merge_and_unload()
    torch.testing.assert_close(merged(x), y)
    assert torch.equal(merged.first.weight, W)


@pytest.mark.parametrize("change", ["prune", "weight_norm", "parametrization"])
def test_a_weight_that_is_computed_since_the_merge_is_not_put_back(change: str) -> None:
    """Else it would be written where nobody reads it."""
    layer, x = nn.Linear(12, 12), torch.randn(5, 12)
    W, model = layer.weight.detach().clone(), adapted(layer, CONFIGS["hra"])
    with torch.no_grad():
        y = model(x)
    model.merge_adapter()
    if change == "parametrization":
        parametrize.register_parametrization(layer, "weight", nn.Identity())
    else:
        HOOKS[change](layer)
    for undo in (model.unmerge_adapter, model.unload, lambda: model.delete_adapter("default")):
        with pytest.raises(HalotuneError, match=r"^layer: since adapters were merged into it.*cannot be put back"):
            undo()
    if change == "parametrization":
        parametrize.remove_parametrizations(layer, "weight")
        model.unmerge_adapter()
        assert torch.equal(layer.weight, W)
        torch.testing.assert_close(model(x), y)


def test_deltas_that_depend_on_a_weight_that_is_not_applied_are_not_exported(tmp_path) -> None:
    """A low-rank delta is the same for any weight; a rotation's is not."""
    adapted(Quarter(12, 12), CONFIGS["bone"]).export("lora", tmp_path / "bone")
    with pytest.raises(HalotuneError, match=r"Quarter: the delta of HRA depends on the weight"):
        adapted(Quarter(12, 12), CONFIGS["hra"]).export("lora", tmp_path / "hra")
    model = adapted(Quarter(12, 12), CONFIGS["hra"])
    with pytest.raises(HalotuneError, match=r"layer: the delta of HRA depends on the weight"):
        model.add_weighted_adapter(["default"], [1.0], "b", "lora")
