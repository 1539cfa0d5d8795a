"""The example with adapters in a pipeline that stays itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from .models import run_as_script, save_stable_diffusion

diffusers = pytest.importorskip("diffusers")
Image = pytest.importorskip("PIL.Image")


def test_as_a_user_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for i, color in enumerate(["red", "green", "blue"]):
        Image.new("RGB", (20 + i, 24), color).save(images / f"{i}.png")
    pipeline = save_stable_diffusion(tmp_path)
    arguments = ["--images", images, "--prompt", "a dog", "--steps", "30", "--inference-steps", "3"]
    run_as_script(monkeypatch, "pipeline_adapters", *arguments, "--model", pipeline, "--output", out)
    first, last = capsys.readouterr().out.split("the loss went from ")[1].split(" to ")
    assert float(last) < float(first)

    pictures = {s: Image.open(out / f"scale-{s}.png").tobytes() for s in (0.0, 0.5, 1.0)}
    assert len(set(pictures.values())) == 3
    plain = diffusers.StableDiffusionPipeline.from_pretrained(pipeline)
    options = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0)}
    assert plain("a dog", **options).images[0].tobytes() == pictures[0.0]
    assert json.loads((out / "adapter_index.json").read_text())["adapter_name"] == "subject"
    fused = diffusers.StableDiffusionPipeline.from_pretrained(out / "fused")
    assert fused.unet.state_dict().keys() == plain.unet.state_dict().keys()
