"""What holds for adapters on experts, of every method and for every kind of experts, per expert and shared."""

from __future__ import annotations

import copy

import pytest
import torch

import halotune
from halotune import HalotuneError, HRAConfig, LoHaConfig, LoraConfig, OFTConfig

from ..laws.cases import VARIANTS
from .toys import EXPERTS, KINDS, block, dense, named, on_experts, sample, shake

LINEAR = [v for v in VARIANTS if not v.needs_kernel]
SHARING = [(v, s) for v in LINEAR for s in (False, True) if not (s and getattr(v.config, "weight_decompose", False))]
IDS = [f"{v.name}-{'shared' if s else 'each'}" for v, s in SHARING]


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.detach() - b.detach()).norm() / b.detach().norm().clamp_min(1e-300))


def adapted(config, kind="plain", shared=False, away=True, **kwargs) -> halotune.PeftModel:
    model = halotune.get_peft_model(block(kind, **kwargs), named(kind, on_experts(config, expert_sharing=shared)))
    if away:
        shake(model)
    return model.eval()


@pytest.mark.filterwarnings("ignore:HRA")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("variant", "shared"), SHARING, ids=IDS)
def test_outputs_and_gradients_are_those_of_the_definition(variant, shared, kind):
    model = adapted(variant.config, kind, shared)
    x = sample().requires_grad_()
    y, expected = model(x), dense(model, x)
    assert error(y, expected) < 1e-12
    with torch.no_grad(), model.disable_adapter():
        assert error(y, model(x)) > 1e-3  # the adapters do something
    weight, inputs = torch.randn_like(y), [x, *(p for p in model.parameters() if p.requires_grad)]
    got = torch.autograd.grad((y * weight).sum(), inputs)
    due = torch.autograd.grad((expected * weight).sum(), inputs)
    assert max(map(error, got, due)) < 1e-10
    assert all(p.shape[0] == EXPERTS for p in inputs[1:]) or shared


@pytest.mark.filterwarnings("ignore:HRA")
@pytest.mark.parametrize(("variant", "shared"), SHARING, ids=IDS)
def test_start_merge_unmerge_and_files(variant, shared, tmp_path):
    base = block("interleaved")
    x = sample()
    with torch.no_grad():
        plain = base(x)
        config = on_experts(variant.config, expert_sharing=shared)
        model = halotune.get_peft_model(copy.deepcopy(base), config).eval()
        starts = not getattr(config, "apply_GS", False) and not (config.peft_type == "HRA" and config.r % 2)
        assert (error(model(x), plain) < 1e-13) is starts
        shake(model)
        y = model(x)
        stored = {n: p.clone() for n, p in model.named_parameters() if ".base_layer." in n}
        report = model.merge_adapter()
        assert set(report.layers) == {"experts.gate_up_proj", "experts.down_proj"}
        assert error(model(x), y) < 1e-12
        model.unmerge_adapter()
        assert all(torch.equal(p, stored[n]) for n, p in model.named_parameters() if n in stored)
        assert torch.equal(model(x), y)
        model.save_pretrained(tmp_path)
        again = halotune.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        assert torch.equal(again(x), y)
        merged = again.merge_and_unload()
        assert {n for n, _ in merged.named_parameters()} == {n for n, _ in base.named_parameters()}
        assert vars(merged.experts)["config"] is merged.config  # it runs as before it was wrapped
        assert error(merged(x), y) < 1e-12


CASES = [HRAConfig(r=4), LoraConfig(r=3), LoHaConfig(r=5), OFTConfig(oft_block_size=3)]


@pytest.mark.parametrize("config", CASES, ids=lambda c: str(c.peft_type.value))
def test_scales_and_ordered_adapters_compose(config):
    model = adapted(config)
    model.add_adapter("second", on_experts(LoraConfig(r=2) if config.peft_type != "LORA" else HRAConfig(r=2)))
    model.set_adapter(["default", "second"])
    shake(model)
    model.set_scale("default", 0.4)
    model.set_scale("second", 1.7)
    x = sample()
    assert error(model(x), dense(model, x)) < 1e-12
    model.set_adapter("second")
    assert error(model(x), dense(model, x)) < 1e-12


def test_a_full_rank_map_after_another_adapter_sees_its_weight():
    model = adapted(LoraConfig(r=3))
    model.add_adapter("second", on_experts(halotune.BoneConfig(r=3, init_weights="bat")))
    model.set_adapter(["default", "second"])
    shake(model)
    x = sample()
    assert error(model(x), dense(model, x)) < 1e-12


def test_no_copy_of_all_experts_is_made_where_a_method_has_no_form_but_a_weight(monkeypatch):
    """Of two experts at a time here."""
    from halotune.core import expert_adapter
    from halotune.methods.bone import ops

    model = adapted(halotune.BoneConfig(r=3, init_weights="bat"))
    x = sample(40)
    expected = dense(model, x)
    monkeypatch.setattr(expert_adapter, "PART", 2 * 42 * 15 * 8)
    seen: list[int] = []
    build = ops._build_bat
    monkeypatch.setattr(ops.build_bat, "reference", lambda W, *rest: seen.append(W.shape[0]) or build(W, *rest))
    with torch.no_grad():
        assert error(model(x), expected) < 1e-12
    assert seen
    assert max(seen) == 4  # down_proj is half as large
    loss = model(x).square().sum()
    grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    due = torch.autograd.grad(dense(model, x).square().sum(), [p for p in model.parameters() if p.requires_grad])
    assert max(map(error, grads, due)) < 1e-10


@pytest.mark.parametrize(
    "config",
    [LoraConfig(r=3, lora_dropout=0.5), LoHaConfig(r=2, rank_dropout=0.5), LoHaConfig(r=5, rank_dropout=0.5),
     LoHaConfig(r=2, module_dropout=0.5), OFTConfig(oft_block_size=3, module_dropout=0.5),
     halotune.MissConfig(r=3, miss_dropout=0.5)],
    ids=["lora", "loha-low-rank", "loha-dense", "loha-module", "oft", "miss"],
)  # fmt: skip
def test_dropout_drops_in_training_alone(config):
    model = adapted(config)
    x = sample()
    quiet = model(x)
    assert torch.equal(model(x), quiet)
    model.train()
    noisy = {float(model(x).detach().square().sum()) for _ in range(8)}
    assert len(noisy) > 1
    model.eval()
    assert torch.equal(model(x), quiet)


@pytest.mark.parametrize("shared", [False, True])
def test_a_penalty_is_the_sum_over_experts(shared):
    config = on_experts(HRAConfig(r=4, orthogonality_weight=0.3, orthogonality_norm="unsquared"), expert_sharing=shared)
    model = halotune.get_peft_model(block(), config)
    shake(model)
    layers = [m for n, m in model.named_modules() if n.endswith("experts.gate_up_proj") or n.endswith("experts.down_proj")]
    due = sum(
        a.penalty(*a.parameters())
        for layer in layers
        for a in (list(layer.adapters["default"].each())[: 1 if shared else None])
    )
    assert model.penalty().item() == pytest.approx(due.item(), rel=1e-12)
    model.penalty().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_mixed_batches_are_refused():
    model = adapted(LoraConfig(r=3))
    with pytest.raises(HalotuneError, match="experts get the tokens of all samples together"):
        model(sample(), adapter_names=["default"])


def test_weighted_sums_of_adapters():
    model = adapted(LoraConfig(r=3))
    model.add_adapter("second", on_experts(LoraConfig(r=2)))
    model.set_adapter("second")
    shake(model)
    x = sample()
    model.add_weighted_adapter(["default", "second"], [0.5, 2.0], "sum", combination_type="lora")
    model.set_adapter("sum")
    y = model(x)
    model.set_adapter(["default", "second"])
    model.set_scale("default", 0.5)
    model.set_scale("second", 2.0)
    assert error(y, model(x)) < 1e-10


def test_forms_of_full_rank_start_from_each_experts_own_weight():
    config = on_experts(LoHaConfig(r=2, weight_decompose=True))
    model = halotune.get_peft_model(block(), config)
    m = model.get_base_model().experts.down_proj.adapters["default"].hada_dora_scale
    W = model.get_base_model().experts.base_layer.down_proj
    assert torch.allclose(m.squeeze(-1), W.norm(dim=-1))
    with pytest.raises(HalotuneError, match="experts have different"):
        halotune.get_peft_model(block(), on_experts(LoHaConfig(r=2, weight_decompose=True), expert_sharing=True))
