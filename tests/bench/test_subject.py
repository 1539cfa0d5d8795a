"""`benchmarks/subject.py`: the base's images, equal parameters, and the table with what is missing."""

from __future__ import annotations

import json
import runpy
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "subject.py"))


def test_images_are_captioned_by_their_folders(script: dict[str, Any], tmp_path: Path) -> None:
    for name in ("n02085620/a.jpg", "faces/b.jpg"):
        file = tmp_path / "made" / name
        file.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(file)
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.add(tmp_path / "made", ".")
    script["main"](["images", "--archive", str(tmp_path / "images.tar"), "--output", str(tmp_path / "out")])
    lines = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert {line["file_name"]: line["text"] for line in lines} == {
        "n02085620/a.jpg": "a photo of a dog",
        "faces/b.jpg": "a photo of a face",
    }


def test_all_methods_train_as_many_numbers(script: dict[str, Any]) -> None:
    """peft's HRA too, where it is installed; all steps are timed."""
    from diffusers import UNet2DConditionModel

    pytest.importorskip("peft")
    args = SimpleNamespace(device="cpu", rank=8, cost_steps=1)
    inputs = {"sample": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([5]), "encoder_hidden_states": torch.randn(1, 3, 32)}
    found = {}
    for methods in (script["OURS"], ("peft HRA",)):
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32,),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            cross_attention_dim=32,
            attention_head_dim=4,
        )
        found |= script["measure"](unet, inputs, methods, args)
    assert list(found) == ["LoRA", "HRA", "LoHa", "Bone", "BAT", "peft HRA"]
    assert len({entry["parameters"] for entry in found.values()}) == 1
    assert all(entry["seconds"] > 0 for entry in found.values())


def test_the_table_says_what_is_missing(script: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = {"figures": {"dino": 0.5, "base": {"dino": 0.25}}, "parameters": {"trainable": 1000}, "seconds": 2.0}
    for seed, dino in enumerate((0.5, 0.7)):
        own = entry | {"figures": {"dino": dino, "base": {"dino": 0.25}}}
        (tmp_path / f"dog6-HRA-x10-{seed}.json").write_text(json.dumps(own))
    costs = {
        "LoRA": {"seconds": 2.0, "kernel_seconds": 1.0, "peak_bytes": 2**30},
        "HRA": {"seconds": 3.0, "kernel_seconds": 1.25, "peak_bytes": 2**31},
        "BAT": {"error": "no memory"},
    }
    for method, own in costs.items():
        (tmp_path / f"cost-sd15-{method}.json").write_text(
            json.dumps({"model": "sd15", "method": method, "parameters": 8} | own)
        )
    script["main"](["table", "--results", str(tmp_path)])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [
        "dog6",
        "HRA",
        "10?",
        "2",
        "1,000",
        "2.000",
        "±",
        "0.000",
        "dino",
        "0.600",
        "±",
        "0.141",
        "(base",
        "0.250",
        "±",
        "0.000)",
    ] in rows
    assert ["dog6", "LoRA", "30", "0", "–", "–", "–"] in rows
    assert ["sd15", "HRA", "8", "3.000", "1.50", "1.250", "1.25", "2.000", "2.00"] in rows
    assert ["sd15", "BAT", "8", *"––––––", "no", "memory"] in rows


def test_each_method_goes_on_with_its_better_rate(script: dict[str, Any], tmp_path: Path) -> None:
    def left(method: str, rate: float, value: float) -> None:
        entry = {"figures": {"dino": value, "dino_drift": 0.9, "base": {"dino": 0.25}}}
        (tmp_path / f"dog6-{method}-x{rate:g}-0.json").write_text(json.dumps(entry))

    args = SimpleNamespace(results=tmp_path, subjects=["dog6", "cat"], rates=[10.0, 30.0])
    left("HRA", 10, 0.5)
    assert {job[0] for job in script["missing"](args)} == {"dog6"}  # it may not be the better one
    left("HRA", 30, 0.6)
    left("LoRA", 10, 0.7)
    left("LoRA", 30, 0.6)
    found = list(script["missing"](args))
    assert ("cat", "HRA", 30.0, 0) in found and ("cat", "LoRA", 10.0, 0) in found and ("dog6", "LoRA", 10.0, 2) in found
    assert not [job for job in found if job[0] == "dog6" and job[1] in ("HRA", "LoRA") and job[3] == 0]
