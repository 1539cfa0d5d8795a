"""Whole models: loaded quantized by transformers, prepared, trained, saved, merged."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import halotune
from halotune import BoneConfig, HRAConfig, LoHaConfig, PeftModel
from halotune.engine.injection.modules import adapted_layers

from ..laws.cases import relative, train
from .cases import Case, each_base, same, some, stored_tensors
from .test_storage import HRA

CONFIGS = {
    "hra": HRAConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "loha": LoHaConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    "bone": BoneConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    "bat": BoneConfig(r=8, init_weights="bat", target_modules="all-linear", task_type="CAUSAL_LM"),
}


def quantization(name: str):
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if name == "ao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if name == "bnb-int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=name == "bnb-nf4-double")


FORMATS = ["bnb-nf4", "bnb-nf4-double", "bnb-int8", "ao-int8"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A Llama of two layers with random weights, in floats."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def load(checkpoint, name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(checkpoint, quantization_config=quantization(name), device_map="cpu", dtype=dtype)


IDS = torch.arange(24).view(2, 12) * 7 % 64


def adapt(model: nn.Module, name: str) -> PeftModel:
    if name != "bat":
        return halotune.get_peft_model(model, copy.copy(CONFIGS[name]))
    with pytest.warns(UserWarning, match="14 quantized layers .* are then dequantized"):
        return halotune.get_peft_model(model, copy.copy(CONFIGS[name]))


def optimise(model: PeftModel, steps: int = 4) -> list[float]:
    rate = 2e-2 if model.peft_type in ("HRA", "LOHA") else 2e-3
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("name", FORMATS)
def test_prepared_trained_saved_loaded_and_merged(checkpoint, name, method, tmp_path):
    base = load(checkpoint, name)
    before = {n: stored_tensors(m) for n, m in base.named_modules() if n.endswith("_proj")}
    model = adapt(halotune.prepare_model_for_kbit_training(base), method).train()
    assert len(adapted_layers(model)) == 14
    first = optimise(model, 2)
    with torch.no_grad():
        model.eval()(input_ids=IDS)  # as between two epochs
    losses = [*first, *optimise(model.train())]
    assert all(b < a for a, b in itertools.pairwise(losses)) and losses[-1] < losses[0] - 0.05

    with torch.no_grad():
        y = model.eval()(input_ids=IDS).logits
        model.save_pretrained(tmp_path)
        assert torch.equal(model(input_ids=IDS).logits, y)
        if method == "bat":
            with pytest.warns(UserWarning, match="dequantized"):
                again = PeftModel.from_pretrained(load(checkpoint, name), tmp_path).eval()
        else:
            again = PeftModel.from_pretrained(load(checkpoint, name), tmp_path).eval()
        assert relative(again(input_ids=IDS).logits, y) < 1e-5
        with again.disable_adapter():
            plain = again(input_ids=IDS).logits
        assert relative(plain, load(checkpoint, name).eval()(input_ids=IDS).logits) < 1e-5
        assert relative(plain, y) > 0.02

        merging = pytest.warns(UserWarning, match=r"requantizing 14 merged weights \(bitsandbytes nf4")
        if "nf4" in name:
            with merging:
                report = again.merge_adapter()
        else:
            report = again.merge_adapter()
        layers = adapted_layers(again.get_base_model())
        assert report.layers.keys() == layers.keys() and all(r.error > 0 for r in report.layers.values())
        assert 0 < relative(again(input_ids=IDS).logits, y) < (0.2 if "nf4" in name else 0.03)
        again.unmerge_adapter()
        assert relative(again(input_ids=IDS).logits, y) < 1e-5
        restored = {n: stored_tensors(layer.base_layer) for n, layer in layers.items()}

        floats = again.merge_and_unload(quantized="keep_float")
        assert not any(isinstance(m, halotune.core.layer.AdaptedLayer) for m in floats.modules())
        assert all(type(floats.get_submodule(n)) is nn.Linear for n in layers)
        assert relative(floats(input_ids=IDS).logits, y) < (0.02 if name.startswith("bnb") else 1e-5)
        assert floats.generate(input_ids=IDS[:1, :3], max_new_tokens=2, do_sample=False).shape == (1, 5)
    if name == "ao-int8":  # bitsandbytes moves its parts about at the first call
        assert all(same(restored[n], before[n]) for n in layers)


@pytest.mark.parametrize("name", FORMATS)
def test_gradient_checkpointing_changes_no_gradient(checkpoint, name):
    def gradients(checkpointing: bool):
        torch.manual_seed(0)
        model = load(checkpoint, name)
        model = adapt(halotune.prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing), "hra").train()
        assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules()) is checkpointing
        train(nn.ModuleList(layer.adapters for layer in adapted_layers(model).values()))
        model(input_ids=IDS, labels=IDS).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    with_it, without = gradients(True), gradients(False)
    assert len(with_it) == 14 and all(g.abs().sum() > 0 for g in with_it)
    assert all(relative(a, b) < 1e-5 for a, b in zip(with_it, without, strict=True))


@pytest.mark.parametrize("name", FORMATS)
def test_preparing_keeps_the_few_bits(checkpoint, name):
    model = halotune.prepare_model_for_kbit_training(load(checkpoint, name, torch.bfloat16))
    projection = model.model.layers[0].self_attn.q_proj
    assert not any(p.requires_grad for p in model.parameters())
    assert model.model.norm.weight.dtype == model.model.embed_tokens.weight.dtype == torch.float32
    reference = load(checkpoint, name, torch.bfloat16).model.layers[0].self_attn.q_proj
    assert type(projection.weight) is type(reference.weight) and projection.weight.dtype == reference.weight.dtype
    assert same(stored_tensors(projection), stored_tensors(reference))
    model = adapt(model, "hra").train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert optimise(model)[-1] < 4.3


@pytest.mark.parametrize("name", FORMATS)
@torch.no_grad()
def test_several_adapters(checkpoint, name):
    """Of different methods: composed, one per sample, one at a time, none, deleted."""
    base = load(checkpoint, name)
    plain = base.eval()(input_ids=IDS).logits
    model = adapt(base, "hra").eval()
    model.add_adapter("b", copy.copy(CONFIGS["bone"]))
    for layer in adapted_layers(model).values():
        for p in layer.adapters.parameters():
            p.normal_(std=0.05)
    alone = {}
    for adapter in ("default", "b"):
        model.set_adapter(adapter)
        alone[adapter] = model(input_ids=IDS).logits
        assert relative(alone[adapter], plain) > 1e-3
    mixed = model(input_ids=IDS, adapter_names=["default", "__base__"]).logits
    assert relative(mixed[0], alone["default"][0]) < 0.02 and relative(mixed[1], plain[1]) < 0.02
    model.set_adapter(["default", "b"])
    assert relative(model(input_ids=IDS).logits, alone["b"]) > 1e-3
    duplicate = copy.deepcopy(model)
    assert torch.equal(duplicate(input_ids=IDS).logits, model(input_ids=IDS).logits)
    duplicate.delete_adapter("default")
    assert torch.equal(duplicate(input_ids=IDS).logits, alone["b"])
    assert torch.equal(duplicate.unload()(input_ids=IDS).logits, plain)


class Sum(nn.ModuleList):
    def forward(self, x):
        return sum(m(x) for m in self)


@each_base(some("bnb-nf4", "bnb-nf4-bf16", "bnb-int8", "ao-int8", "hqq-4bit"))
@pytest.mark.filterwarnings("ignore:Bat with r=3 may need the weight")
def test_hooks_that_come_later_see_the_call_with_another_weight(base):
    case = Case(HRA, base)
    module, x = case.module(), case.input()
    model = halotune.get_peft_model(nn.Sequential(module), BoneConfig(r=3, init_weights="bat", target_modules=["0"]))
    seen = []
    with torch.no_grad():
        y = model(x)
    module.register_forward_pre_hook(lambda m, args: seen.append(args[0]) or (args[0] / 2,))
    module.register_forward_hook(lambda m, args, out: 2 * out - m.bias)
    again = model(x)
    assert len(seen) == 1 and seen[0].shape == x.shape and relative(again, y) < 1e-2
    again.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


@each_base(some("bnb-nf4", "bnb-int8", "ao-int8", "hqq-4bit"))
@pytest.mark.parametrize("unload", [False, True])
@torch.no_grad()
def test_a_merge_that_fails_halfway_leaves_every_layer_as_it_was(base, unload, monkeypatch):
    modules = [Case(HRA, base).module() for _ in range(3)]
    model = halotune.get_peft_model(Sum(modules), HRAConfig(r=3, init_weights=False, target_modules=["0", "1", "2"]))
    x = Case(HRA, base).input()
    y = model(x)
    before = [stored_tensors(m) for m in modules]
    kind = type(model.get_base_model()[0].base)
    quantize, calls = kind.quantize, []

    def fail(self, W):
        calls.append(W)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return quantize(self, W)

    monkeypatch.setattr(kind, "quantize", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.merge_and_unload() if unload else model.merge_adapter()
    assert len(calls) == 3
    assert all(same(stored_tensors(m), b) for m, b in zip(modules, before, strict=True))
    assert torch.equal(model(x), y) and not model.base_model.merged_adapters


@each_base(some("bnb-nf4", "bnb-int8", "ao-int8", "hqq-4bit"))
@pytest.mark.filterwarnings("ignore:requantizing 1 merged weights")
@pytest.mark.parametrize("quantized", ["requantize", "keep_float"])
@torch.no_grad()
def test_disabled_while_merged(base, quantized):
    """Inside, the quantized layer itself; afterwards, merged in the same way as before."""
    module, x = Case(HRA, base).module(), Case(HRA, base).input()
    plain = module(x)
    before = stored_tensors(module)
    model = halotune.get_peft_model(nn.Sequential(module), HRAConfig(r=3, init_weights=False, target_modules=["0"]))
    model.merge_adapter(quantized=quantized)
    y = model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), plain) and same(stored_tensors(module), before)
    assert torch.equal(model(x), y) and not torch.equal(y, plain)
    assert (model.get_base_model()[0].base_layer is module) is (quantized == "requantize")
    model.delete_adapter("default")
    assert model.get_base_model()[0] is module and same(stored_tensors(module), before)


@torch.no_grad()
def test_the_report_of_a_quantized_merge():
    (base,) = some("bnb-nf4")
    model = nn.Sequential(Case(HRA, base).module())
    model = halotune.get_peft_model(model, HRAConfig(r=3, init_weights=False, target_modules=["0"]))
    with pytest.warns(UserWarning, match=r"requantizing 1 merged weights \(bitsandbytes nf4\) left an error of \d+\.\d+%"):
        report = model.merge_adapter()
    head, row, _ = str(report).splitlines()
    assert head.split() == ["layer", "|ΔW|/|W|", "lost", "error", "changed"]
    record = report.layers["0"]
    assert record.error == pytest.approx(record.lost * record.delta) and 0.05 < record.error < 0.15
    assert f"{record.error:.2e}" in row.split() and report.to_dict()["layers"]["0"]["error"] == record.error
    with pytest.raises(halotune.HalotuneError, match="quantized: expected 'requantize' or 'keep_float'; got 'float'"):
        model.merge_adapter(quantized="float")
    status = model.get_layer_status()[0]
    assert status.quantization_backend == "bitsandbytes nf4"
