"""Bone, BAT and MiSS against their definitions, written as loops."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from halotune import BoneConfig, HalotuneError, MissConfig, get_peft_model
from halotune.core.layer import AdaptedLayer
from halotune.core.operator import WeightShape
from halotune.methods.bone import BONE, MISS, ops
from halotune.ops.product import fold


def adapter_of(config, n_out, n_in):
    method = BONE if isinstance(config, BoneConfig) else MISS
    adapter = method.create(WeightShape(n_out, n_in), config).double()
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
    return adapter


# -- Bone


@pytest.mark.parametrize(("n", "r"), [(12, 3), (13, 4), (13, 13), (5, 8), (7, 1)])
def test_fold_is_a_product_with_stacked_identities(n, r):
    x = torch.randn(2, 3, n, dtype=torch.float64)
    by_hand = torch.zeros(2, 3, r, dtype=torch.float64)
    for k in range(n):
        by_hand[..., k % r] += x[..., k]
    torch.testing.assert_close(fold(x, r), by_hand)
    unfolding = ops.unfolding(r, n, x)
    assert unfolding.shape == (r, n)
    torch.testing.assert_close(x @ unfolding.T, by_hand)


@pytest.mark.parametrize(("n_in", "r"), [(12, 3), (13, 4), (5, 8)], ids=["even", "remainder", "r-above-in"])
def test_bone_tiles_its_block(n_in, r):
    adapter = adapter_of(BoneConfig(r=r), 7, n_in)
    W = torch.randn(7, n_in, dtype=torch.float64)
    by_hand = W.clone()
    for k in range(n_in):
        by_hand[:, k] += adapter.bone_block[k % r]
    torch.testing.assert_close(adapter.weight(W), by_hand)


def test_miss_is_bone():
    bone, miss = adapter_of(BoneConfig(r=4), 7, 13), adapter_of(MissConfig(r=4), 7, 13)
    assert [n for n, _ in miss.named_parameters()] == ["miss_block"]
    miss.miss_block.data = bone.bone_block.data
    W = torch.randn(7, 13, dtype=torch.float64)
    assert torch.equal(miss.weight(W), bone.weight(W))


# -- BAT


@pytest.mark.parametrize("config", [BoneConfig(r=3, init_weights="bat"), MissConfig(r=3, init_weights="bat")], ids=repr)
def test_bat_is_blockwise(config):
    adapter = adapter_of(config, 9, 15)
    (B,) = adapter.parameters()
    assert B.shape == (3, 3, 3)
    W = torch.randn(9, 15, dtype=torch.float64)
    by_hand = torch.empty_like(W)
    for i in range(3):
        for j in range(5):
            rows, columns = slice(3 * i, 3 * i + 3), slice(3 * j, 3 * j + 3)
            by_hand[rows, columns] = W[rows, columns] + W[rows, columns] @ B[i] + B[i]
    torch.testing.assert_close(adapter.weight(W), by_hand)


@pytest.mark.parametrize("config", [BoneConfig, MissConfig])
def test_bat_needs_a_common_divisor(mlp, config):
    with pytest.raises(HalotuneError) as e:
        get_peft_model(mlp, config(r=4, init_weights="bat", target_modules=["up"]))
    for part in ("blocks.0.up", "(15, 6)", "r=4", "the largest is 3", "rank_pattern", "init_weights=True"):
        assert part in str(e.value)


# -- several as one


@pytest.mark.parametrize(
    "config",
    [BoneConfig(r=3), BoneConfig(r=3, init_weights="bat"), MissConfig(r=4, mini_r=3, init_weights="mini")],
    ids=["bone", "bat", "mini"],
)
def test_blocks_of_one_rank_add(config):
    a, b = adapter_of(config, 9, 15), adapter_of(config, 9, 15)
    W = torch.randn(9, 15, dtype=torch.float64)
    expected = W + 0.7 * (a.weight(W) - W) - 0.4 * (b.weight(W) - W)
    before = a.weight(W)
    torch.testing.assert_close(type(a).combined([a, b], [0.7, -0.4], "linear", rank=3).weight(W), expected)
    assert torch.equal(a.weight(W), before)
    assert type(a).combined([a, b], [1.0, 1.0], "cat", rank=6) is None


@pytest.mark.parametrize("kind", [True, "bat"], ids=["bone", "bat"])
def test_blocks_of_unequal_ranks_do_not(kind):
    a, b = (adapter_of(BoneConfig(r=r, init_weights=kind), 9, 9) for r in (3, 9))
    assert type(a).combined([a, b], [1.0, 1.0], "linear", rank=12) is None


# -- MiSS


def test_mini_repeats_its_columns_over_the_outputs():
    adapter = adapter_of(MissConfig(r=4, mini_r=3, init_weights="mini"), 9, 13)
    block = adapter.miss_block
    assert block.shape == (4, 3)
    W = torch.randn(9, 13, dtype=torch.float64)
    by_hand = W.clone()
    for o in range(9):
        for k in range(13):
            by_hand[o, k] += block[k % 4, o % 3]
    torch.testing.assert_close(adapter.weight(W), by_hand)


def test_mini_must_divide_the_outputs():
    with pytest.raises(HalotuneError, match=r"mini_r must divide the 9 outputs.*got 4"):
        adapter_of(MissConfig(r=3, mini_r=4, init_weights="mini"), 9, 13)


@pytest.mark.parametrize("module", [nn.Linear(6, 9), nn.Conv1d(6, 9, 3)], ids=["linear", "conv1d"])
def test_dropout_acts_on_the_adapters_input(module):
    layer = AdaptedLayer(module.double())
    adapter = MISS.create(layer.base.shape, MissConfig(r=4, miss_dropout=0.5)).double()
    nn.init.normal_(adapter.miss_block)
    layer.add("default", adapter)
    layer.active_adapters = ["default"]
    x = torch.randn(2, 6, 6, dtype=torch.float64)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    # It is the adapter that varies, around its value in eval.
    mean = torch.stack([layer(x).detach() for _ in range(800)]).mean(0)
    spread = (layer(x) - layer.eval()(x)).detach().norm()
    assert (mean - layer(x)).norm() < 5 * spread / 800**0.5
    adapter.dropout = 0.0
    assert torch.equal(layer.train()(x), layer.eval()(x))


def test_bat_has_no_dropout():
    with pytest.raises(HalotuneError, match=r'miss_dropout: is not defined for init_weights="bat"'):
        MissConfig(init_weights="bat", miss_dropout=0.1)
