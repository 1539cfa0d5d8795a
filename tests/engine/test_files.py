"""Adapters on disk and on the hub: where they lie, what lies beside them, and models made from them alone."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import halotune
from halotune import (
    AdapterFileError,
    BoneConfig,
    HalotuneError,
    HRAConfig,
    LoHaConfig,
    LoraConfig,
    MissConfig,
    PeftModel,
)

from ..interop.models import ConvNet, base, error, output, randomize

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
FILES = {CONFIG, WEIGHTS, CARD}
HRA = HRAConfig(r=2, target_modules=["0"])


def wrap(kind: str = "mlp", config=HRA, seed: int = 0, **kwargs) -> PeftModel:
    """A model with a trained adapter; the same each time."""
    torch.manual_seed(seed)
    return randomize(halotune.get_peft_model(base(kind), config, **kwargs), seed=seed)


@pytest.fixture
def three() -> PeftModel:
    """A model with adapters `default`, `second` and `third`."""
    model = wrap()
    model.add_adapter("second", LoHaConfig(r=2, target_modules=["1"]))
    model.add_adapter("third", BoneConfig(r=4, target_modules=["1"]))
    model.set_adapter(["default", "second", "third"])
    return randomize(model)


def tree(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


# -- the folder


@torch.no_grad()
def test_default_lies_in_the_root_and_others_in_subfolders(three: PeftModel, tmp_path) -> None:
    three.save_pretrained(tmp_path)
    assert tree(tmp_path) == FILES | {f"{n}/{f}" for n in ("second", "third") for f in FILES}
    again = PeftModel.from_pretrained(base("mlp"), str(tmp_path))
    for name in ("second", "third"):
        again.load_adapter(tmp_path, name, subfolder=name)
    again.set_adapter(["default", "second", "third"])
    assert torch.equal(output(again), output(three))


@torch.no_grad()
def test_adapter_under_another_name_and_from_its_subfolder(three: PeftModel, tmp_path) -> None:
    three.save_pretrained(tmp_path)
    three.set_adapter("second")
    for folder, subfolder in ((tmp_path, "second"), (tmp_path / "second", None)):
        again = PeftModel.from_pretrained(base("mlp"), folder, "renamed", subfolder=subfolder)
        assert again.active_adapters == ["renamed"]
        assert torch.equal(output(again), output(three))


def test_selected_adapters(three: PeftModel, tmp_path) -> None:
    three.save_pretrained(tmp_path / "one", selected_adapters=["third"])
    assert tree(tmp_path / "one") == {f"third/{f}" for f in FILES}
    with pytest.raises(HalotuneError, match=r"no adapter is named 'fourth'; there are \['default', 'second', 'third'\]"):
        three.save_pretrained(tmp_path / "two", selected_adapters=["default", "fourth"])
    assert not (tmp_path / "two").exists()


def test_other_processes_write_nothing(three: PeftModel, tmp_path) -> None:
    three.save_pretrained(tmp_path / "new", is_main_process=False)
    assert not (tmp_path / "new").exists()


def test_pickles_are_not_written(three: PeftModel, tmp_path) -> None:
    with pytest.raises(HalotuneError, match=r"safe_serialization=False would write a pickle.*Leave it True"):
        three.save_pretrained(tmp_path, safe_serialization=False)
    assert tree(tmp_path) == set()


@pytest.mark.parametrize(
    "config",
    [
        HRAConfig(r=3, init_weights=False),
        HRAConfig(r=3, apply_GS=True, init_weights=False),
        LoHaConfig(r=2, alpha=3),
        BoneConfig(r=4),
        BoneConfig(r=4, init_weights="bat"),
        MissConfig(r=3),
        MissConfig(r=2, init_weights="mini", mini_r=2),
        MissConfig(r=4, init_weights="bat", bias="MiSS_only"),
        LoraConfig(r=2, use_rslora=True, bias="all"),
    ],
    ids=lambda c: f"{c.peft_type.value}-{c.init_weights}".lower(),
)
@torch.no_grad()
def test_every_method_comes_back_exactly(config, tmp_path) -> None:
    config.target_modules = {"0", "1"}
    model = wrap(config=config)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / WEIGHTS, "pt") as f:
        assert f.metadata() == {"format": "pt"}
    again = PeftModel.from_pretrained(base("mlp"), tmp_path)
    assert torch.equal(output(again), output(model))
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()
    assert (tmp_path / "again" / CONFIG).read_text() == (tmp_path / CONFIG).read_text()


def test_bone_written_as_miss_is_the_same_adapter(tmp_path) -> None:
    for bias in ("none", "bone_only"):
        model = wrap(config=BoneConfig(r=4, bias=bias, target_modules=["0"]))
        model.save_pretrained(tmp_path, bone_as_miss=True)
        config = json.loads((tmp_path / CONFIG).read_text())
        assert (config["peft_type"], config["bias"]) == ("MISS", bias.replace("bone", "MiSS"))
        assert not any("bone" in key for key in load_file(tmp_path / WEIGHTS))
        assert torch.equal(output(PeftModel.from_pretrained(base("mlp"), tmp_path)), output(model))
        model.save_pretrained(tmp_path / "named", peft_type="MISS")
        assert (tmp_path / "named" / CONFIG).read_text() == (tmp_path / CONFIG).read_text()
        assert (tmp_path / "named" / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()
    with pytest.raises(HalotuneError, match=r"expected one of .*got 'MISSS'. Did you mean 'MISS'"):
        wrap().save_pretrained(tmp_path / "no", peft_type="MISSS")
    wrap().save_pretrained(tmp_path / "hra", bone_as_miss=True)
    assert json.loads((tmp_path / "hra" / CONFIG).read_text())["peft_type"] == "HRA"


def test_what_is_written_is_for_inference(tmp_path) -> None:
    model = wrap()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["inference_mode"] is True
    assert model.peft_config["default"].inference_mode is False


def test_a_given_state_dict_is_written_instead_of_the_models_own(tmp_path) -> None:
    model, other = wrap(), wrap(seed=1)
    model.save_pretrained(tmp_path, state_dict=other.state_dict())
    assert torch.equal(output(PeftModel.from_pretrained(base("mlp"), tmp_path)), output(other))


def test_tensors_that_share_memory_are_written_each_on_its_own(tmp_path) -> None:
    model = wrap(config=HRAConfig(r=2, target_modules=["0", "1"]))
    first, second = (layer.adapters["default"] for layer in model.get_base_model().layers)
    second.hra_u = first.hra_u
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / WEIGHTS)) == 2


# -- the card


def test_card_says_what_is_known_and_is_not_overwritten(tmp_path) -> None:
    config = HRAConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = wrap("llama", config)
    model.save_pretrained(tmp_path)
    card = (tmp_path / CARD).read_text()
    stored = sum(t.numel() for t in load_file(tmp_path / WEIGHTS).values())
    for line in (
        f"base_model: {model.get_base_model().name_or_path}",
        "- hra",
        "- Method: HRA, r = 4",
        "- Adapted modules: q_proj",
        "- Fully fine-tuned modules: lm_head",
        f"- Numbers stored: {stored:,}",
    ):
        assert line in card.splitlines()
    (tmp_path / CARD).write_text("Its author's own.")
    model.save_pretrained(tmp_path)
    assert (tmp_path / CARD).read_text() == "Its author's own."


def test_card_of_a_base_without_a_name(tmp_path) -> None:
    wrap(config=BoneConfig(r=4, init_weights="bat", target_modules="layers.0")).save_pretrained(tmp_path)
    card = (tmp_path / CARD).read_text()
    assert "base_model:" not in card and "# BONE adapter\n" in card and "None" not in card


# -- writing


@pytest.mark.parametrize("fails, file", [("weights", WEIGHTS), ("config", CONFIG)])
def test_failed_write_keeps_the_old_file(fails: str, file: str, tmp_path, monkeypatch) -> None:
    wrap(seed=0).save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    changed = wrap(seed=1)

    def half_of_the_file(path: Path) -> None:
        path.write_bytes(b"half of it")
        raise OSError("no space left on device")

    if fails == "weights":
        monkeypatch.setattr(safetensors.torch, "save_file", lambda tensors, path, **kwargs: half_of_the_file(path))
    else:
        monkeypatch.setattr(Path, "write_text", lambda path, *args, **kwargs: half_of_the_file(path))
    with pytest.raises(OSError, match="no space left"):
        changed.save_pretrained(tmp_path)
    monkeypatch.undo()
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert after.keys() == before.keys()  # no temporary file is left
    assert after[file] == before[file]
    changed.save_pretrained(tmp_path)
    assert torch.equal(output(PeftModel.from_pretrained(base("mlp"), tmp_path)), output(changed))


@pytest.mark.skipif(os.name == "nt", reason="Windows does not replace a file that is open")
def test_whoever_reads_the_old_file_reads_it_to_its_end(tmp_path) -> None:
    wrap(seed=0).save_pretrained(tmp_path)
    before = (tmp_path / WEIGHTS).read_bytes()
    with (tmp_path / WEIGHTS).open("rb") as f:
        wrap(seed=1).save_pretrained(tmp_path)
        assert f.read() == before != (tmp_path / WEIGHTS).read_bytes()


def test_files_have_the_modes_that_the_umask_gives(tmp_path) -> None:
    old = os.umask(0o027)
    try:
        wrap().save_pretrained(tmp_path)
    finally:
        os.umask(old)
    assert {oct((tmp_path / f).stat().st_mode & 0o777) for f in FILES} == {"0o640"}


# -- reading


def test_key_mapping(tmp_path) -> None:
    model = wrap()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    renamed = {k.replace("base_model.model.layers", "old.blocks"): t for k, t in tensors.items()}
    safetensors.torch.save_file(renamed, tmp_path / WEIGHTS)
    mapping = {r"^old\.blocks": "base_model.model.layers"}
    again = PeftModel.from_pretrained(base("mlp"), tmp_path, key_mapping=mapping)
    again.load_adapter(tmp_path, "second", key_mapping=mapping)
    assert torch.equal(output(again), output(model))
    safetensors.torch.save_file({**tensors, **{k: t.clone() for k, t in renamed.items()}}, tmp_path / WEIGHTS)
    with pytest.raises(AdapterFileError, match=r"key_mapping gives base_model.* twice.*one to one"):
        PeftModel.from_pretrained(base("mlp"), tmp_path, key_mapping=mapping)


def test_mismatched_sizes_are_left_out_on_request_and_named(tmp_path) -> None:
    wrap(config=HRAConfig(r=2, target_modules=["0", "1"])).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    second = "base_model.model.layers.1.hra_u"
    tensors[second] = torch.ones(8, 5)
    safetensors.torch.save_file(tensors, tmp_path / WEIGHTS)
    with pytest.warns(UserWarning, match=rf"{re.escape(second)}: expected \(8, 2\), found \(8, 5\); left out"):
        model = PeftModel.from_pretrained(base("mlp"), tmp_path, ignore_mismatched_sizes=True)
    kept, fresh = (layer.adapters["default"].hra_u for layer in model.get_base_model().layers)
    assert torch.equal(kept, tensors["base_model.model.layers.0.hra_u"])
    assert fresh.shape == (8, 2) and torch.isfinite(fresh).all()


def test_adapter_is_put_where_it_is_asked_for(tmp_path) -> None:
    wrap().save_pretrained(tmp_path)
    model = wrap()
    model.load_adapter(tmp_path, "second", torch_device="meta")
    assert all(p.is_meta == (".second." in n) for n, p in model.named_parameters())


# -- the hub


@pytest.fixture
def hub(tmp_path, monkeypatch) -> list[dict]:
    """A hub of one folder, and what was asked of it."""
    pytest.importorskip("huggingface_hub")
    wrap().save_pretrained(tmp_path / "main")
    wrap(seed=1).save_pretrained(tmp_path / "v2" / "inner")
    asked: list[dict] = []

    def download(repository: str, filename: str, *, subfolder: str | None = None, revision: str = "main", **kwargs):
        asked.append({"repository": repository, "subfolder": subfolder, "revision": revision, **kwargs})
        return str(tmp_path / revision / (subfolder or "") / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return asked


def test_repository_of_the_hub(hub: list[dict]) -> None:
    model = PeftModel.from_pretrained(base("mlp"), "user/adapter")
    assert torch.equal(output(model), output(wrap()))
    assert hub == [{"repository": "user/adapter", "subfolder": None, "revision": "main"}] * 2


def test_revision_subfolder_and_access_reach_the_hub(hub: list[dict]) -> None:
    arguments = {"revision": "v2", "subfolder": "inner", "token": "t", "cache_dir": "c", "local_files_only": True}
    model = PeftModel.from_pretrained(base("mlp"), "user/adapter", **arguments)
    assert torch.equal(output(model), output(wrap(seed=1)))
    assert hub == [{"repository": "user/adapter", **arguments}] * 2
    hub.clear()
    model.load_adapter("user/adapter", "second", **arguments)
    assert hub == [{"repository": "user/adapter", **arguments}] * 2
    hub.clear()
    assert halotune.PeftConfig.from_pretrained("user/adapter", **arguments) == model.peft_config["second"]
    assert hub == [{"repository": "user/adapter", **arguments}]


def test_hub_that_cannot_be_reached(tmp_path) -> None:
    pytest.importorskip("huggingface_hub")
    with pytest.raises(AdapterFileError, match=r"(?s)user/adapter/adapter_config\.json: .*hub.*the network; or give a local"):
        PeftModel.from_pretrained(base("mlp"), "user/adapter", cache_dir=tmp_path, local_files_only=True)


# -- embeddings


@torch.no_grad()
def test_targeted_embeddings_are_stored(tmp_path) -> None:
    head = "base_model.model.lm_head"
    wrap("llama", HRAConfig(r=2, target_modules=["q_proj", "lm_head"])).save_pretrained(tmp_path / "auto")
    stored = load_file(tmp_path / "auto" / WEIGHTS)
    assert {k for k in stored if "q_proj" not in k} == {f"{head}.hra_u", f"{head}.base_layer.weight"}
    model = wrap("llama", HRAConfig(r=2, target_modules=["q_proj"]))
    for asked, keys in (
        ("auto", set()),
        (False, set()),
        (True, {f"{head}.weight", "base_model.model.model.embed_tokens.weight"}),
    ):
        model.save_pretrained(tmp_path / str(asked), save_embedding_layers=asked)
        assert {k for k in load_file(tmp_path / str(asked) / WEIGHTS) if "q_proj" not in k} == keys


def resized(kind: str, rows: int, seed: int, folder: Path) -> torch.nn.Module:
    """The model as loaded from a folder of its own, with another number of words."""
    from transformers import AutoModelForCausalLM

    base(kind).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(seed)
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model


@pytest.mark.parametrize("kind", ["llama", "tied"])
@torch.no_grad()
def test_resized_vocabulary_is_stored_and_replaces_the_bases(kind: str, tmp_path) -> None:
    config = HRAConfig(r=2, target_modules=["q_proj"])
    model = randomize(halotune.get_peft_model(resized(kind, 70, 0, tmp_path / "base"), config))
    model.save_pretrained(tmp_path / "adapter")
    assert load_file(tmp_path / "adapter" / WEIGHTS)["base_model.model.model.embed_tokens.weight"].shape[0] == 70
    other = resized(kind, 70, 1, tmp_path / "base")
    with pytest.warns(UserWarning, match="holds embeddings that differ from the base model's, which they replace"):
        again = PeftModel.from_pretrained(other, tmp_path / "adapter")
    assert torch.equal(output(again), output(model))
    tied = kind == "tied"
    assert (other.lm_head.weight is other.model.embed_tokens.weight) == tied
    with pytest.raises(AdapterFileError, match=r"embed_tokens.weight|lm_head.weight.*expected \(\d+, \d+\), found \(70"):
        PeftModel.from_pretrained(base(kind), tmp_path / "adapter")


# -- models from the adapter's folder alone


@pytest.fixture
def saved(tmp_path):
    """Saves a base model, then an adapter on it; gives the adapter's folder and its output."""

    def save(kind: str, config, rows: int | None = None) -> tuple[Path, torch.Tensor]:
        model = base(kind)
        model.save_pretrained(tmp_path / "base")
        model = type(model).from_pretrained(tmp_path / "base").eval()
        if rows is not None:
            model.resize_token_embeddings(rows, mean_resizing=False)
        torch.manual_seed(0)
        wrapped = randomize(halotune.get_peft_model(model, config))
        wrapped.save_pretrained(tmp_path / "adapter")
        with torch.no_grad():
            return tmp_path / "adapter", output(wrapped)

    return save


AUTO = {
    "CAUSAL_LM": ("llama", "q_proj", "AutoPeftModelForCausalLM"),
    "SEQ_2_SEQ_LM": ("t5", "q", "AutoPeftModelForSeq2SeqLM"),
    "SEQ_CLS": ("bert_classifier", "query", "AutoPeftModelForSequenceClassification"),
    "TOKEN_CLS": ("bert_tagger", "query", "AutoPeftModelForTokenClassification"),
    "QUESTION_ANS": ("bert_reader", "query", "AutoPeftModelForQuestionAnswering"),
    "FEATURE_EXTRACTION": ("bert", "query", "AutoPeftModelForFeatureExtraction"),
}


@pytest.mark.parametrize("task", AUTO)
@torch.no_grad()
def test_auto_model(task: str, saved) -> None:
    kind, target, name = AUTO[task]
    folder, y = saved(kind, HRAConfig(r=2, target_modules=[target], task_type=task))
    for cls in (getattr(halotune, name), halotune.AutoPeftModel):
        model = cls.from_pretrained(folder)
        assert isinstance(model, getattr(halotune, name.removeprefix("Auto")))
        assert type(model.get_base_model()) is type(base(kind))
        assert error(output(model.eval()), y) < 1e-6
        assert not any(p.requires_grad for p in model.parameters())
    model = cls.from_pretrained(folder, "other", is_trainable=True, dtype=torch.bfloat16)
    assert model.active_adapters == ["other"] and model.get_nb_trainable_parameters()[0] > 0
    assert model.get_base_model().dtype == torch.bfloat16


@torch.no_grad()
def test_auto_model_by_the_class_that_the_file_names(saved) -> None:
    folder, y = saved("bert_reader", HRAConfig(r=2, target_modules=["query"]))
    mapping = json.loads((folder / CONFIG).read_text())["auto_mapping"]
    assert mapping["base_model_class"] == "BertForQuestionAnswering"
    model = halotune.AutoPeftModel.from_pretrained(folder)
    assert type(model.get_base_model()).__name__ == "BertForQuestionAnswering"
    assert error(output(model.eval()), y) < 1e-6


@pytest.mark.parametrize("kind, target", [("llama", "q_proj"), ("tied", "q_proj"), ("gpt2", "c_attn"), ("opt", "q_proj")])
@torch.no_grad()
def test_auto_model_with_a_resized_vocabulary(kind: str, target: str, saved) -> None:
    folder, y = saved(kind, HRAConfig(r=2, target_modules=[target], task_type="CAUSAL_LM"), rows=70)
    with pytest.warns(UserWarning, match="holds embeddings that differ"):
        model = halotune.AutoPeftModelForCausalLM.from_pretrained(folder)
    assert model.get_base_model().config.vocab_size == 70
    assert error(output(model.eval()), y) < 1e-6
    inner = model.get_base_model()
    same = inner.get_input_embeddings().weight is inner.get_output_embeddings().weight
    assert same == inner.config.tie_word_embeddings


@pytest.mark.parametrize("kind, target", [("bert_classifier", "query"), ("llama_classifier", "q_proj")])
@torch.no_grad()
def test_auto_classifier_with_a_resized_vocabulary(kind: str, target: str, saved) -> None:
    folder, y = saved(kind, HRAConfig(r=2, target_modules=[target], task_type="SEQ_CLS"), rows=70)
    with pytest.warns(UserWarning, match="holds embeddings that differ"):
        model = halotune.AutoPeftModelForSequenceClassification.from_pretrained(folder)
    assert error(output(model.eval()), y) < 1e-6


@torch.no_grad()
def test_auto_model_with_a_resized_vocabulary_fully_fine_tuned(saved) -> None:
    config = HRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM")
    folder, y = saved("llama", config, rows=70)
    assert error(output(halotune.AutoPeftModel.from_pretrained(folder).eval()), y) < 1e-6


def test_auto_model_without_a_base_to_be_found(tmp_path) -> None:
    wrap().save_pretrained(tmp_path)
    with pytest.raises(HalotuneError, match=r"names no base model.*PeftModel\.from_pretrained"):
        halotune.AutoPeftModel.from_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": "user/base"}))
    with pytest.raises(
        HalotuneError, match=r"neither a task_type nor a base class of transformers.*PeftModel\.from_pretrained"
    ):
        halotune.AutoPeftModel.from_pretrained(tmp_path)
    with pytest.raises(HalotuneError, match=r"AutoPeftModel is not made itself: use AutoPeftModel\.from_pretrained"):
        halotune.AutoPeftModel()


def test_code_that_a_file_names_is_not_run(tmp_path) -> None:
    wrap().save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    config["auto_mapping"] = {"base_model_class": "system", "parent_library": "os"}
    (tmp_path / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": "user/base"}))
    with pytest.raises(HalotuneError, match="neither a task_type nor a base class of transformers"):
        halotune.AutoPeftModel.from_pretrained(tmp_path)


def test_base_class_without_a_task_is_written_down(tmp_path) -> None:
    halotune.get_peft_model(ConvNet(), HRAConfig(r=2, target_modules=["fc"])).save_pretrained(tmp_path)
    mapping = json.loads((tmp_path / CONFIG).read_text())["auto_mapping"]
    assert mapping == {"base_model_class": "ConvNet", "parent_library": ConvNet.__module__}


# -- the mode of what was loaded


@pytest.mark.parametrize("training", [True, False])
def test_an_adapter_loaded_for_inference_is_in_eval_mode(training: bool, tmp_path) -> None:
    wrap(config=LoraConfig(r=2, lora_dropout=0.5, target_modules=["0"])).save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(base("mlp").train(training), tmp_path)
    assert not any(m.training for m in frozen.modules())
    trained = PeftModel.from_pretrained(base("mlp").train(training), tmp_path, is_trainable=True)
    assert {m.training for m in trained.modules()} == {training}
    trained.load_adapter(tmp_path, "second", is_trainable=True)
    assert trained.training == training
    trained.load_adapter(tmp_path, "third")
    assert not any(m.training for m in trained.modules())
