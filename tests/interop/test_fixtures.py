"""Files that peft wrote, of every method: they load, compute what peft computed, and are written again as they were."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

import halotune
from halotune import PeftModel

from .models import FIXTURES, base, base_biases_stay, error, output

pytest.importorskip("transformers")

ALL = sorted(file.parent.name for file in FIXTURES.glob("*/adapter_config.json"))
LACK_BIASES = ["bone_bias_all", "bone_bias_only"]  # peft 0.15 did not store them
WHOLE = [name for name in ALL if name not in LACK_BIASES]
FROM_PEFT = [name for name in WHOLE if not name.startswith("lora_from_")]


def load(name: str, **kwargs) -> tuple[PeftModel, dict[str, torch.Tensor], torch.Tensor]:
    """The adapter on its base, what peft computed with it, and the input."""
    io = load_file(FIXTURES / name / "io.safetensors")
    kind = "convnet" if "x" in io else "llama"
    return PeftModel.from_pretrained(base(kind), FIXTURES / name, **kwargs).eval(), io, io.get("x", io.get("input_ids"))


def config_entries(folder) -> dict:
    entries = json.loads((folder / "adapter_config.json").read_text())
    return {k: sorted(v) if isinstance(v, list) else v for k, v in entries.items()}


def test_every_kind_of_file_is_here() -> None:
    assert {name.split("_")[0] for name in ALL} == {"bone", "hra", "loha", "lora", "miss"}
    assert len(ALL) >= 24


@pytest.mark.parametrize("kind", ["llama", "convnet"])
def test_base_models_are_those_of_the_fixtures(kind: str) -> None:
    io = load_file(FIXTURES / f"base_{kind}" / "io.safetensors")
    x, expected = (io["x"], io["base_out"]) if kind == "convnet" else (io["input_ids"], io["base_logits"])
    assert error(output(base(kind), x), expected) < 1e-6


@pytest.mark.parametrize("name", WHOLE)
@torch.no_grad()
def test_outputs_are_those_of_peft(name: str) -> None:
    model, io, x = load(name)
    assert error(output(model, x), io["expected"]) < 1e-5
    if "expected_disabled" not in io:
        return
    assert error(io["expected"], io["expected_disabled"]) > 1e-3  # the adapter does something
    biased = getattr(model.active_peft_config, "bias", "none") != "none"
    with base_biases_stay(biased), model.disable_adapter():
        assert error(output(model, x), io["expected_disabled"]) < 1e-5
    assert error(output(model, x), io["expected"]) < 1e-5
    model.merge_adapter()
    assert error(output(model, x), io["expected_merged"]) < 1e-5
    model.unmerge_adapter()
    assert error(output(model.merge_and_unload(), x), io["expected_merged"]) < 1e-5


@pytest.mark.parametrize("name", FROM_PEFT)
def test_gradients_are_those_of_peft(name: str) -> None:
    model, io, x = load(name, is_trainable=True)
    output(model, x).square().mean().backward()
    mine = {
        re.sub(r"\.adapters\.default\.(\w+)", r".\1.default", n): p.grad for n, p in model.named_parameters() if p.requires_grad
    }
    theirs = {key.removeprefix("grad::"): t for key, t in io.items() if key.startswith("grad::")}
    assert mine.keys() == theirs.keys()
    assert {k: e for k, t in theirs.items() if not (e := error(mine[k], t)) < 1e-5} == {}


@pytest.mark.parametrize("name", WHOLE)
def test_saved_again_the_files_are_the_same(name: str, tmp_path) -> None:
    model, _, _ = load(name)
    model.save_pretrained(tmp_path, save_embedding_layers="embeddings" in name)
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (tmp_path, FIXTURES / name))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], t) and ours[k].dtype == t.dtype for k, t in theirs.items())
    ours, theirs = config_entries(tmp_path), config_entries(FIXTURES / name)
    ours.pop("peft_version"), theirs.pop("peft_version", None)
    assert ours == {k: theirs[k] for k in ours}
    beyond = {k: v for k, v in theirs.items() if k not in ours}
    if name.startswith("lora_from_"):  # peft's LoRA has options that we lack: all of them are off
        assert {k for k, v in beyond.items() if v} == {"megatron_core", "qalora_group_size"}
    else:
        assert beyond == {}


@pytest.mark.parametrize("name", LACK_BIASES)
def test_bone_files_without_their_biases_load_with_a_warning_that_names_them(name: str, tmp_path) -> None:
    with pytest.warns(UserWarning, match="trains biases, but the file lacks") as caught:
        model, io, x = load(name)
    (warning,) = caught
    assert str(FIXTURES / name / "adapter_model.safetensors") in str(warning.message)
    model.save_pretrained(tmp_path)
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (tmp_path, FIXTURES / name))
    lacking = ours.keys() - theirs.keys()
    assert lacking and all(key.endswith(".bias") and key in str(warning.message) for key in lacking)
    assert all(torch.equal(ours[k], t) for k, t in theirs.items())
    assert 1e-3 < error(output(model, x), io["expected"]) < 1  # near, but biases are what they were


@pytest.mark.parametrize("name", ["hra_basic", "loha_linear", "bone_basic"])
def test_the_exact_lora_form_computes_the_same(name: str) -> None:
    (method, _, x), (lora, _, _) = load(name), load(f"lora_from_{name}")
    assert error(output(lora, x), output(method, x)) < 1e-5


def test_file_in_kohyas_names_is_recognised(tmp_path) -> None:
    shutil.copy(FIXTURES / "lycoris_loha_kohya_prefix" / "lycoris.safetensors", tmp_path / "adapter_model.safetensors")
    halotune.LoHaConfig(r=4, target_modules=["q_proj"]).save_pretrained(tmp_path)
    with pytest.raises(halotune.AdapterFileError, match=r"adapter_model\.safetensors: lora_unet_.*kohya.*Convert"):
        PeftModel.from_pretrained(base("llama"), tmp_path)
