"""The example with Stable Diffusion, on a small pipeline of its classes."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from halotune.core.layer import AdaptedLayer

from .models import example, only_adapters_train, run_as_script, save_stable_diffusion, starts_away

pytest.importorskip("diffusers")
Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline, and one with images."""
    folder = tmp_path_factory.mktemp("stable_diffusion")
    save_stable_diffusion(folder)
    (folder / "images").mkdir()
    for i, color in enumerate(["red", "green", "blue"]):
        Image.new("RGB", (20 + i, 24), color).save(folder / "images" / f"{i}.png")
    return folder


def adapted(model: nn.Module) -> dict[str, nn.Module]:
    """The base layers that have adapters, by their names in the plain model."""
    return {name.removeprefix("model."): m.base_layer for name, m in model.named_modules() if isinstance(m, AdaptedLayer)}


def load(folder: Path):
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(folder / "pipeline")


def outputs(pipe) -> list[torch.Tensor]:
    """What text encoder and UNet answer, each to fixed inputs."""
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 16, 32, generator=generator)
    ids = torch.arange(32).reshape(2, 16)
    with torch.no_grad():
        return [pipe.text_encoder(ids)[0], pipe.unet(latents, 3, text).sample]


@pytest.mark.parametrize(
    ("method", "model_class"),
    [("hra", "HRAModel"), ("hra-gs", "HRAModel"), ("loha", "LoHaModel"), ("bone", "BoneModel")],
)
def test_adapters(folder: Path, method: str, model_class: str) -> None:
    script = example("stable_diffusion")
    pipe = load(folder)
    plain = outputs(pipe)
    with starts_away() if method == "hra-gs" else nullcontext():
        script["adapt"](pipe, method)

    for part in (pipe.text_encoder, pipe.unet):
        assert type(part).__name__ == model_class
        assert only_adapters_train(part)
    text_layers, unet_layers = adapted(pipe.text_encoder), adapted(pipe.unet)
    assert len(text_layers) == 2 * 6
    assert all(isinstance(m, nn.Linear) for m in text_layers.values())
    convolutions = {name for name, m in unet_layers.items() if isinstance(m, nn.Conv2d)}
    assert {name.rsplit(".", 1)[-1] for name in convolutions} == {"proj_in", "proj_out"}
    transformers = len(convolutions) // 2
    assert transformers == 4  # one on the way down, one in the middle, two on the way up
    assert len(unet_layers) == transformers * (2 + 4 + 4 + 2)  # convolutions, two attentions, the feed-forward layers

    start = outputs(pipe)
    for before, after in zip(plain, start, strict=True):
        identity = torch.allclose(before, after, atol=1e-5)
        assert identity == (method != "hra-gs")

    with torch.no_grad():
        for p in (*pipe.text_encoder.parameters(), *pipe.unet.parameters()):
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    moved = outputs(pipe)
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in zip(start, moved, strict=True))
    pipe.text_encoder, pipe.unet = pipe.text_encoder.merge_and_unload(), pipe.unet.merge_and_unload()
    for a, b in zip(moved, outputs(pipe), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["hra", "hra-gs", "loha", "bone"])
def test_training(folder: Path, method: str) -> None:
    """The loss falls over the same noise and times."""
    script = example("stable_diffusion")
    pipe = load(folder)
    with starts_away() if method == "hra-gs" else nullcontext():
        script["adapt"](pipe, method)
    latents = script["encode"](pipe, [Image.new("RGB", (20, 24), color) for color in ("red", "green")])
    assert latents.shape == (2, 4, 8, 8)

    def loss() -> float:
        torch.manual_seed(0)
        with torch.no_grad():
            return script["denoising_loss"](pipe, latents.repeat(8, 1, 1, 1), "a dog").item()

    before = loss()
    losses = script["train"](pipe, latents, "a dog", steps=12, lr=2e-2)
    assert len(losses) == 12
    assert loss() < before - 0.02


def test_as_a_user_runs_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import StableDiffusionPipeline

    arguments = ["--images", folder / "images", "--prompt", "a dog", "--method", "loha", "--steps", "3"]
    run_as_script(monkeypatch, "stable_diffusion", *arguments, "--model", folder / "pipeline", "--output", tmp_path / "out")
    assert (tmp_path / "out" / "sample.png").is_file()
    written = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(written.unet).__name__ == "UNet2DConditionModel"
    assert all(not torch.equal(a, b) for a, b in zip(outputs(written), outputs(load(folder)), strict=True))
