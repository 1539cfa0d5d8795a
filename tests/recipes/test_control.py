"""The recipe for controllable generation at toy size: end to end, resumed, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from halotune import HalotuneError
from halotune.cli.main import main
from halotune.recipes.common.run import FINISHED, read_run

pytest.importorskip("diffusers")
pytest.importorskip("cv2")

from halotune.recipes.control import ControlConfig, ControlledDenoiser, ControlTrainer, train_control
from halotune.recipes.control_model import ENCODER, ControlEncoder, load_control, new_control
from halotune.recipes.control_pictures import ControlPictures, draw_control
from halotune.recipes.diffusion import TARGETS, load_family
from halotune.recipes.pictures import read_picture

from .. import toy_pipelines
from ..examples.models import save_stable_diffusion
from .control_pairs import save_labels, save_pairs
from .pictures import adapter, flags, toy_options


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("control")
    save_stable_diffusion(folder / "sd")
    save_pairs(folder / "flowers")
    save_labels(folder / "halves")
    return folder


def options(root: Path, output: Path, **also: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "control": "canny",
        "data": str(root / "flowers"),
        "batch_size": 2,
        "validation_count": 1,
        "evaluation_count": 2,
        "evaluate_every": 4,
    }
    return toy_options(root, output, **values | also)


def opened(file: str | Path) -> Any:
    return read_picture(Path(file))


def weights(run: Path) -> dict[str, torch.Tensor]:
    encoder = load_file(run / "adapter" / ENCODER / "diffusion_pytorch_model.safetensors")
    return {f"unet {k}": v for k, v in adapter(run).items()} | {f"{ENCODER} {k}": v for k, v in encoder.items()}


@pytest.fixture(scope="module")
def trained(root: Path) -> Path:
    run = root / "run"
    values = {"learning_rate": 0.02, "encoder_learning_rate": 0.05, "ema": 0.5, "max_steps": 12, "evaluate_every": 6}
    assert main(["train", "control", *flags(options(root, run, **values, empty_prompts=0.2, flip=True))]) == 0
    return run


def test_train_and_report(trained: Path) -> None:
    record = read_run(trained)
    assert record is not None
    assert record["status"] == FINISHED
    assert record["pictures"] == {"train": 10, "validation": 4}  # mirrored ones, too
    encoder = sum(v.numel() for k, v in weights(trained).items() if k.startswith(ENCODER))
    adapter = sum(v.numel() for k, v in weights(trained).items() if k.startswith("unet"))
    assert record["parameters"]["trainable"] == adapter + encoder
    gallery = json.loads((trained / "gallery.json").read_text())
    assert gallery["columns"] == ["hint", "target", "base", "step 6", "step 12"]
    assert gallery["shared"] == 3  # so that a report of several runs has them side by side
    assert gallery["rows"][0]["label"] == "a yellow flower · 0"
    assert (trained / "index.html").read_text().count("data:image/png;base64") == 5
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    losses = [line["evaluation"]["loss"] for line in lines if "evaluation" in line]
    assert losses[-1] < losses[0]


def test_the_folder_loads_in_one_call_elsewhere(trained: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And draws what the command draws; at scale 0, of the adapter and the hint, what the base does."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    hint = trained / "pictures" / "hint" / "0.png"
    common = ["--hint", str(hint), "--prompt", "a flower", "--seed", "3", "--device", "cpu", "--output", str(root / "drawn")]
    capsys.readouterr()
    assert main(["generate", "control", str(trained), *common, "--base"]) == 0
    own, base = (opened(file).tobytes() for file in capsys.readouterr().out.split())
    assert main(["generate", "control", str(trained), *common, "--scale", "0", "--conditioning-scale", "0"]) == 0
    assert opened(capsys.readouterr().out.strip()).tobytes() == base
    pipe = StableDiffusionPipeline.from_pretrained(root / "sd" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    also: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 9.0}
    plain = pipe("a flower", height=16, width=16, **also, generator=torch.Generator().manual_seed(3)).images[0].tobytes()
    assert plain == base != own
    controlled = load_control(pipe, trained / "adapter")
    drawn = controlled("a flower", opened(hint), **also, generator=torch.Generator().manual_seed(3)).images[0]
    assert drawn.tobytes() == own
    with pytest.raises(HalotuneError, match="2 prompts, 1 hints of 16 × 16"):
        controlled(["a", "b"], opened(hint))
    controlled.remove()
    with pytest.raises(HalotuneError, match="holds no control_encoder"):
        load_control(pipe, trained)


def test_a_split_is_drawn_in_shares_that_go_on(trained: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between two pictures, the same command draws the others; a picture is the same in whatever share it is."""
    whole = ControlPictures(str(trained), split="val", device="cpu", output=str(root / "whole"), count=2)
    assert len(draw_control(whole)) == 6
    from halotune.recipes import control_pictures

    usual, drawn = control_pictures.draw_controlled, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        if len(drawn) == 1:
            raise KeyboardInterrupt
        drawn.append(args)
        return usual(*args, **kwargs)

    def part(shard: str, **also: Any) -> ControlPictures:
        return ControlPictures(
            str(trained), split="val", device="cpu", **{"output": str(root / "parts"), "count": 2, "shard": shard, **also}
        )

    monkeypatch.setattr(control_pictures, "draw_controlled", failing)
    with pytest.raises(KeyboardInterrupt):
        draw_control(part("0/2"))
    monkeypatch.undo()
    kept = root / "parts" / "results" / "0.png"
    before = kept.stat().st_mtime_ns
    assert len(draw_control(part("0/2"))) == 4
    assert len(draw_control(part("1/2"))) == 2
    assert kept.stat().st_mtime_ns == before
    for kind, count in (("results", 6), ("hints", 3), ("source", 3)):
        names = sorted(f.name for f in (root / "whole" / kind).iterdir())
        assert len(names) == count
        for name in names:
            assert opened(root / "parts" / kind / name).tobytes() == opened(root / "whole" / kind / name).tobytes()
    for file in draw_control(part("0/1", output=str(root / "at once"), batch_size=4)):
        alone = np.array(opened(root / "whole" / "results" / file.name)).astype(int)
        assert np.abs(np.array(opened(file)) - alone).max() <= 1
    assert draw_control(part("7/8")) == []  # an empty share has nothing to do
    with pytest.raises(HalotuneError, match=r"drawn otherwise \(seed: 0 there, 1 here"):
        draw_control(part("0/2", seed=1))


def test_the_figures_of_a_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "control", str(trained), "--device", "cpu", "--limit", "2", "--base"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pictures"] == found["base"]["pictures"] == 2
    assert 0 <= found["iou"] <= found["f1"] <= 1
    assert json.loads((trained / "evaluation.json").read_text()) == found


def test_a_resumed_run_is_the_uninterrupted_one(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"save_every": 2, "ema": 0.9, "empty_prompts": 0.5, "learning_rate": 0.01, "validation_count": 1}
    train_control(ControlConfig(**options(root, tmp_path / "whole", **values)))
    usual, calls = ControlledDenoiser.forward, []

    def failing(self: ControlledDenoiser, examples: Any) -> Any:
        calls.append(self.training)
        if sum(calls) == 4:
            raise KeyboardInterrupt
        return usual(self, examples)

    monkeypatch.setattr(ControlledDenoiser, "forward", failing)
    with pytest.raises(KeyboardInterrupt):
        train_control(ControlConfig(**options(root, tmp_path / "parts", **values)))
    monkeypatch.undo()
    train_control(ControlConfig(**options(root, tmp_path / "parts", **values)))
    there = weights(tmp_path / "parts")
    for name, p in weights(tmp_path / "whole").items():
        torch.testing.assert_close(there[name], p, atol=0, rtol=0)


def test_a_run_does_not_go_on_with_other_pairs(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = shutil.copytree(root / "flowers", tmp_path / "flowers")
    config = ControlConfig(**options(root, tmp_path / "run", data=str(data), save_every=2))

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ControlTrainer, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_control(config)
    table = data / "train" / "metadata.jsonl"
    text = table.read_text()
    table.write_text(text.replace("yellow", "red"))
    with pytest.raises(HalotuneError, match="run: the data have changed since the run began"):
        train_control(config)
    table.write_text(text)
    assert train_control(config)["status"] == FINISHED


@pytest.fixture
def segmenter(tmp_path: Path) -> Path:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessorPil

    torch.manual_seed(0)
    config = SegformerConfig(
        num_encoder_blocks=1, depths=[1], sr_ratios=[1], hidden_sizes=[8], patch_sizes=[3], strides=[2],
        num_attention_heads=[1], mlp_ratios=[1], decoder_hidden_size=8, num_labels=3,
    )  # fmt: skip
    SegformerForSemanticSegmentation(config).save_pretrained(tmp_path / "segmenter")
    SegformerImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "segmenter")
    return tmp_path / "segmenter"


def test_label_maps_from_training_to_figures(
    root: Path, tmp_path: Path, segmenter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"control": "segm", "data": str(root / "halves"), "method": "lora", "max_steps": 2}
    train_control(ControlConfig(**options(root, tmp_path / "run", **values)))
    hint = np.array(opened(tmp_path / "run" / "pictures" / "hint" / "0.png"))
    assert {tuple(c) for c in hint.reshape(-1, 3).tolist()} == {(0, 0, 0), (128, 0, 0)}  # VOC's, void black
    capsys.readouterr()
    given = ["--device", "cpu", "--limit", "2", "--segmentation-model", str(segmenter)]
    assert main(["eval", "control", str(tmp_path / "run"), *given]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["original"]) == {"aAcc", "mAcc", "mIoU"} < set(found)
    assert main(["eval", "control", str(tmp_path / "run"), *given, "--void-label", "1"]) == 2
    assert "has label 255, but" in capsys.readouterr().err


# -- the encoder


@pytest.mark.parametrize("factor", [1, 2, 4, 8, 16])
def test_the_encoder_follows_the_vae(factor: int) -> None:
    encoder = ControlEncoder(20, factor)
    assert len(encoder.convolutions) == 8
    out = encoder(torch.rand(2, 3, 32, 48))
    assert out.shape == (2, 20, 32 // factor, 48 // factor)
    assert not out.any()
    with pytest.raises(HalotuneError, match="must be a power of 2 up to 64; got 12"):
        ControlEncoder(20, 12)


def test_the_released_sizes() -> None:
    """Of Stable Diffusion 1.5: 1.09 M for the encoder; HRA r = 8 has the paper's 0.89 M."""
    from diffusers import UNet2DConditionModel

    import halotune

    assert sum(p.numel() for p in ControlEncoder(320).parameters()) == pytest.approx(1.09e6, rel=0.01)
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
        model = halotune.get_peft_model(unet, halotune.HRAConfig(r=8, target_modules=TARGETS["geglu"]))
    assert model.get_nb_trainable_parameters()[0] == 895_488


def test_hints_are_added_once_and_to_both_halves(root: Path, tmp_path: Path) -> None:
    family = load_family(ControlConfig(**options(root, tmp_path / "run")))
    controlled = new_control(family.pipe, "canny")
    seen: list[torch.Tensor] = []
    family.pipe.unet.conv_in.register_forward_hook(lambda m, i, out: seen.append(out))
    x = torch.randn(4, 4, 8, 8)
    family.pipe.unet.conv_in(x)
    added = torch.randn(2, 16, 8, 8)
    with controlled.adding(added):
        family.pipe.unet.conv_in(x)
    family.pipe.unet.conv_in(x)
    torch.testing.assert_close(seen[1], seen[0] + torch.cat([added, added]))
    assert torch.equal(seen[2], seen[0])


def test_sdxl_learns_and_a_transformer_is_refused(root: Path, tmp_path: Path) -> None:
    for kind in ("sdxl", "sd3"):
        getattr(toy_pipelines, kind)(root / "sd" / "pipeline").save_pretrained(root / kind)
    values = {"model": str(root / "sdxl"), "max_steps": 6, "evaluate_every": 3, "learning_rate": 0.02}
    run = tmp_path / "run"
    train_control(ControlConfig(**options(root, run, **values, gradient_checkpointing=True, precision="bf16")))
    assert (run / "pictures" / "000006" / "0.png").is_file()
    assert all(p.dtype == torch.float32 for p in weights(run).values())
    with pytest.raises(HalotuneError, match="a StableDiffusion3Pipeline has no UNet"):
        train_control(ControlConfig(**options(root, tmp_path / "sd3", model=str(root / "sd3"))))


def test_another_bases_encoder_is_refused(trained: Path, root: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    pipe = StableDiffusionPipeline.from_pretrained(root / "sd" / "pipeline")
    pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config, block_out_channels=(32, 32))
    with pytest.raises(HalotuneError, match="is for a UNet of width 16 and a VAE of factor 2"):
        load_control(pipe, trained / "adapter")


def test_a_dry_run_writes_nothing(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "control", *flags(options(root, tmp_path / "run")), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "latents, hint (16, 16)" in out
    assert not (tmp_path / "run").exists()


def test_options_that_are_refused(root: Path, tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ControlConfig(**options(root, tmp_path / "run", preset="paper", max_steps=None, batch_size=None))
    assert (config.learning_rate, config.encoder_learning_rate, config.batch_size, config.epochs) == (3e-5, 3e-5, 64, 11)
    with pytest.raises(HalotuneError, match="empty_prompts: must be from 0 to 1; got 2"):
        ControlConfig(**options(root, tmp_path / "run", empty_prompts=2.0))
    for given, message in (
        ({}, "give one of --hint FILE, --image FILE and --split"),
        ({"hint": "a.png"}, "--prompt: is needed"),
        ({"split": "val", "prompt": "a"}, "have their own; got 'a'"),
        ({"split": "val", "shard": "2/2"}, "expected i/n"),
        ({"split": "val", "count": 0}, "--count: must be at least 1"),
    ):
        with pytest.raises(HalotuneError, match=message):
            ControlPictures(str(trained), **given)
    with pytest.raises(HalotuneError, match="is no finished run of `halotune train control`"):
        draw_control(ControlPictures(str(tmp_path), split="val"))
