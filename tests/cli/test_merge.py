"""`halotune merge` writes a model that transformers and diffusers load alone, or nothing at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from halotune import HRAConfig, LoraConfig, PeftModel, get_peft_model
from halotune.cli import merge
from halotune.cli.main import main
from tests.cli.conftest import save_tokenizer
from tests.laws.cases import train

IDS = torch.arange(14).reshape(2, 7) + 3


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("name", ["hra", "bat"])
def test_the_merged_model_is_the_adapted_one(
    name: str, adapters: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = tmp_path / "new" / "merged"
    assert main(["merge", str(adapters / name), "--output", str(output)]) == 0
    out = capsys.readouterr().out
    assert "model.layers.0.self_attn.q_proj" in out and "total" in out and out.endswith(f"Wrote {output}\n")
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapters / name))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(output)), expected, atol=1e-3, rtol=1e-4)
    assert (
        AutoTokenizer.from_pretrained(output)("héllo")["input_ids"] == AutoTokenizer.from_pretrained(base)("héllo")["input_ids"]
    )
    assert [p.name for p in output.parent.iterdir()] == ["merged"]


def test_dtype(adapters: Path, base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    arguments = ["--base", str(base), "--dtype", "bfloat16", "--output", str(tmp_path / "half"), "--max-shard-size", "10KB"]
    assert main(["merge", str(adapters / "lora"), *arguments]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    assert len(list((tmp_path / "half").glob("*.safetensors"))) > 1


def test_the_tokenizer_and_the_vocabulary_of_the_adapter_come_first(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<|new|>"])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    get_peft_model(model, HRAConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match="holds embeddings that differ from the base model's"):
        assert main(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "out")]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("<|new|>") == len(tokenizer) - 1
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").get_input_embeddings().weight.shape[0] == len(tokenizer)


def test_a_classifier_with_labels_of_its_own(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    config = LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=5, pad_token_id=0)
    wrapped = get_peft_model(model, config)
    train(torch.nn.ModuleList(m for n, m in wrapped.named_modules() if n.endswith(("adapters", "modules_to_save"))))
    expected = logits(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    assert main(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "out")]) == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", pad_token_id=0)
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)


def test_without_a_task_the_base_says_its_class(adapters: Path, base: Path, tmp_path: Path) -> None:
    for file in (adapters / "hra").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    entries = json.loads((tmp_path / "adapter_config.json").read_text())
    entries["task_type"] = entries["auto_mapping"] = None
    (tmp_path / "adapter_config.json").write_text(json.dumps(entries))
    assert main(["merge", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_a_pipeline(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    from tests.examples.models import save_stable_diffusion

    folder = save_stable_diffusion(tmp_path)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    sample, text = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 32)
    model = get_peft_model(unet, HRAConfig(r=2, target_modules=["to_q", "conv_in"]))
    train(model.get_base_model().conv_in.adapters)
    model.save_pretrained(tmp_path / "adapter")
    assert main(["merge", str(tmp_path / "adapter"), "--base", str(folder), "--output", str(tmp_path / "out")]) == 0
    merged = StableDiffusionPipeline.from_pretrained(tmp_path / "out", safety_checker=None, requires_safety_checker=False)
    with torch.no_grad():
        expected, found = (m(sample, 3, text).sample for m in (model.eval(), merged.unet.eval()))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert main(["inspect", str(tmp_path / "adapter"), "--base", str(folder / "unet")]) == 0


# -- what is there stays


def folder_with(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name.replace("_json", ".json")).write_text(text)
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["merge", *map(str, arguments)]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_nothing_is_overwritten_unasked(adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, notes, file = (
        folder_with(tmp_path / "model", config_json="{}"),
        folder_with(tmp_path / "notes", a="a"),
        tmp_path / "file",
    )
    file.touch()
    hra = adapters / "hra"
    assert "exists. Choose another, or replace it with --force" in refused(capsys, hra, "--output", model)
    assert "holds no model, so --force does not replace it" in refused(capsys, hra, "--output", notes, "--force")
    assert "is a file" in refused(capsys, hra, "--output", file, "--force")
    assert (model / "config.json").read_text() == "{}" and (notes / "a").read_text() == "a"
    assert main(["merge", str(hra), "--output", str(model), "--force"]) == 0
    assert (model / "config.json").read_text() != "{}" and (model / "model.safetensors").is_file()
    empty = folder_with(tmp_path / "empty")
    assert main(["merge", str(hra), "--output", str(empty)]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"model", "notes", "file", "empty"}


def test_what_is_read_is_not_replaced(adapters: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in base.iterdir()}
    assert f"{base} is read from there" in refused(capsys, adapters / "hra", "--output", base, "--force")
    assert {p: p.stat().st_mtime_ns for p in base.iterdir()} == before


def test_a_failure_leaves_the_old_model(
    adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def half(base: object, saved: object, folder: Path, size: str) -> None:
        (folder / "config.json").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge, "save", half)
    model = folder_with(tmp_path / "model", config_json="{}")
    for output, force in ((model, ["--force"]), (tmp_path / "other", [])):
        assert main(["merge", str(adapters / "hra"), "--output", str(output), *force]) == 1
        assert "No space left on device" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["model"] and (model / "config.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dtype", "float13"], "invalid choice: 'float13'"),
        (["--device", "warp"], "--device warp: cannot be used"),
        (["--max-shard-size", "big"], "expected a size such as 500MB"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_bad_flags(arguments: list[str], said: str, adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, adapters / "hra", "--output", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_a_poisoned_adapter_is_refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=1, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    for p in model.parameters():
        p.data.fill_(1e30) if p.requires_grad else None
    model.save_pretrained(tmp_path / "adapter")
    error = refused(capsys, tmp_path / "adapter", "--output", tmp_path / "out")
    assert "not finite" in error and not (tmp_path / "out").exists()


def test_no_tokenizer_is_no_error(adapters: Path, base: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((base / name).read_bytes())
    assert main(["merge", str(adapters / "bone"), "--base", str(bare), "--output", str(tmp_path / "out")]) == 0
    assert not list((tmp_path / "out").glob("tokenizer*"))
    save_tokenizer(bare)
    assert main(["merge", str(adapters / "bone"), "--base", str(bare), "--output", str(tmp_path / "out"), "--force"]) == 0
    assert list((tmp_path / "out").glob("tokenizer*"))
