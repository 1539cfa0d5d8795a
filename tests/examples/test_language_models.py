"""The examples with language models, on small OPTs and Llamas."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from halotune import HRAConfig, HRAModel, PeftModel, PeftModelForCausalLM, get_peft_model

from .models import example, only_adapters_train, run_as_script, seeded, starts_away, trained

pytest.importorskip("transformers")
IDS = torch.arange(4, 20).reshape(2, 8)


def logits(model: PeftModel | HRAModel) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def base_logits(folder: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    return logits(AutoModelForCausalLM.from_pretrained(folder))


def adapted(model: PeftModel) -> set[str]:
    return {layer.name for layer in model.get_layer_status()}


@pytest.fixture(scope="module")
def saved(opt: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PeftModel]:
    """What the first example saves, and the model it saved."""
    folder = tmp_path_factory.mktemp("adapter")
    with seeded(), starts_away():
        model, _ = example("hra_language_model")["main"](str(opt), save=str(folder), steps=8)
    return folder, model


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_language_model(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    with starts_away():
        model, losses = example("hra_language_model")["main"](str(folder), steps=15)
    assert isinstance(model, PeftModelForCausalLM)
    assert only_adapters_train(model) and len(trained(model)) == 12  # q_proj and v_proj of six layers
    assert model.get_nb_trainable_parameters()[0] == 12 * 32 * 8
    assert losses[-1] < 0.9 * losses[0]
    with model.disable_adapter():
        assert torch.equal(logits(model), base_logits(folder))


def test_trainer(opt: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("A mirror turns the world\n\nTwo mirrors turn the world\n" * 12)
    with starts_away():
        model, trainer = example("hra_trainer")["main"](str(texts), str(opt), str(tmp_path / "out"), lr=1e-2)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.state.global_step == 9 == len(losses)  # 24 texts in batches of 8, three times
    assert losses[-1] < 0.9 * losses[0]
    assert only_adapters_train(model) and len(trained(model)) == 24
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    again, _ = example("hra_load_and_generate")["main"](str(tmp_path / "out"), str(opt))
    assert torch.equal(logits(again), logits(model))


def test_trainer_goes_on_where_it_stopped(llama: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("A mirror turns the world\nTwo mirrors turn the world\n" * 12)
    options = {"model": str(llama), "penalty": 1e-2}
    for epochs in (1, 3):
        model, trainer = example("trainer")["main"](str(texts), output=str(tmp_path / "stopped"), epochs=epochs, **options)
    log = trainer.state.log_history
    assert trainer.state.global_step == 9 == sum("loss" in entry for entry in log) == sum("penalty" in e for e in log)
    assert [entry["loss"] for entry in log if "loss" in entry][-1] < 0.9 * log[0]["loss"]
    assert {p.name for p in (tmp_path / "stopped").glob("*.safetensors")} == {"adapter_model.safetensors"}
    assert only_adapters_train(model) and trainer.state.best_model_checkpoint is not None


def test_a_target_that_opt_lacks_is_named(opt: Path) -> None:
    """PEFT's page trains OPT with Llama's name of the output projection."""
    from transformers import AutoModelForCausalLM

    config = HRAConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], apply_GS=True, init_weights=True)
    with starts_away(), pytest.warns(UserWarning, match="no module matches o_proj.*out_proj"):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(opt), config)
    assert len(trained(model)) == 18


def test_two_adapters(opt: Path) -> None:
    with starts_away():
        model, losses = example("hra_two_adapters")["main"](str(opt), steps=15)
    for name, other in (("task1", "task2"), ("task2", "task1")):
        assert losses[name][name] < losses[other][name]
    assert model.active_adapter == "task2"
    assert trained(model) and all(".adapters.task2." in name for name in trained(model))
    second = logits(model)
    model.set_adapter("task1")
    first = logits(model)
    assert not torch.allclose(first, second, atol=1e-2)
    model.set_adapter("task2")
    assert torch.equal(logits(model), second)
    assert {p.shape[1] for name, p in model.named_parameters() if ".task1." in name} == {8}
    assert {p.shape[1] for name, p in model.named_parameters() if ".task2." in name} == {16}


@pytest.mark.parametrize(
    ("kind", "linear"),
    [
        ("opt", "q_proj k_proj v_proj out_proj fc1 fc2"),
        ("llama", "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
    ],
)
def test_all_linear(kind: str, linear: str, request: pytest.FixtureRequest) -> None:
    with starts_away():
        model = example("hra_all_linear")["main"](str(request.getfixturevalue(kind)))
    head = model.get_base_model().lm_head
    assert type(head) is torch.nn.Linear and not head.weight.requires_grad
    assert {name.rsplit(".", 1)[-1] for name in adapted(model)} == set(linear.split())
    assert len(adapted(model)) == 6 * len(linear.split())
    assert only_adapters_train(model)


@pytest.mark.parametrize(("kind", "layers"), [("opt", "model.decoder.layers"), ("llama", "model.layers")])
def test_some_layers(kind: str, layers: str, request: pytest.FixtureRequest) -> None:
    with starts_away():
        model = example("hra_some_layers")["main"](str(request.getfixturevalue(kind)))
    expected = {f"{layers}.{i}.self_attn.{name}" for i in range(4) for name in ("q_proj", "v_proj")}
    assert adapted(model) == expected
    assert only_adapters_train(model) and len(trained(model)) == 8


def test_load_and_generate(opt: Path, saved: tuple[Path, PeftModel]) -> None:
    from transformers import AutoTokenizer

    folder, model = saved
    again, text = example("hra_load_and_generate")["main"](str(folder), str(opt), prompt="Two mirrors", max_length=20)
    assert torch.equal(logits(again), logits(model))
    assert not torch.allclose(logits(again), base_logits(opt), atol=1e-2)
    assert not trained(again)

    tokenizer = AutoTokenizer.from_pretrained(opt)
    prompt = tokenizer("Two mirrors", return_tensors="pt")
    written = tokenizer.decode(model.generate(**prompt, max_length=20)[0], skip_special_tokens=True)
    assert text == written and text.startswith("Two mirrors ")
    with model.disable_adapter():
        assert tokenizer.decode(model.generate(**prompt, max_length=20)[0], skip_special_tokens=True) != text


def test_low_memory(opt: Path, saved: tuple[Path, PeftModel], capsys: pytest.CaptureFixture[str]) -> None:
    folder, model = saved
    again = example("hra_low_memory")["main"](str(folder), str(opt))
    assert type(again) is HRAModel
    assert "12 parameters have a shape but no memory yet" in capsys.readouterr().out
    assert not any(p.is_meta for p in again.parameters())
    assert torch.equal(logits(again), logits(model))
    assert only_adapters_train(again)


def test_as_a_user_runs_them(
    opt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with starts_away():
        run_as_script(monkeypatch, "hra_language_model", "--model", opt, "--save", tmp_path, "--steps", "2")
    assert "trainable params: 3,072" in capsys.readouterr().out
    run_as_script(monkeypatch, "hra_load_and_generate", "--model", opt, "--adapter", tmp_path, "--prompt", "Two mirrors")
    assert capsys.readouterr().out.startswith("Two mirrors")
