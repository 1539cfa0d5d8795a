"""What users of PEFT rely on: each test's first line says in our words what PEFT's pages on PeftModel, load_adapter,
modules_to_save, checkpoints and troubleshooting promise.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import halotune
from halotune import AdapterFileError, HalotuneError, HRAConfig, LoraConfig, PeftModel, get_peft_model

from ..interop.models import randomize
from .kinds import KINDS, METHODS, QV, Layers, bert, config, layers, llama, output, with_head

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
P = "base_model.model."


@pytest.fixture(params=["hra", "bat", "lora"])
def method(request: pytest.FixtureRequest) -> str:
    return request.param


def adapted(method: str = "hra", base: nn.Module | None = None, **options: Any) -> PeftModel:
    return randomize(get_peft_model(base or llama(), config(method, **{"target_modules": QV, **options})))  # type: ignore[return-value]


# -- checkpoints


def test_the_files_of_a_folder(method: str, tmp_path: Path) -> None:
    """A folder holds adapter_model.safetensors, adapter_config.json and README.md, and nothing of the base model."""
    adapted(method).save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {WEIGHTS, CONFIG, "README.md"}
    assert all(re.search(r"[qv]_proj\.\w", k) and "base_layer" not in k for k in load_file(tmp_path / WEIGHTS))


def test_every_key_has_the_prefix_and_none_the_adapters_name(method: str, tmp_path: Path) -> None:
    """Every key begins with base_model.model., and the adapter's name, which is free, is in none."""
    model = get_peft_model(llama(), config(method, target_modules=QV), adapter_name="other")
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "other" / WEIGHTS)
    assert keys and all(k.startswith(P) and "other" not in k for k in keys)
    assert PeftModel.from_pretrained(llama(), tmp_path / "other", adapter_name="third").active_adapter == "third"


def test_a_fully_fine_tuned_module_has_its_own_key(tmp_path: Path) -> None:
    """Modules of modules_to_save are stored whole, under the names that they have in the base model."""
    adapted(modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    assert f"{P}lm_head.weight" in load_file(tmp_path / WEIGHTS)


def test_the_configuration_names_base_and_method(tmp_path: Path) -> None:
    """adapter_config.json names the method, the base model and the targets, and is written for inference."""
    base = llama()
    base.config._name_or_path = "user/base"  # type: ignore[union-attr]
    base.name_or_path = "user/base"  # type: ignore[assignment]
    adapted(base=base).save_pretrained(tmp_path)
    entries = json.loads((tmp_path / CONFIG).read_text())
    assert (entries["peft_type"], entries["base_model_name_or_path"]) == ("HRA", "user/base")
    assert sorted(entries["target_modules"]) == QV and entries["inference_mode"] is True


def test_only_the_main_process_writes_and_the_folder_is_made(tmp_path: Path) -> None:
    """is_main_process=False saves nothing; a folder that is missing is made; a file in its place is an error."""
    model = adapted()
    model.save_pretrained(tmp_path / "a" / "b", is_main_process=False)
    assert not (tmp_path / "a").exists()
    model.save_pretrained(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b" / WEIGHTS).is_file()
    with pytest.raises(HalotuneError, match=r"is a file\. Give a folder"):
        model.save_pretrained(tmp_path / "a" / "b" / WEIGHTS)


def test_merged_models_are_plain(method: str, tmp_path: Path) -> None:
    """merge_and_unload returns the base model itself, which is saved and loaded as any other."""
    base = llama()
    model = adapted(method, base)
    expected = output(model.eval())
    assert model.merge_and_unload() is base
    base.save_pretrained(tmp_path)  # type: ignore[operator]
    assert torch.allclose(output(type(base).from_pretrained(tmp_path)), expected, atol=1e-5)  # type: ignore[attr-defined]


# -- loading


def test_loaded_for_inference_and_for_training(method: str, tmp_path: Path) -> None:
    """A loaded adapter is frozen and in eval mode unless is_trainable=True."""
    adapted(method).save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(llama().train(), tmp_path)
    assert not frozen.training and not any(p.requires_grad for p in frozen.parameters())
    trained = PeftModel.from_pretrained(llama().train(), tmp_path, is_trainable=True)
    assert trained.training and {n for n, p in trained.named_parameters() if p.requires_grad} == {
        n for n, _ in trained.named_parameters() if ".adapters." in n
    }


def test_an_adapter_more_is_not_active(method: str, tmp_path: Path) -> None:
    """load_adapter adds an adapter without activating it; set_adapter activates it; disable_adapter is the base."""
    model = adapted(method).eval()
    model.save_pretrained(tmp_path)
    expected, plain = output(model), output(llama().eval())
    other = get_peft_model(llama(), config("hra", target_modules=["up_proj"])).eval()
    before = output(other)
    result = other.load_adapter(tmp_path, "more")
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert other.active_adapter == "default" and torch.equal(output(other), before)
    other.set_adapter("more")
    assert torch.equal(output(other), expected)
    with other.disable_adapter():
        assert torch.equal(output(other), plain)
    other.delete_adapter("default")
    assert torch.equal(output(other), expected) and list(other.peft_config) == ["more"]


def test_wrapping_anew_is_not_loading(tmp_path: Path) -> None:
    """A saved adapter is loaded by from_pretrained; get_peft_model on its configuration starts a new one."""
    model = adapted().eval()
    model.save_pretrained(tmp_path)
    fresh = get_peft_model(llama(), halotune.PeftConfig.from_pretrained(tmp_path)).eval()
    assert not torch.allclose(output(fresh), output(model))
    assert torch.equal(output(PeftModel.from_pretrained(llama(), tmp_path)), output(model))


def test_missing_keys_are_told(tmp_path: Path) -> None:
    """Keys that the file lacks are reported; here they are an error, and the base stays as it was."""
    adapted().save_pretrained(tmp_path)
    from safetensors.torch import save_file

    tensors = load_file(tmp_path / WEIGHTS)
    tensors.pop(gone := sorted(tensors)[0])
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(AdapterFileError, match=rf"{re.escape(gone)}: missing"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_key_mapping_sees_keys_without_the_prefix(tmp_path: Path) -> None:
    """key_mapping's patterns meet the keys without base_model.model., which is put in front again."""
    model = adapted().eval()
    model.save_pretrained(tmp_path)
    from safetensors.torch import save_file

    tensors = {k.replace(f"{P}model.layers", f"{P}decoder.blocks"): t for k, t in load_file(tmp_path / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS)
    again = PeftModel.from_pretrained(llama(), tmp_path, key_mapping={r"^decoder\.blocks": "model.layers"})
    assert torch.equal(output(again), output(model))


# -- modules_to_save


def test_heads_of_tasks_are_trained_and_saved(tmp_path: Path) -> None:
    """A head that is drawn at random is trained and saved where modules_to_save names it; task_type names it for you."""
    base = with_head(bert, "classifier")
    for options in ({"task_type": "TOKEN_CLS"}, {"modules_to_save": ["classifier"]}):
        model = adapted(base=base(0), target_modules=["query"], **options).eval()
        assert "classifier" in (model.modules_to_save or ()) and model.base_model.model.classifier.weight.requires_grad
        model.save_pretrained(tmp_path)
        assert torch.equal(output(PeftModel.from_pretrained(base(1), tmp_path)), output(model))
    assert adapted().modules_to_save is None


def test_each_adapter_has_a_copy_of_its_own(tmp_path: Path) -> None:
    """Each adapter trains its own copy of a module; the original runs without adapters."""
    model = adapted(modules_to_save=["lm_head"]).eval()
    first, plain = output(model), output(llama().eval())
    model.add_adapter("second", config("hra", target_modules=QV, modules_to_save=["lm_head"]))
    model.set_adapter("second")
    randomize(model, seed=3)
    second = output(model)
    model.set_adapter("default")
    assert torch.equal(output(model), first) and not torch.allclose(first, second)
    with model.disable_adapter():
        assert torch.equal(output(model), plain)


def test_running_statistics_are_saved_with_their_module(tmp_path: Path) -> None:
    """A batch normalisation in modules_to_save is stored with its running statistics."""
    model = adapted(base=layers(), target_modules=["first"], modules_to_save=["head"])
    model.train()(torch.randn(4, 5, 16))
    model.eval().save_pretrained(tmp_path)
    assert load_file(tmp_path / WEIGHTS)[f"{P}head.0.num_batches_tracked"] == 1
    again = PeftModel.from_pretrained(layers(), tmp_path)
    assert torch.equal(output(again), output(model)) and isinstance(again.base_model.model, Layers)


# -- new words


def test_new_words_need_their_embeddings(tmp_path: Path) -> None:
    """After the vocabulary was resized the embeddings are stored without being asked for; save_embedding_layers decides."""
    kind = KINDS["resized"]
    model = adapted(base=kind.base(0)).eval()
    with pytest.warns(UserWarning, match="holds embeddings that differ"):
        model.save_pretrained(tmp_path / "auto")
        assert torch.equal(output(PeftModel.from_pretrained(kind.base(1), tmp_path / "auto")), output(model))
    model.save_pretrained(tmp_path / "no", save_embedding_layers=False)
    assert not any("embed" in k or "lm_head" in k for k in load_file(tmp_path / "no" / WEIGHTS))


# -- dtypes


def test_adapters_over_half_precision_are_kept_in_full(tmp_path: Path) -> None:
    """Over a half-precision base adapters are fp32 (no "unscale FP16 gradients"); else autocast_adapter_dtype=False."""
    base = llama().to(torch.bfloat16)
    assert {p.dtype for p in get_peft_model(base, HRAConfig(r=2, target_modules=QV)).parameters() if p.requires_grad} == {
        torch.float32
    }
    low = get_peft_model(llama().to(torch.bfloat16), HRAConfig(r=2, target_modules=QV), autocast_adapter_dtype=False)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}


def test_pefts_helpers_take_our_models(method: str) -> None:
    """cast_mixed_precision_params leaves trained weights in fp32 and the rest in half precision."""
    peft = pytest.importorskip("peft")
    model = adapted(method)
    peft.cast_mixed_precision_params(model, torch.bfloat16)
    assert {(p.requires_grad, p.dtype) for p in model.parameters()} == {(True, torch.float32), (False, torch.bfloat16)}


# -- what trains


def test_what_trains_can_be_set(method: str) -> None:
    """set_requires_grad freezes adapters or lets them train, active or not."""
    model = adapted(method, modules_to_save=["lm_head"])
    model.add_adapter("second", config(method, target_modules=QV))
    trained = lambda: {n.split(".")[-2 - ("lora" in n)] for n, p in model.named_parameters() if p.requires_grad}  # noqa: E731
    model.set_requires_grad("default", False)
    assert not trained()
    model.set_requires_grad(["default", "second"])
    assert trained() == {"default", "second"}
    with pytest.raises(HalotuneError, match="no adapter named 'third'"):
        model.set_requires_grad("third")


def test_the_status_says_what_is_active(method: str) -> None:
    """get_model_status tells in one look whether adapters are active, enabled, merged and trained as they should be."""
    model = adapted(method)
    status = model.get_model_status()
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert status.requires_grad == {"default": True} and status.available_adapters == ["default"]


def test_unknown_arguments_are_errors(tmp_path: Path) -> None:
    """A keyword that nobody knows is not dropped."""
    model = adapted()
    with pytest.raises(TypeError, match="selected_adapter"):
        model.save_pretrained(tmp_path, selected_adapter=["default"])  # type: ignore[call-arg]
    model.save_pretrained(tmp_path)
    with pytest.raises(HalotuneError, match=r"no keyword 'torch_devise'\. Did you mean 'torch_device'"):
        model.load_adapter(tmp_path, "other", torch_devise="cpu")
    assert list(model.peft_config) == ["default"]


def test_the_base_is_loaded_with_the_adapter(tmp_path: Path) -> None:
    """AutoPeftModelForCausalLM loads base and adapter from the adapter's folder alone."""
    llama().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = adapted(base=base, task_type="CAUSAL_LM").eval()
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(output(halotune.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()), output(model))


def test_every_method_of_the_law_is_a_registered_one() -> None:
    from halotune.methods.registry import methods

    assert {config(m).peft_type.value for m in METHODS} >= {m.peft_type for m in methods()}
    assert isinstance(config("lora"), LoraConfig)
