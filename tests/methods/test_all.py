"""What every method owes beyond the laws: ranks by pattern, a random start, nothing of size d×d kept for backward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from halotune import BoneConfig, HalotuneError, HRAConfig, LoHaConfig, LoraConfig, MissConfig, OFTConfig, get_peft_model
from halotune.core.layer import AdaptedLayer
from halotune.core.operator import WeightShape
from halotune.methods.registry import method_of, methods

# The value of `bias` that means the biases of the adapted layers; MiSS has two names for it, as peft's files have.
OWN_BIASES = {
    "HRA": ["hra_only"],
    "LOHA": [],
    "BONE": ["bone_only"],
    "MISS": ["MiSS_only", "bone_only"],
    "LORA": ["lora_only"],
    "OFT": ["oft_only"],
}

EVERY = pytest.mark.parametrize("method", methods(), ids=lambda m: m.peft_type)


def sizes(adapter):
    return {name: p.shape for name, p in adapter.named_parameters()}


@EVERY
def test_rank_pattern(mlp, method):
    def config(r, **kwargs):
        return method.config(r=r, init_weights=False, target_modules=["up", "down"], **kwargs)

    model = get_peft_model(mlp, config(3, rank_pattern={r"1\.down": 2, "up": 1}))
    ranks = {"blocks.0.up": 1, "blocks.0.down": 3, "blocks.1.up": 1, "blocks.1.down": 2}
    for path, r in ranks.items():
        layer = model.get_base_model().get_submodule(path)
        assert sizes(layer.adapters["default"]) == sizes(method.create(layer.base.shape, config(r)))
    assert sizes(method.create(layer.base.shape, config(3))) != sizes(method.create(layer.base.shape, config(2)))
    assert model(mlp.sample()).isfinite().all()


@EVERY
def test_init_weights_false_starts_at_random(method):
    """Away from the identity, wherever one stands, and never twice the same."""
    shape, W = WeightShape(9, 15), torch.randn(9, 15)
    first, second = (method.create(shape, method.config(r=4, init_weights=False)).weight(W) for _ in range(2))
    assert (first - W).norm() > 1e-3 * W.norm()
    assert (first - second).norm() > 1e-3 * W.norm()


@EVERY
def test_biases_are_trained_as_the_configuration_says(mlp, method):
    choices = {"none": set(), "all": {"stem.bias", "blocks.0.up.base_layer.bias", "blocks.1.up.bias", "head.bias"}}
    choices |= {own: {"blocks.0.up.base_layer.bias"} for own in OWN_BIASES[method.peft_type]}
    if method.peft_type == "LOHA":
        with pytest.raises(HalotuneError, match=r"bias: expected one of 'none'; got 'all'"):
            method.config(bias="all")
        return
    for bias, expected in choices.items():
        model = copy.deepcopy(mlp)
        wrapped = get_peft_model(model, method.config(r=3, init_weights=False, bias=bias, target_modules=["0.up"]))
        wrapped(mlp.sample()).square().sum().backward()
        graded = {n for n, p in model.named_parameters() if p.grad is not None}
        assert graded == {n for n, p in model.named_parameters() if p.requires_grad}
        assert {n for n in graded if ".adapters." not in n} == expected


D, TOKENS = 256, 48


@pytest.mark.parametrize(
    "config",
    [
        HRAConfig(r=4),
        HRAConfig(r=4, apply_GS=True),
        LoHaConfig(r=2),
        LoHaConfig(r=16),
        BoneConfig(r=4),
        BoneConfig(r=4, init_weights="bat"),
        MissConfig(r=4, mini_r=2, init_weights="mini"),
        LoraConfig(r=4),
        OFTConfig(oft_block_size=16),
        OFTConfig(oft_block_size=16, use_cayley_neumann=False),
    ],
    ids=["hra", "hra-gs", "loha-low-rank", "loha-dense", "bone", "bat", "miss-mini", "lora", "oft-neumann", "oft"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_nothing_as_large_as_the_weight_is_kept_for_backward(config, dtype):
    layer = AdaptedLayer(nn.Linear(D, D, dtype=dtype).requires_grad_(False))
    layer.add("default", method_of(config.peft_type).create(layer.base.shape, config))
    layer.active_adapters = ["default"]
    frozen = layer.base_layer.weight.untyped_storage().data_ptr()
    kept: dict[int, int] = {}

    def count(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
        return t

    x = torch.randn(TOKENS, D, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        y = layer(x)
    assert frozen in kept  # the hooks see what is kept
    assert all(n < D * D for storage, n in kept.items() if storage != frozen)
    y.sum().backward()
    assert all(p.grad is not None for p in layer.adapters.parameters())
