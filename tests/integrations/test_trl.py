"""TRL's trainers, on models wrapped by `halotune.get_peft_model`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import halotune
from halotune import HRAConfig, LoHaConfig, MissConfig, PeftModel

from .models import WORDS, adapted, language_model, losses, same, tensors, tokenizer

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")
pytest.importorskip("peft")

from halotune.integrations.transformers import AdapterTrainerMixin  # noqa: E402

# TRL turns checkpointing on, under its old names.
pytestmark = pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing:FutureWarning")

QV = ["q_proj", "v_proj"]
CONFIGS = {
    "HRA": HRAConfig(r=4, target_modules=QV, task_type="CAUSAL_LM"),
    "LoHa": LoHaConfig(r=4, target_modules=QV, task_type="CAUSAL_LM"),
    "MiSS": MissConfig(r=4, target_modules=QV, task_type="CAUSAL_LM"),
}
USUAL: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "max_steps": 3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def sentences(n: int, words: int = 5) -> list[str]:
    rng = torch.Generator().manual_seed(0)
    return [" ".join(f"w{i}" for i in torch.randint(3, WORDS, (words,), generator=rng).tolist()) for _ in range(n)]


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> PeftModel:
    return adapted(CONFIGS[request.param])


def only_adapters_changed(model: PeftModel, start: dict[str, torch.Tensor]) -> bool:
    base = dict(language_model().named_parameters())
    now = {n.replace(".base_layer.", "."): p for n, p in model.get_base_model().named_parameters() if ".adapters." not in n}
    return all(torch.equal(now[n], p) for n, p in base.items()) and not same(tensors(model), start)


def test_sft(model: PeftModel, tmp_path: Path) -> None:
    start = tensors(model)
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(str(tmp_path), **{**USUAL, "max_steps": 6}),
        train_dataset=datasets.Dataset.from_dict({"text": sentences(4)}),
        processing_class=tokenizer(tmp_path),
    )
    assert trainer.model is model
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] and only_adapters_changed(model, start)
    trainer.save_model()
    assert not list(tmp_path.glob("**/model.safetensors"))
    assert same(tensors(PeftModel.from_pretrained(language_model(), tmp_path, is_trainable=True)), tensors(model))


def test_sft_with_the_penalty(tmp_path: Path) -> None:
    class AdapterSFTTrainer(AdapterTrainerMixin, trl.SFTTrainer):
        pass

    config = HRAConfig(r=4, target_modules=QV, task_type="CAUSAL_LM", orthogonality_weight=0.1)
    trainer = AdapterSFTTrainer(
        adapted(config),
        trl.SFTConfig(str(tmp_path), **USUAL),
        train_dataset=datasets.Dataset.from_dict({"text": sentences(12)}),
        processing_class=tokenizer(tmp_path),
    )
    first = trainer.model.penalty().item()
    trainer.train()
    found = losses(trainer, "penalty")
    assert found[0] == pytest.approx(first, rel=1e-5) and found == sorted(found, reverse=True) and len(found) == 3


def preferences(n: int = 4) -> Any:
    rows = sentences(3 * n, words=4)
    return datasets.Dataset.from_dict({"prompt": rows[:n], "chosen": rows[n : 2 * n], "rejected": rows[2 * n :]})


@pytest.mark.parametrize("reference", ["the adapter's start", "the base"])
def test_dpo(model: PeftModel, reference: str, tmp_path: Path) -> None:
    """TRL keeps a frozen copy of the adapter as it starts, here the identity; without it the reference is the base."""
    start = tensors(model)
    trainer = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(str(tmp_path), **{**USUAL, "max_steps": 5}),
        train_dataset=preferences(),
        processing_class=tokenizer(tmp_path),
    )
    assert trainer.ref_model is None and set(model.peft_config) == {"default", "ref"}
    if reference == "the base":
        model.delete_adapter("ref")
    called: list[PeftModel] = []
    disable = model.disable_adapter
    model.disable_adapter = lambda: called.append(model) or disable()  # type: ignore[method-assign]
    trainer.train()
    assert bool(called) is (reference == "the base")
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-3)  # log 2: policy and reference begin as one
    assert losses(trainer)[-1] < losses(trainer)[0]
    if reference != "the base":
        reference_now = {n: p for n, p in model.named_parameters() if ".ref." in n}
        assert all(torch.equal(p, start[n.replace(".ref.", ".default.")]) for n, p in reference_now.items())
        model.delete_adapter("ref")
    assert only_adapters_changed(model, start)


def test_dpo_references_agree(tmp_path: Path) -> None:
    """At the identity, the copy of the start and the base are the same reference, so that training is the same."""
    found = []
    for base in (False, True):
        args = trl.DPOConfig(str(tmp_path), **USUAL)
        trainer = trl.DPOTrainer(adapted(), args=args, train_dataset=preferences(), processing_class=tokenizer(tmp_path))
        if base:
            trainer.model.delete_adapter("ref")
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], abs=1e-5)


@pytest.mark.parametrize("reference", ["the adapter's start", "the base"])
def test_grpo(model: PeftModel, reference: str, tmp_path: Path) -> None:
    start = tensors(model)
    sizes = {"num_generations": 4, "max_completion_length": 6, "beta": 0.1, "generation_batch_size": 4}
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(len(set(text.split()))) + 0.1 * len(text) for text in completions],
        args=trl.GRPOConfig(str(tmp_path), **{**USUAL, "max_steps": 2}, **sizes),
        train_dataset=datasets.Dataset.from_dict({"prompt": sentences(8)}),
        processing_class=tokenizer(tmp_path),
    )
    assert trainer.ref_model is None and set(model.peft_config) == {"default", "ref"}
    if reference == "the base":
        model.delete_adapter("ref")
    trainer.train()
    assert losses(trainer, "kl")[0] == pytest.approx(0.0, abs=1e-5) and losses(trainer, "kl")[-1] > 0
    if reference != "the base":
        model.delete_adapter("ref")
    assert only_adapters_changed(model, start)


def test_our_configurations_are_not_trls(tmp_path: Path) -> None:
    """`peft_config=` would have TRL wrap the model with peft's own layers; it says so."""
    with pytest.raises(TypeError, match="PeftConfig"):
        trl.SFTTrainer(
            language_model(),
            trl.SFTConfig(str(tmp_path), **USUAL),
            train_dataset=datasets.Dataset.from_dict({"text": sentences(4)}),
            processing_class=tokenizer(tmp_path),
            peft_config=halotune.HRAConfig(r=4),  # type: ignore[arg-type]
        )
