"""LoHa: low-rank Hadamard products, flat and Tucker, thin and dense, with dropout."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
from torch import nn

from halotune import LoHaConfig, get_peft_model
from halotune.core.layer import AdaptedLayer
from halotune.core.operator import WeightShape
from halotune.methods.loha import LoHa, ops


def halves(n_out=7, n_in=11, r=3):
    sizes = ((n_out, r), (r, n_in), (n_out, r), (r, n_in))
    return [torch.randn(size, dtype=torch.float64) for size in sizes]


def layer_with(config, module=None) -> AdaptedLayer:
    layer = AdaptedLayer((module or nn.Linear(11, 21)).double().requires_grad_(False))
    adapter = LoHa.create(layer.base.shape, config).double()
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
    layer.add("default", adapter)
    layer.active_adapters = ["default"]
    return layer


# -- the two forms


def test_definition():
    W, (A1, B1, A2, B2) = torch.randn(7, 11, dtype=torch.float64), halves()
    by_hand = torch.stack(
        [torch.stack([W[o, i] + 0.7 * (A1[o] @ B1[:, i]) * (A2[o] @ B2[:, i]) for i in range(11)]) for o in range(7)]
    )
    torch.testing.assert_close(ops.add_hadamard(W, A1, B1, A2, B2, s=0.7), by_hand)


def test_thin_factors_are_exact():
    parts = halves()
    B, A = ops.khatri_rao(*parts, s=0.7)
    assert B.shape == (7, 9) and A.shape == (9, 11)
    zero = torch.zeros(7, 11, dtype=torch.float64)
    torch.testing.assert_close(B @ A, ops.add_hadamard(zero, *parts, s=0.7))


@pytest.mark.parametrize("module", [nn.Linear(11, 21), nn.Conv2d(6, 10, (3, 2), groups=2)], ids=["linear", "conv2d"])
def test_both_forms_agree(module, monkeypatch):
    layer = layer_with(LoHaConfig(r=3, alpha=5), module)
    layer.scales["default"] = 1.7
    x = torch.randn(*((4, 11) if isinstance(module, nn.Linear) else (2, 6, 5, 4)), dtype=torch.float64).requires_grad_()
    results = []
    thin_factors = Mock(wraps=ops.khatri_rao)
    monkeypatch.setattr(ops, "khatri_rao", thin_factors)
    for thin in (True, False):
        monkeypatch.setattr(ops, "thin_is_cheaper", lambda *_, thin=thin: thin)
        thin_factors.reset_mock()
        y = layer(x)
        assert thin_factors.called is thin
        probe = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
        results.append([y, *torch.autograd.grad(y, [x, *layer.adapters.parameters()], probe)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("n_out", "n_in", "r"), [(3072, 3072, 22), (1024, 3072, 16), (8192, 3072, 27), (3072, 8192, 27)])
def test_break_even_ranks_of_a_model_3072_wide(n_out, n_in, r):
    many = 1 << 16
    assert ops.thin_is_cheaper(many, n_out, n_in, r)
    assert not ops.thin_is_cheaper(many, n_out, n_in, r + 1)
    assert ops.thin_is_cheaper(16, n_out, n_in, r + 1)  # building ΔW is not worth its while for few tokens


# -- the scale


def test_scale_is_alpha_over_r_and_patterns_change_either(mlp):
    config = LoHaConfig(
        r=4, alpha=6, target_modules=["up", "down"], rank_pattern={"up": 2}, alpha_pattern={r"blocks\.1\.down": 10}
    )
    model = get_peft_model(mlp, config)
    scaling = {n: m.scaling for n, m in model.get_base_model().named_modules() if isinstance(m, LoHa)}
    assert scaling == {
        "blocks.0.up.adapters.default": 3.0,
        "blocks.0.down.adapters.default": 1.5,
        "blocks.1.up.adapters.default": 3.0,
        "blocks.1.down.adapters.default": 2.5,
    }


def test_scale_is_applied_once():
    layer = layer_with(LoHaConfig(r=2, alpha=6))
    adapter = layer.adapters["default"]
    W = layer.base_layer.weight
    expected = 3 * (adapter.hada_w1_a @ adapter.hada_w1_b) * (adapter.hada_w2_a @ adapter.hada_w2_b)
    torch.testing.assert_close(adapter.weight(W) - W, expected)


# -- Tucker


@pytest.mark.parametrize("kernel", [(3,), (3, 2), (1, 3, 2)], ids=["conv1d", "conv2d", "conv3d"])
@pytest.mark.parametrize("groups", [1, 2])
def test_tucker_form_is_the_einsum(kernel, groups):
    shape = WeightShape(10, 3 * torch.Size(kernel).numel(), kernel, groups)
    adapter = LoHa.create(shape, LoHaConfig(r=2, alpha=3, use_effective_conv2d=True)).double()
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
    halves = []
    for i in "12":
        t, a, b = (getattr(adapter, f"hada_{n}") for n in (f"t{i}", f"w{i}_a", f"w{i}_b"))
        assert t.shape == (2, 2, *(kernel if len(kernel) > 1 else (*kernel, 1)))
        assert a.shape == (2, 10) and b.shape == (2, 3)
        halves.append(torch.einsum("ij...,jc,io->oc...", t, b, a).reshape(10, -1))
    W = torch.randn(10, shape.in_features, dtype=torch.float64)
    torch.testing.assert_close(adapter.weight(W), W + 1.5 * halves[0] * halves[1])


@pytest.mark.parametrize("shape", [WeightShape(10, 6), WeightShape(10, 6, (1, 1))], ids=["linear", "1x1"])
def test_tucker_form_is_for_kernels_larger_than_one(shape):
    adapter = LoHa.create(shape, LoHaConfig(r=2, use_effective_conv2d=True))
    assert not hasattr(adapter, "hada_t1")
    assert adapter.hada_w1_a.shape == (10, 2) and adapter.hada_w1_b.shape == (2, 6)


def test_tucker_form_does_not_grow_with_the_kernel():
    def size(k, effective):
        shape = WeightShape(10, 6 * k * k, (k, k))
        adapter = LoHa.create(shape, LoHaConfig(r=2, use_effective_conv2d=effective))
        return sum(p.numel() for p in adapter.parameters())

    assert size(5, True) < size(5, False)


# -- dropout


def delta(layer, x):
    """What the adapter adds, and what it adds in eval."""
    layer.eval()
    whole = (layer(x) - layer.base_layer(x)).detach()
    layer.train()
    return (layer(x) - layer.base_layer(x)).detach(), whole


@pytest.mark.parametrize("r", [1, 6], ids=["thin", "dense"])
def test_rank_dropout_drops_rows_and_scales_up_the_others(r):
    layer, x = layer_with(LoHaConfig(r=r, rank_dropout=0.3)), torch.randn(40, 11, dtype=torch.float64)
    kept = 0
    for _ in range(50):
        dropped, whole = delta(layer, x)
        factor = (dropped / whole).mean(0)  # one per output row
        torch.testing.assert_close(dropped, whole * factor, rtol=1e-9, atol=1e-9)
        alive = factor.abs() > 1e-6
        torch.testing.assert_close(factor[alive], torch.full_like(factor[alive], 21 / float(alive.sum())))
        kept += int(alive.sum())
    assert abs(kept / (50 * 21) - 0.7) < 5 * (0.3 * 0.7 / (50 * 21)) ** 0.5


def test_module_dropout_skips_the_adapter():
    layer, x = layer_with(LoHaConfig(r=2, module_dropout=0.3)), torch.randn(5, 11, dtype=torch.float64)
    kept = 0
    for _ in range(200):
        dropped, whole = delta(layer, x)
        if dropped.abs().max() > 1e-9:
            torch.testing.assert_close(dropped, whole)
            kept += 1
    assert abs(kept / 200 - 0.7) < 5 * (0.3 * 0.7 / 200) ** 0.5


@pytest.mark.parametrize(
    ("config", "training", "draws"),
    [
        (LoHaConfig(r=2), True, False),
        (LoHaConfig(r=2, rank_dropout=0.5, module_dropout=0.5), False, False),
        (LoHaConfig(r=2, rank_dropout=0.5), True, True),
        (LoHaConfig(r=2, module_dropout=0.5), True, True),
    ],
    ids=["no-dropout", "eval", "rank", "module"],
)
def test_random_numbers_are_drawn_only_where_needed(config, training, draws):
    layer, x = layer_with(config).train(training), torch.randn(5, 11, dtype=torch.float64)
    before = torch.get_rng_state()
    layer(x)
    assert torch.equal(torch.get_rng_state(), before) is not draws


def test_dropout_is_in_no_file_and_no_merge():
    layer = layer_with(LoHaConfig(r=2, rank_dropout=0.5, module_dropout=0.5)).train()
    W = layer.base_layer.weight.clone()
    expected = layer.adapters["default"].eval().weight(W)
    torch.testing.assert_close(layer.train().merged_weight(["default"]), expected)


def test_dropout_compiles_whole():
    layer = layer_with(LoHaConfig(r=2, rank_dropout=0.5, module_dropout=0.5)).train()
    torch.compiler.reset()
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.randn(5, 11, dtype=torch.float64))
    assert y.isfinite().all()
