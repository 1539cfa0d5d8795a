"""transformers' Conv1D, a linear layer with a transposed weight: a TypeError in peft for HRA, LoHa and MiSS."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from halotune import PeftModel
from halotune.core.config import AdapterConfig

from ..several.models import METHODS, adapted, close, composed, config, differ, every_method, layers, same_state, state

IDS = torch.arange(10).reshape(2, 5) * 3 + 1
LINEAR = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=37, n_embd=6, n_layer=2, n_head=2, n_positions=16))
    for module in model.modules():
        if isinstance(module, Conv1D):  # their own start is too small to show
            nn.init.normal_(module.weight, std=0.4)
    return model.double().eval().requires_grad_(False)


def all_linear(method: str) -> AdapterConfig:
    out = config(method)
    out.target_modules = "all-linear"
    return out


@every_method
def test_all_linear(plain: nn.Module, tmp_path, method: str):
    model = adapted(plain, default=all_linear(method))
    assert set(layers(model)) == {f"transformer.h.{i}.{n}" for i in range(2) for n in LINEAR}  # and no lm_head
    expected = composed(plain, model, ["default"])(input_ids=IDS).logits
    y = model(input_ids=IDS).logits
    close(y, expected)
    assert differ(y, plain(input_ids=IDS).logits)
    y.square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(gradients) == {n for n, _ in model.named_parameters() if ".adapters." in n}
    assert all(g.abs().max() > 0 for g in gradients.values())

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    assert torch.equal(loaded(input_ids=IDS).logits, y) and loaded.peft_config["default"].target_modules != "all-linear"


@every_method
@torch.no_grad()
def test_merge_in_half_precision(plain: nn.Module, method: str):
    plain = copy.deepcopy(plain).bfloat16()
    model = adapted(plain, default=all_linear(method))
    before = state(model)
    model.merge_adapter()
    for path, layer in layers(model).items():
        W = plain.get_submodule(path).weight.float()
        assert torch.equal(layer.base_layer.weight, layer.adapters["default"].weight(W.T).T.bfloat16())
        assert layer.base_layer.weight.is_contiguous()
    model.unmerge_adapter()
    assert same_state(model, before)
    out = model.merge_and_unload()
    assert type(out.transformer.h[1].mlp.c_fc) is Conv1D and differ(*(m(input_ids=IDS).logits for m in (out, plain)))


@torch.no_grad()
def test_several_in_generation(plain: nn.Module):
    model = adapted(plain, **{n: all_linear(n) for n in METHODS})
    names = ["__base__", "hra-r4", "loha-r5", "bat-r3", "bone-r7"]
    ids = torch.randint(1, 37, (5, 4))
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    together = model.generate(input_ids=ids, adapter_names=names, **options)
    for i, name in enumerate(names):
        alone = composed(plain, model, [] if name == "__base__" else [name])
        assert torch.equal(together[i : i + 1], alone.generate(input_ids=ids[i : i + 1], **options))
    model.set_adapter(names[1:])
    close(model(input_ids=ids).logits, composed(plain, model, names[1:])(input_ids=ids).logits)
