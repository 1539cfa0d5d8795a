"""transformers' Trainer and accelerate. `test_without_peft.py` runs all of this a second time with peft blocked."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from halotune import BoneConfig, HRAConfig, LoHaConfig, PeftModel

from .models import adapted, arguments, encoder, language_model, losses, same, tensors, texts, tokenizer

pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

from transformers.utils import is_peft_available  # noqa: E402

from halotune.integrations.transformers import AdapterTrainer  # noqa: E402

QV = ["q_proj", "v_proj"]
SAVED = {"adapter_model.safetensors", "adapter_config.json", "README.md"}
TRAINERS = {"AdapterTrainer": AdapterTrainer, **({"Trainer": transformers.Trainer} if is_peft_available() else {})}


@pytest.fixture(params=TRAINERS)
def Trainer(request: pytest.FixtureRequest) -> Any:
    """The stock Trainer, where it can know our models; and ours, always."""
    return TRAINERS[request.param]


def collator() -> Any:
    """Pads; a Trainer then needs no tokenizer."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": 2, "labels": -100, "attention_mask": 0}
        return {k: torch.tensor([row[k] + [v] * (longest - len(row[k])) for row in rows]) for k, v in fill.items()}

    return collate


# -- types


def test_the_model_is_what_the_trainer_tests_for():
    model = adapted()
    assert type(model).__name__ == "PeftModelForCausalLM"
    if is_peft_available():
        import peft
        from peft.tuners.tuners_utils import BaseTunerLayer

        assert isinstance(model, peft.PeftModel)
        assert sum(isinstance(m, BaseTunerLayer) for m in model.modules()) == 4


def test_layers_answer_under_pefts_names():
    layer = adapted().get_base_model().model.layers[0].self_attn.q_proj
    assert [set(getattr(layer, name)) for name in (*layer.adapter_layer_names, *layer.other_param_names)] == [{"default"}]
    assert layer.active_adapter == layer.active_adapters == ["default"] and not layer.merged
    assert layer.get_base_layer() is layer.base_layer and layer.bias is None and layer.weight is layer.base_layer.weight
    x = torch.randn(3, 32)
    layer.adapters["default"].hra_u.data.normal_()
    without, full = layer.base_layer(x), layer(x)
    layer.enable_adapters(False)
    assert layer.disable_adapters and torch.equal(layer(x), without)
    layer.enable_adapters(True)
    layer.set_scale("default", 0.0)
    assert torch.allclose(layer(x), without, atol=1e-6) and not torch.allclose(full, without, atol=1e-2)
    layer.set_adapter("default", inference_mode=True)
    assert not layer.adapters["default"].hra_u.requires_grad
    layer.set_adapter([])
    assert torch.equal(layer(x), without)
    layer.delete_adapter("default")
    assert len(layer.adapters) == 0 and layer.active_adapters == []


# -- training and its files


CONFIGS = {
    "HRA": HRAConfig(r=4, target_modules=QV, task_type="CAUSAL_LM"),
    "LoHa": LoHaConfig(r=4, target_modules=QV, task_type="CAUSAL_LM"),
    "Bone": BoneConfig(r=4, target_modules=QV, task_type="CAUSAL_LM"),
    "BAT": BoneConfig(r=4, target_modules=QV, init_weights="bat", task_type="CAUSAL_LM"),
    "no task": HRAConfig(r=4, target_modules=QV),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_train_save_and_load(Trainer, config, tmp_path):
    trainer = Trainer(
        adapted(config), arguments(tmp_path, max_steps=6, save_strategy="steps", save_steps=3), train_dataset=texts()
    )
    before = tensors(trainer.model)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    after = tensors(trainer.model)
    assert before.keys() == after.keys() and not any(torch.equal(before[n], after[n]) for n in before)
    trainer.save_model()
    assert {p.name for p in tmp_path.iterdir() if p.is_file()} == SAVED | {"training_args.bin"}
    checkpoint = {p.name for p in (tmp_path / "checkpoint-6").iterdir()}
    assert checkpoint >= SAVED | {"optimizer.pt"} and "model.safetensors" not in checkpoint
    again = PeftModel.from_pretrained(language_model(), tmp_path, is_trainable=True)
    assert type(again) is type(trainer.model) and same(tensors(again), after)


def test_resuming_changes_nothing(Trainer, tmp_path):
    kwargs: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "warmup_steps": 2}
    through = Trainer(adapted(), arguments(tmp_path, **kwargs), train_dataset=texts())
    through.train()
    resumed = Trainer(adapted(), arguments(tmp_path / "again", **kwargs), train_dataset=texts())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(resumed) == losses(through) and len(losses(through)) == 6
    assert same(tensors(resumed.model), tensors(through.model))


def test_resuming_with_two_adapters(Trainer, tmp_path):
    def model() -> PeftModel:
        out = adapted()
        out.add_adapter("other", HRAConfig(r=2, target_modules=["o_proj"]))
        return out

    kwargs: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    through = Trainer(model(), arguments(tmp_path, **kwargs), train_dataset=texts())
    through.train()
    assert (tmp_path / "checkpoint-2" / "other" / "adapter_model.safetensors").is_file()
    resumed = Trainer(model(), arguments(tmp_path / "again", **kwargs), train_dataset=texts())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == losses(through) and resumed.model.active_adapters == ["default"]


def test_the_best_model_is_loaded_at_the_end(Trainer, tmp_path):
    args = arguments(
        tmp_path,
        max_steps=4,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that an early checkpoint is the best, as training lowers the loss
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
    )
    trainer = Trainer(adapted(), args, train_dataset=texts(), eval_dataset=texts())
    trainer.train()
    best, last = Path(trainer.state.best_model_checkpoint), tmp_path / "checkpoint-4"
    assert best != last
    stored = load_file(best / "adapter_model.safetensors")
    now = {n.replace(".adapters.default.", "."): t for n, t in tensors(trainer.model).items()}
    assert same(now, stored) and not same(now, load_file(last / "adapter_model.safetensors"))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(losses(trainer, "eval_loss")), abs=1e-6)


# -- what the Trainer reads off a model


@pytest.mark.parametrize("base_name", ["language_model", "encoder"])
def test_label_smoothing_as_for_the_base(Trainer, base_name, tmp_path):
    """The start is the identity: the base in the stock Trainer is the measure."""
    make, targets = {"language_model": (language_model, QV), "encoder": (lambda: encoder("BertForMaskedLM"), ["query"])}[
        base_name
    ]
    found = []
    for kind, model in (
        (transformers.Trainer, make()),
        (Trainer, adapted(HRAConfig(r=4, target_modules=targets), make())),
    ):
        args = arguments(tmp_path, label_smoothing_factor=0.3)
        found.append(kind(model, args, eval_dataset=texts(length=None), data_collator=collator()).evaluate()["eval_loss"])
    assert found[0] == pytest.approx(found[1], abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("BertForSequenceClassification", "SEQ_CLS"),
        ("BertForQuestionAnswering", "QUESTION_ANS"),
        ("BertForQuestionAnswering", None),
    ],
)
def test_labels_and_columns_are_the_bases(Trainer, kind, task, tmp_path):
    plain = transformers.Trainer(encoder(kind), arguments(tmp_path))
    ours = Trainer(adapted(HRAConfig(r=4, target_modules=["query"], task_type=task), encoder(kind)), arguments(tmp_path))
    assert ours.label_names == plain.label_names and ours.can_return_loss == plain.can_return_loss
    for trainer in (plain, ours):
        trainer._set_signature_columns_if_needed()
    assert set(ours._signature_columns) == set(plain._signature_columns)


def test_grouping_by_length(Trainer, tmp_path):
    args = arguments(tmp_path, train_sampling_strategy="group_by_length")
    trainer = Trainer(adapted(), args, train_dataset=texts(length=None), data_collator=collator())
    assert type(trainer._get_train_sampler()).__name__ == "LengthGroupedSampler"
    trainer.train()
    assert len(losses(trainer)) == 4


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")  # transformers 5's name is another
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(Trainer, reentrant, tmp_path):
    found = []
    for on in (False, True):
        more = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}} if on else {}
        trainer = Trainer(adapted(), arguments(tmp_path, **more), train_dataset=texts())
        trainer.train()
        assert any(getattr(m, "gradient_checkpointing", False) for m in trainer.model.modules()) is on
        found.append(tensors(trainer.model))
    assert all(torch.allclose(found[0][n], found[1][n], atol=1e-6) for n in found[0])


def test_a_base_that_says_it_is_quantized_is_not_refused(Trainer, tmp_path):
    def quantized() -> nn.Module:
        model = language_model()
        model.is_quantized, model.hf_quantizer = True, SimpleNamespace(is_trainable=True)
        return model

    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(quantized(), arguments(tmp_path))
    Trainer(adapted(base=quantized()), arguments(tmp_path), train_dataset=texts()).train()


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_bases_train(Trainer, bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    language_model().save_pretrained(tmp_path / "base")
    packed = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=packed, device_map="cpu")
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(base, arguments(tmp_path))
    trainer = Trainer(adapted(base=base), arguments(tmp_path, max_steps=8), train_dataset=texts(4))
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_cards_of_the_trainer_name_the_adapter(Trainer, tmp_path):
    trainer = Trainer(adapted(), arguments(tmp_path), train_dataset=texts())
    trainer.save_model()
    trainer.create_model_card(model_name="mine", tags=["poems"])
    card = (tmp_path / "README.md").read_text()
    assert "library_name: peft" in card and "- hra\n" in card and "- poems\n" in card and "mine" in card


# -- pipelines, accelerate, the hub


def test_pipelines(tmp_path, caplog):
    words = tokenizer(tmp_path)
    model = adapted()
    for p in tensors(model):
        model.get_parameter(p).data.normal_()
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=words)
    text = pipe("w5 w6 w7", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    ids = model.generate(
        **words("w5 w6 w7", return_tensors="pt", return_token_type_ids=False), max_new_tokens=4, do_sample=False
    )
    assert text.replace(" ", "") == words.decode(ids[0], skip_special_tokens=True).replace(" ", "")
    config = HRAConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")
    classify = transformers.pipeline("text-classification", model=adapted(config, encoder()), tokenizer=words)
    assert classify("w5 w6")[0]["label"] in ("LABEL_0", "LABEL_1")
    assert "not supported" not in caplog.text


def test_accelerate(tmp_path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loader = torch.utils.data.DataLoader(texts(4).remove_columns("author").with_format("torch"), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    found = []
    for _ in range(8):
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
    assert found[-1] < found[0]
    unwrapped = accelerator.unwrap_model(model)
    unwrapped.save_pretrained(
        tmp_path, state_dict=accelerator.get_state_dict(model), is_main_process=accelerator.is_main_process
    )
    again = PeftModel.from_pretrained(language_model(), tmp_path, is_trainable=True)
    assert same(tensors(again), tensors(unwrapped))


class FakeHub:
    """Stands for `huggingface_hub.HfApi`: keeps the calls, and the files of the commit."""

    calls: list[tuple[str, Any]]
    files: set[str]

    def __init__(self, token: Any = None) -> None:
        FakeHub.calls = [("token", token)]

    def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
        self.calls.append(("create_repo", (repo_id, kwargs)))
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def create_branch(self, repo_id: str, **kwargs: Any) -> None:
        self.calls.append(("create_branch", (repo_id, kwargs)))

    def file_exists(self, repo_id: str, name: str, revision: str | None) -> bool:
        return repo_id == "me/with-card" and name == "README.md"

    def upload_folder(self, folder_path: Path, ignore_patterns: list[str] | None, **kwargs: Any) -> str:
        FakeHub.files = {p.name for p in folder_path.iterdir()} - set(ignore_patterns or [])
        self.calls.append(("upload_folder", kwargs))
        return "the commit"


def test_push_to_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    model = adapted()
    commit = model.push_to_hub("poems", private=True, token="t", revision="draft", commit_message="First")
    assert commit == "the commit" and FakeHub.files == SAVED
    assert FakeHub.calls[:3] == [
        ("token", "t"),
        ("create_repo", ("poems", {"private": True, "exist_ok": True})),
        ("create_branch", ("me/poems", {"branch": "draft", "exist_ok": True})),
    ]
    sent = FakeHub.calls[3][1]
    assert (sent["repo_id"], sent["revision"], sent["commit_message"], sent["create_pr"]) == (
        "me/poems",
        "draft",
        "First",
        False,
    )
    model.push_to_hub("with-card")
    assert FakeHub.files == SAVED - {"README.md"}
