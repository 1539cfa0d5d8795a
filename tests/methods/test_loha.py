"""LoHa: low-rank Hadamard products, flat and Tucker, low-rank and dense, with dropout."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
from torch import nn

import halotune
from halotune import HalotuneError, LoHaConfig, get_peft_model
from halotune.core.layer import AdaptedLayer
from halotune.core.operator import WeightShape
from halotune.methods.loha import LoHa, ops
from halotune.methods.loha.adapter import create_loha


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


def test_low_rank_factors_are_exact():
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
    low_rank_factors = Mock(wraps=ops.khatri_rao)
    monkeypatch.setattr(ops, "khatri_rao", low_rank_factors)
    for low_rank in (True, False):
        monkeypatch.setattr(ops, "low_rank_is_cheaper", lambda *_, low_rank=low_rank: low_rank)
        low_rank_factors.reset_mock()
        y = layer(x)
        assert low_rank_factors.called is low_rank
        probe = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
        results.append([y, *torch.autograd.grad(y, [x, *layer.adapters.parameters()], probe)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("n_out", "n_in", "r"), [(3072, 3072, 22), (1024, 3072, 16), (8192, 3072, 27), (3072, 8192, 27)])
def test_break_even_ranks_of_a_model_3072_wide(n_out, n_in, r):
    many = 1 << 16
    assert ops.low_rank_is_cheaper(many, n_out, n_in, r)
    assert not ops.low_rank_is_cheaper(many, n_out, n_in, r + 1)
    assert ops.low_rank_is_cheaper(16, n_out, n_in, r + 1)  # building ΔW is not worth its while for few tokens


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


@pytest.mark.parametrize("r", [1, 6], ids=["low-rank", "dense"])
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


# -- what LyCORIS has beyond peft


@pytest.mark.parametrize("on_out", [True, False], ids=["rows", "channels"])
def test_weight_decomposition_starts_at_the_lengths_of_the_base(on_out):
    """In a model, where the engine makes the adapter: so that it is the base's function, and W' keeps the lengths."""
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(24, 5))
    x = torch.randn(2, 4, 4, 4)
    before, weight = model(x), model[0].weight.detach().clone()
    config = LoHaConfig(r=2, weight_decompose=True, wd_on_out=on_out, target_modules=["0", "2"])
    wrapped = get_peft_model(model, config)
    torch.testing.assert_close(wrapped(x), before)
    adapter = model[0].adapters["default"]
    dims = (1, 2, 3) if on_out else (0, 2, 3)
    assert adapter.hada_dora_scale.shape == ((6, 1, 1, 1) if on_out else (1, 2, 1, 1))
    torch.testing.assert_close(adapter.hada_dora_scale, torch.linalg.vector_norm(weight, dim=dims, keepdim=True))
    with torch.no_grad():
        nn.init.normal_(adapter.hada_w2_b)
        lengths = torch.linalg.vector_norm(adapter.weight(weight.flatten(1)).view_as(weight), dim=dims, keepdim=True)
    torch.testing.assert_close(lengths, adapter.hada_dora_scale.detach())
    groups = halotune.parameter_groups(wrapped, weight_decay=0.1)
    assert any(p is adapter.hada_dora_scale for p in groups[1]["params"]) and groups[1]["weight_decay"] == 0


def test_a_row_of_zeros_stays_zero():
    adapter = create_loha(WeightShape(3, 4), LoHaConfig(r=2, weight_decompose=True))
    W = torch.randn(3, 4)
    W[1] = 0
    W.requires_grad_()
    adapter.weight(W).sum().backward()
    assert not adapter.weight(W)[1].any()
    assert W.grad.isfinite().all() and all(p.grad.isfinite().all() for p in adapter.parameters())


def test_rs_scaling_and_the_scalar_are_factors_of_the_delta():
    W = torch.zeros(5, 6)
    plain = create_loha(WeightShape(5, 6), LoHaConfig(r=4, alpha=3, init_weights=False))
    rs = create_loha(WeightShape(5, 6), LoHaConfig(r=4, alpha=3, use_rslora=True, use_scalar=True, init_weights=False))
    rs.load_state_dict({**plain.state_dict(), "hada_scalar": torch.tensor(0.5)})
    torch.testing.assert_close(rs.weight(W), plain.weight(W) * 0.5 * 4**0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight_decompose": True, "module_dropout": 0.1}, r"module_dropout: is not defined .* got 0\.1\. Use rank_dropout"),
        ({"wd_on_out": False}, "wd_on_out: means nothing without weight_decompose=True"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other(fields, message):
    with pytest.raises(HalotuneError, match=message):
        LoHaConfig(**fields)


def test_files_say_of_it_only_what_is_set():
    beyond = {"use_rslora", "use_scalar", "weight_decompose", "wd_on_out"}
    assert not beyond & LoHaConfig().to_dict().keys()
    config = LoHaConfig(use_scalar=True, weight_decompose=True, wd_on_out=False)
    assert LoHaConfig.from_dict(config.to_dict()) == config
