"""Merging: checked before the base is touched, reported, undone bit for bit."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import halotune
from halotune import BoneConfig, HalotuneError, HRAConfig, LoHaConfig, LoraConfig, MissConfig, PeftModel

from ..interop.models import base, error, inputs, output, randomize

HRA = HRAConfig(r=4, target_modules=["0", "1"])
LOHA = LoHaConfig(r=2, alpha=5, target_modules=["0", "1"])
BONE = BoneConfig(r=4, target_modules=["0"])
BAT = BoneConfig(r=4, init_weights="bat", target_modules=["0", "1"])
LORA = LoraConfig(r=2, target_modules=["1"])
CONFIGS = {"hra": HRA, "loha": LOHA, "bone": BONE, "bat": BAT, "lora": LORA}


def adapted(*configs, dtype: torch.dtype = torch.float32, std: float = 0.2) -> PeftModel:
    """An MLP with these adapters, called a, b, …, all active in order; the same each time."""
    torch.manual_seed(0)
    model = halotune.get_peft_model(base("mlp", dtype), configs[0], "a")
    names = "abc"[: len(configs)]
    for name, config in zip(names[1:], configs[1:], strict=True):
        model.add_adapter(name, config)
    model.set_adapter(list(names))
    return randomize(model, std=std)


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [
        getattr(layer, "base_layer", layer).weight.detach().clone()
        for layer in getattr(model, "get_base_model", lambda: model)().layers
    ]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("names", ["hra", "loha", "bone", "bat", "lora", "hra loha", "bat hra lora"])
@torch.no_grad()
def test_merge_keeps_outputs_and_unmerge_is_exact(names: str, dtype: torch.dtype) -> None:
    model = adapted(*(CONFIGS[n] for n in names.split()), dtype=dtype)
    before, y = weights(model), output(model)
    model.merge_adapter()
    assert not equal(before, weights(model))
    assert error(output(model), y) < {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}[dtype]
    assert output(model).dtype == dtype
    merged = weights(model)
    model.merge_adapter()  # there is nothing left to merge
    assert equal(merged, weights(model))
    model.unmerge_adapter()
    assert equal(before, weights(model)) and torch.equal(output(model), y)


@torch.no_grad()
def test_merged_one_after_the_other_then_unmerged() -> None:
    model = adapted(HRA, LOHA)
    before, y = weights(model), output(model)
    model.merge_adapter(["a"])
    model.merge_adapter(["b"])
    assert model.base_model.merged_adapters == ["a", "b"]
    assert error(output(model), y) < 1e-5
    model.unmerge_adapter()
    assert equal(before, weights(model)) and torch.equal(output(model), y)


@pytest.mark.parametrize("second", ["hra", "loha", "bone", "bat", "lora"])
@torch.no_grad()
def test_merging_a_while_a_and_b_are_active_still_applies_b(second: str) -> None:
    """In peft b is dropped."""
    model = adapted(HRA, CONFIGS[second])
    y = output(model)
    model.merge_adapter(["a"])
    assert error(output(model), y) < 1e-5
    with pytest.warns(UserWarning, match="base weights are restored"):
        model.set_adapter("a")
    assert error(output(model), y) > 1e-3  # b did something


@pytest.mark.parametrize("order", [["b"], ["b", "a"]])
@torch.no_grad()
def test_merging_in_an_order_that_changes_the_result_is_refused(order: list[str]) -> None:
    model = adapted(HRA, HRA)
    before, y = weights(model), output(model)
    with pytest.raises(HalotuneError, match=r"layers\.0: .*order \['a', 'b'\].*Merge \['a', 'b'\], or .* set_adapter"):
        model.merge_adapter(order)
    assert equal(before, weights(model)) and torch.equal(output(model), y)
    model.set_adapter(["b", "a"])
    y = output(model)
    model.merge_adapter(order)
    assert error(output(model), y) < 1e-5


@torch.no_grad()
def test_order_is_free_where_deltas_add() -> None:
    model = adapted(LORA, LORA)
    y = output(model)
    model.merge_adapter(["b"])
    assert error(output(model), y) < 1e-5


@torch.no_grad()
def test_disable_while_merged_in_bf16_gives_the_base_back_bit_for_bit() -> None:
    """In peft 17 % of the base weights are changed for good."""
    model = adapted(HRA, dtype=torch.bfloat16)
    original, before = base("mlp", torch.bfloat16), weights(model)
    model.merge_adapter()
    merged, y = weights(model), output(model)
    with model.disable_adapter():
        assert equal(before, weights(model)) and equal(before, weights(original))
        assert torch.equal(output(model), output(original))
    assert equal(merged, weights(model)) and torch.equal(output(model), y)
    assert model.base_model.merged_adapters == ["a"]
    model.unmerge_adapter()
    assert equal(before, weights(model))


@torch.no_grad()
def test_disable_while_several_are_merged_keeps_their_order() -> None:
    model = adapted(HRA, HRA)
    model.set_adapter(["b", "a"])
    model.merge_adapter(["b"])
    model.merge_adapter(["a"])
    merged, y = weights(model), output(model)
    with model.disable_adapter():
        assert equal(weights(model), weights(base("mlp")))
    assert model.base_model.merged_adapters == ["b", "a"]
    assert error(output(model), y) < 1e-6
    assert all(error(W, V) < 1e-6 for W, V in zip(weights(model), merged, strict=True))


@torch.no_grad()
def test_loha_scale_is_merged_once() -> None:
    """LyCORIS' merge applies alpha / r twice."""
    model = adapted(LoHaConfig(r=4, alpha=1, target_modules=["0"]), std=1.0)
    adapter = model.get_base_model().layers[0].adapters["a"]
    W = weights(model)[0]
    p = {n: p.detach() for n, p in adapter.named_parameters()}
    expected = W + (1 / 4) * (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"])
    model.merge_adapter()
    assert error(weights(model)[0], expected) < 1e-6
    assert error(weights(model)[0], W) > 0.1


# -- checks


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
@torch.no_grad()
def test_adapter_with_nan_is_refused_and_the_base_untouched(value: float, how: str) -> None:
    model = adapted(LOHA)
    before = weights(model)
    model.get_base_model().layers[1].adapters["a"].hada_w1_a[3, 1] = value  # the second layer: the first is good
    with pytest.raises(HalotuneError, match=r"layers\.1: merging a gives 8 values .*not finite.*Nothing was merged.*NaN"):
        getattr(model, how)()
    assert equal(before, weights(model)) and model.base_model.merged_adapters == []
    model.merge_adapter(safe_merge=False)  # asked for
    assert not torch.isfinite(weights(model)[1]).all()
    model.unmerge_adapter()
    assert equal(before, weights(model))


@torch.no_grad()
def test_overflow_of_fp16_is_refused() -> None:
    model = adapted(BONE, dtype=torch.float16)
    before = weights(model)
    model.get_base_model().layers[0].adapters["a"].bone_block[1, 2] = 1e5  # finite in fp32, infinite in fp16
    with pytest.raises(HalotuneError, match=r"layers\.0: .* 2 values .*torch.float16.*load the base in fp32"):
        model.merge_adapter()
    assert equal(before, weights(model))


def interrupted(model: PeftModel, monkeypatch, merge) -> None:
    """`merge`, during which memory runs out at the second layer."""

    def fail(*args, **kwargs):
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(model.get_base_model().layers[1], "merge", fail)
        merge()


@pytest.mark.parametrize("unload", [False, True])
@pytest.mark.parametrize("merged", [[], ["a"]], ids=["", "merged before"])
@torch.no_grad()
def test_failure_halfway_puts_everything_back(unload: bool, merged: list[str], monkeypatch) -> None:
    model = adapted(LOHA, LOHA)
    plain = weights(model)
    model.merge_adapter(merged)
    before, y = weights(model), output(model)
    merge = partial(model.merge_and_unload, adapter_names=["a", "b"]) if unload else partial(model.merge_adapter, ["a", "b"])
    interrupted(model, monkeypatch, merge)
    assert equal(before, weights(model)) and torch.equal(output(model), y)
    assert model.base_model.merged_adapters == merged
    model.unmerge_adapter()
    assert equal(plain, weights(model))


@torch.no_grad()
def test_an_unsafe_merge_that_failed_is_finished_but_not_undone(monkeypatch) -> None:
    """It keeps no second copy of the weights."""
    model = adapted(HRA)
    y = output(model)
    interrupted(model, monkeypatch, partial(model.merge_and_unload, safe_merge=False))
    assert error(output(model), y) < 1e-6
    for undo in (model.unmerge_adapter, model.unload):
        with pytest.raises(HalotuneError, match=r"a were merged for good, .*merge_and_unload\(\) to finish, or load the base"):
            undo()
    assert error(output(model.merge_and_unload()), y) < 1e-6


def test_failure_halfway_leaves_a_tied_model_tied(tied: PeftModel, monkeypatch) -> None:
    held = {n: p.clone() for n, p in tied.named_parameters()}

    def fail(*args, **kwargs):
        raise MemoryError

    with pytest.warns(UserWarning, match="shares its weight"), monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr("halotune.engine.weights.merge._check_written", fail)
        tied.merge_and_unload()
    inner = tied.get_base_model()
    assert inner.config.tie_word_embeddings and inner.lm_head.base_layer.weight is inner.model.embed_tokens.weight
    assert all(torch.equal(p, held[n]) for n, p in tied.named_parameters())


def test_unknown_adapter_and_mixed_unload_are_refused() -> None:
    model = adapted(HRA, LOHA)
    model.merge_adapter(["a"])
    with pytest.raises(HalotuneError, match=r"\['a'\] are merged already but not among \['b'\]. Call unmerge_adapter"):
        model.merge_and_unload(adapter_names=["b"])
    with pytest.raises(HalotuneError, match="no adapter named 'z'"):
        model.merge_and_unload(adapter_names=["z"])


def test_new_weights_for_a_merged_adapter_are_refused(tmp_path) -> None:
    model = adapted(HRA)
    model.save_pretrained(tmp_path)
    model.merge_adapter()
    with pytest.raises(HalotuneError, match=r"'a' is merged.*unmerge_adapter\(\) first"):
        model.load_adapter(tmp_path / "a", "a")
    model.unmerge_adapter()
    model.load_adapter(tmp_path / "a", "a")


# -- the report


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_report_agrees_with_a_computation_by_hand(dtype: torch.dtype) -> None:
    model = adapted(BoneConfig(r=4, target_modules=["0"]), dtype=dtype, std=0.02)
    (W, _), D = weights(model), model.get_base_model().layers[0].adapters["a"].bone_block
    wanted = W.float() + D.mT.repeat(1, 2)
    stored = wanted.to(dtype).float()
    report = model.merge_adapter()
    assert report is model.base_model.merge_report
    assert list(report.layers) == ["layers.0"]
    record = report.layers["layers.0"]
    assert record.delta == pytest.approx(error(wanted, W.float()), rel=1e-4)
    lost = ((stored - wanted).norm() / (wanted - W.float()).norm()).item()
    assert record.lost == pytest.approx(lost, rel=1e-4, abs=1e-7)
    assert (record.lost > 0.01) == (dtype == torch.bfloat16)
    assert record.changed == (stored != W.float()).float().mean().item()
    assert report.to_dict()["layers"]["layers.0"] == record.to_dict()


@torch.no_grad()
def test_totals_add_up_over_layers() -> None:
    model = adapted(LOHA, dtype=torch.bfloat16)
    before = torch.cat([W.float().flatten() for W in weights(model)])
    report = model.merge_adapter()
    after = torch.cat([W.float().flatten() for W in weights(model)])
    total = report.total()
    assert total.weights == before.numel() == 128
    assert total.changed == (before != after).float().mean().item()
    assert total.delta == pytest.approx(error(after, before), rel=1e-2)  # but for what was lost
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines] == ["layer", "layers.0", "layers.1", "total"]


@torch.no_grad()
def test_delta_that_drowns_in_rounding_is_warned_of() -> None:
    model = adapted(HRA, dtype=torch.bfloat16, std=1e-4)
    with pytest.warns(UserWarning, match=r"merging into torch.bfloat16 lost \d+%.*in fp32"):
        report = model.merge_adapter()
    assert report.total().lost > 0.5 > report.total().changed


# -- leaving


@torch.no_grad()
def test_merge_and_unload_returns_the_plain_model(capfd) -> None:
    model = adapted(HRA, LOHA)
    inner, y = model.get_base_model(), output(model)
    plain = model.merge_and_unload(progressbar=True)
    assert plain is inner and not hasattr(plain, "peft_config")
    assert [type(m) for m in plain.modules()] == [type(m) for m in base("mlp").modules()]
    assert plain.state_dict().keys() == base("mlp").state_dict().keys()
    assert error(output(plain), y) < 1e-5
    assert "Merging" in capfd.readouterr().err


@torch.no_grad()
def test_merge_and_unload_of_one_of_two() -> None:
    model, one = adapted(HRA, LOHA), adapted(HRA, LOHA)
    one.set_adapter("a")
    y = output(one)
    assert error(output(model.merge_and_unload(adapter_names=["a"])), y) < 1e-5


@torch.no_grad()
def test_merge_and_unload_after_a_merge() -> None:
    model = adapted(HRA, LOHA)
    y = output(model)
    model.merge_adapter(["a"])
    assert error(output(model.merge_and_unload()), y) < 1e-5


@pytest.mark.parametrize("merged", [False, True])
@torch.no_grad()
def test_unload_returns_the_original(merged: bool) -> None:
    model = adapted(HRA, LOHA)
    inner = model.get_base_model()
    if merged:
        model.merge_adapter()
    plain, original = model.unload(), base("mlp")
    assert plain is inner
    assert [type(m) for m in plain.modules()] == [type(m) for m in original.modules()]
    assert equal(weights(plain), weights(original)) and torch.equal(output(plain), output(original))


@torch.no_grad()
def test_modules_to_save_go_with_the_merge_and_stay_out_of_unload() -> None:
    config = HRAConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = randomize(halotune.get_peft_model(base("llama"), config))
    y, again = output(model), copy.deepcopy(model)
    with model.disable_adapter():
        assert torch.equal(output(model), output(base("llama")))
    plain = model.merge_and_unload()
    assert type(plain.lm_head) is nn.Linear and error(output(plain), y) < 1e-5
    assert torch.equal(output(again.unload()), output(base("llama")))


@torch.no_grad()
def test_merged_adapter_that_is_deleted_leaves_the_base_as_it_was() -> None:
    model = adapted(HRA, LOHA)
    before = weights(model)
    model.merge_adapter()
    model.delete_adapter("a")
    assert equal(before, weights(model)) and model.active_adapters == ["b"]
    alone = adapted(LOHA)
    alone.load_state_dict({k.replace(".b.", ".a."): t for k, t in model.state_dict().items()})
    assert torch.equal(output(model), output(alone))


@torch.no_grad()
def test_adapter_added_while_another_is_merged() -> None:
    model = adapted(HRA)
    model.merge_adapter()
    y = output(model)
    model.add_adapter("b", LOHA)
    assert torch.equal(output(model), y)  # inactive
    with pytest.warns(UserWarning, match="base weights are restored"):
        model.set_adapter(["a", "b"])
    assert error(output(model), y) < 1e-5


@pytest.mark.parametrize("target", ["q_proj", "lm_head"])
@torch.no_grad()
def test_saved_while_merged_the_file_is_the_same(target: str, tmp_path) -> None:
    model = randomize(halotune.get_peft_model(base("llama"), HRAConfig(r=2, target_modules=[target])))
    model.save_pretrained(tmp_path / "before")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    before, merged = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("before", "merged"))
    assert before.keys() == merged.keys()
    assert all(torch.equal(merged[k], t) for k, t in before.items())


@torch.no_grad()
def test_the_parameter_stays_the_same_object() -> None:
    model = adapted(HRA)
    parameter = model.get_base_model().layers[0].base_layer.weight
    model.merge_adapter()
    assert model.get_base_model().layers[0].base_layer.weight is parameter
    model.unmerge_adapter()
    assert model.get_base_model().layers[0].base_layer.weight is parameter


@torch.no_grad()
def test_two_miss_adapters_of_different_kind_on_one_model() -> None:
    """In peft they crash."""
    kinds = [MissConfig(r=4, target_modules=["0", "1"], init_weights=init) for init in (True, "bat", "mini")]
    model = adapted(*kinds)
    before, y = weights(model), output(model)
    model.merge_adapter()
    assert error(output(model), y) < 1e-5
    model.unmerge_adapter()
    assert equal(before, weights(model))


# -- tied weights


@pytest.fixture
def tied() -> PeftModel:
    """HRA on a head that shares its weight with the embedding."""
    with pytest.warns(UserWarning, match=r"lm_head shares its weight with model\.embed_tokens\.weight.*a merge unties"):
        model = halotune.get_peft_model(base("tied"), HRAConfig(r=2, target_modules=["q_proj", "lm_head"]))
    return randomize(model)


@torch.no_grad()
def test_merge_of_a_tied_head_leaves_the_embedding_alone(tied: PeftModel) -> None:
    """In peft it changes the embedding."""
    inner = tied.get_base_model()
    embedding, y = inner.model.embed_tokens.weight, output(tied)
    before = embedding.clone()
    with pytest.warns(UserWarning, match="lm_head shares its weight.*the merge gives it a weight of its own"):
        tied.merge_adapter()
    assert inner.model.embed_tokens.weight is embedding and torch.equal(embedding, before)
    assert inner.lm_head.base_layer.weight is not embedding
    assert inner.config.tie_word_embeddings is False
    assert error(output(tied), y) < 1e-5
    inner.tie_weights()  # whatever calls this must not undo the merge
    assert error(output(tied), y) < 1e-5
    tied.unmerge_adapter()
    assert inner.lm_head.base_layer.weight is embedding and torch.equal(embedding, before)
    assert inner.config.tie_word_embeddings is True
    assert inner.config.to_dict() == base("tied").config.to_dict()
    assert torch.equal(output(tied), y)


@torch.no_grad()
def test_merged_tied_head_survives_saving_the_transformers_model(tied: PeftModel, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    y = output(tied)
    with pytest.warns(UserWarning, match="a weight of its own"):
        plain = tied.merge_and_unload()
    assert error(output(plain), y) < 1e-5
    plain.save_pretrained(tmp_path)
    assert "halotune" not in (tmp_path / "config.json").read_text()
    assert error(output(AutoModelForCausalLM.from_pretrained(tmp_path)), y) < 1e-5


@torch.no_grad()
def test_without_the_head_a_tied_model_stays_tied_and_silent(tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    model = randomize(halotune.get_peft_model(base("tied"), HRAConfig(r=2, target_modules=["q_proj"])))
    y, plain = output(model), model.merge_and_unload()
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    plain.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert error(output(again), y) < 1e-5


def test_fully_fine_tuning_a_tied_head_leaves_the_embedding_alone() -> None:
    config = HRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.warns(UserWarning, match="lm_head shares its weight"):
        model = halotune.get_peft_model(base("tied"), config)
    embedding = model.get_base_model().model.embed_tokens.weight
    before = embedding.detach().clone()
    randomize(model)
    assert torch.equal(embedding, before)


@torch.no_grad()
def test_merge_over_an_offloaded_base() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(base("mlp"), execution_device=torch.device("cpu"))
    wrapped = randomize(halotune.get_peft_model(model, HRA))
    x = inputs(base("mlp"))
    y = wrapped(x)
    wrapped.merge_adapter()
    assert error(wrapped(x), y) < 1e-5
    wrapped.unmerge_adapter()
    assert torch.equal(wrapped(x), y)
    with wrapped.disable_adapter():
        assert torch.equal(wrapped(x), base("mlp")(x))
