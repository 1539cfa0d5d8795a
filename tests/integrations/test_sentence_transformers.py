"""sentence-transformers: train an encoder with adapters, save it, and load it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from halotune import BoneConfig, HRAConfig, LoHaConfig, MissConfig, PeftModel, get_peft_model

from .models import encoder, losses, same, tensors, tokenizer

st = pytest.importorskip("sentence_transformers")
datasets = pytest.importorskip("datasets")
pytest.importorskip("peft")

from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss  # noqa: E402

from halotune.integrations.transformers import AdapterTrainerMixin  # noqa: E402

TEXTS = [f"w{3 + i} w{4 + i} w{30 - i}" for i in range(8)]
CONFIGS = {
    "HRA": HRAConfig(r=4, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION"),
    "LoHa": LoHaConfig(r=4, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION"),
    "MiSS": MissConfig(r=4, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION"),
}


class AdapterSentenceTransformerTrainer(AdapterTrainerMixin, st.SentenceTransformerTrainer):
    pass


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    encoder("BertModel").save_pretrained(folder)
    tokenizer(folder)
    return folder


def sentence_model(base: Path, config: Any) -> Any:
    model = st.SentenceTransformer(str(base), device="cpu")
    model[0].model = get_peft_model(model[0].model, config)
    return model


def trained(
    model: Any, folder: Path, kind: Any = st.SentenceTransformerTrainer, resume: str | None = None, **kwargs: Any
) -> Any:
    args = st.SentenceTransformerTrainingArguments(
        str(folder),
        **{
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-2,
            "max_steps": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            **kwargs,
        },
    )
    pairs = datasets.Dataset.from_dict({"anchor": TEXTS, "positive": TEXTS[::-1]})
    loss = MultipleNegativesRankingLoss(model)
    trainer = kind(model, args, train_dataset=pairs, eval_dataset=pairs, loss=loss)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def embeddings(model: Any) -> Tensor:
    return model.encode(TEXTS, convert_to_tensor=True, show_progress_bar=False)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_train_save_and_load(config, base, tmp_path):
    model = sentence_model(base, config)
    start, untrained = tensors(model), embeddings(model)
    trainer = trained(model, tmp_path / "run", max_steps=8)
    assert losses(trainer)[-1] < losses(trainer)[0] and not same(tensors(model), start)
    assert not torch.allclose(embeddings(model), untrained, atol=1e-3)
    model.save_pretrained(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()
    assert not list((tmp_path / "saved").glob("**/model.safetensors"))

    by_peft = st.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert torch.allclose(embeddings(by_peft), embeddings(model), atol=1e-5)
    by_us = st.SentenceTransformer(str(base), device="cpu")
    by_us[0].model = PeftModel.from_pretrained(by_us[0].model, tmp_path / "saved")
    assert torch.equal(embeddings(by_us), embeddings(model))


def test_resume_best_and_penalty_with_the_mixin(base, tmp_path):
    """The stock trainer would reload a checkpoint into PEFT's layers, which have other names for the same tensors."""
    config = BoneConfig(r=4, target_modules=["query"]), HRAConfig(r=4, target_modules=["query"], orthogonality_weight=0.1)
    for c in config:
        kwargs: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "kind": AdapterSentenceTransformerTrainer}
        through = trained(sentence_model(base, c), tmp_path / "a", **kwargs)
        resumed = trained(sentence_model(base, c), tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-2"), **kwargs)
        assert losses(resumed) == losses(through) and same(tensors(resumed.model), tensors(through.model))
        assert len(losses(through, "penalty")) == (4 if isinstance(c, HRAConfig) else 0)
    best = trained(
        sentence_model(base, config[0]),
        tmp_path / "c",
        **kwargs,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    assert Path(best.state.best_model_checkpoint).name == "checkpoint-2"
    assert best.evaluate()["eval_loss"] == pytest.approx(max(losses(best, "eval_loss")), abs=1e-6)
