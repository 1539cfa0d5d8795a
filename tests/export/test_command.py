"""`halotune export`."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from halotune import AutoPeftModel, LoraConfig
from halotune.cli.main import main
from halotune.core.files import WEIGHTS_NAME

from ..interop.models import FIXTURES, base, error, output

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
BASE = ["--base", str(FIXTURES / "base_llama")]


@pytest.mark.parametrize("name", ["hra_basic", "hra_gs", "loha_linear", "bone_basic"])
@torch.no_grad()
def test_adapters_of_released_packages(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """As LoRA, peft computes what the package that wrote them computed."""
    assert main(["export", str(FIXTURES / name), *BASE, "--to", "lora", "--output", str(tmp_path), "--check", "vllm"]) == 0
    printed = capsys.readouterr().out
    assert "exact" in printed and f"Wrote {tmp_path}" in printed and "vllm: reads it" in printed
    io = load_file(FIXTURES / name / "io.safetensors")
    model = peft.PeftModel.from_pretrained(base("llama"), tmp_path).eval()
    assert error(output(model, io["input_ids"]), io["expected"]) < 1e-5


def test_a_rank_prints_the_error_of_each_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["export", str(FIXTURES / "bone_bat"), *BASE, "--output", str(tmp_path)]
    assert main([*arguments]) == 2
    assert "full rank" in capsys.readouterr().err
    assert main([*arguments, "--rank", "4", "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)["export"]
    assert report["rank"] == 4 and not report["exact"]
    for path, layer in report["layers"].items():
        assert layer["how"] == "randomised SVD" and f"{layer['error']:.2e}" in err and path in err


def test_the_base_and_the_dtype_are_those_of_the_adapter(tmp_path: Path):
    model = AutoPeftModel.from_pretrained(FIXTURES / "hra_basic", config=_config_with_base(), is_trainable=True)
    for layer in model.base_model.modules():
        if hasattr(layer, "hra_u"):
            layer.bfloat16()
    model.save_pretrained(tmp_path / "half")
    assert main(["export", str(tmp_path / "half"), "--output", str(tmp_path / "out"), "--for", "vllm"]) == 0
    assert {t.dtype for t in load_file(tmp_path / "out" / "adapter_model.safetensors").values()} == {torch.bfloat16}
    assert LoraConfig.from_pretrained(tmp_path / "out").base_model_name_or_path == str(FIXTURES / "base_llama")
    assert main(["export", str(tmp_path / "half"), "--output", str(tmp_path / "out"), "--dtype", "fp16"]) == 0
    assert {t.dtype for t in load_file(tmp_path / "out" / "adapter_model.safetensors").values()} == {torch.float16}


def _config_with_base():
    from halotune import PeftConfig

    config = PeftConfig.from_pretrained(FIXTURES / "hra_basic")
    config.base_model_name_or_path = str(FIXTURES / "base_llama")
    return config


def test_checking_alone_converts_nothing(capsys: pytest.CaptureFixture[str]):
    lora, hra = str(FIXTURES / "lora_from_hra_basic"), str(FIXTURES / "hra_basic")
    assert main(["export", lora, "--check", "vllm,sglang", "--check", "llama.cpp"]) == 0
    assert capsys.readouterr().out == "vllm: reads it; serve with --max-lora-rank 8\nsglang: reads it\nllama.cpp: reads it\n"
    assert main(["export", hra, "--check", "vllm"]) == 1
    assert capsys.readouterr().out.startswith("vllm: lora: Only LoRA is read")
    assert main(["export", hra, "--check", "vllm", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["check"]["vllm"]
    assert [f["rule"] for f in found] == ["lora", "names"] and found[0]["found"] == "peft_type='HRA'"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param([], ["--output", "--check"], id="nothing-to-do"),
        pytest.param(["--check", "vlm"], ["unknown target runtime 'vlm'", "llama.cpp"], id="unknown-program"),
        pytest.param(["--output", "o", "--base", "/no/such"], ["/no/such", "no such folder", "--base"], id="base"),
        pytest.param(["--output", "o", "--rank", "0"], ["--rank", "from 1"], id="rank-0"),
        pytest.param(["--output", "o", "--to", "lokr"], ["--to", "lora"], id="format"),
        pytest.param(["--output", "o", "--for", "ollama"], ["--for", "vllm"], id="runtime"),
        pytest.param(["--output", "o", *BASE, "--for", "diffusers"], ["component", "LlamaForCausalLM"], id="component"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(FIXTURES / "hra_basic"), *arguments]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("halotune") and ": error: " in err and all(word in err for word in said), err
    assert not (tmp_path / "o").exists()


def test_a_rank_that_nobody_serves(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = {"peft_type": "LORA", "r": 600, "lora_alpha": 600, "target_modules": ["x"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({"x.lora_A.weight": torch.zeros(600, 2), "x.lora_B.weight": torch.zeros(2, 600)}, tmp_path / WEIGHTS_NAME)
    assert main(["export", str(tmp_path), "--check", "vllm"]) == 1
    assert capsys.readouterr().out.startswith("vllm: rank: max_lora_rank is at most 512")


def test_the_adapter_is_never_overwritten(capsys: pytest.CaptureFixture[str]):
    folder = str(FIXTURES / "hra_basic")
    assert main(["export", folder, *BASE, "--output", f"{folder}/../hra_basic"]) == 2
    assert "adapter's own folder" in capsys.readouterr().err


def test_a_folder_that_is_not_there(capsys: pytest.CaptureFixture[str]):
    assert main(["export", "/no/such/adapter", "--check", "vllm"]) == 2
    assert "no such folder or file" in capsys.readouterr().err
    assert main(["export", "/no/such/adapter", "--output", "out"]) == 2
    assert "no such folder" in capsys.readouterr().err
