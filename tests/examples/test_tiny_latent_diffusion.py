"""The example that trains a base, at toy size: parts that go on exactly, the pipeline that it leaves, what it refuses."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from halotune import HalotuneError

from .models import example

pytest.importorskip("diffusers")
Image = pytest.importorskip("PIL.Image")

TOY = ["--size", "16", "--vae-channels", "8", "8", "8", "--channels", "16", "16", "--groups", "8"]
TOY += ["--vae-batch-size", "4", "--unet-batch-size", "4"]
TOY += ["--vae-steps", "5", "--unet-steps", "6", "--samples", "1", "--inference-steps", "2", "--classifier-steps", "2"]
TOY += ["--device", "cpu", "--log-every", "100"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two kinds, and a text encoder of MiniLM's class."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("base")
    for number in range(40):
        place = folder / "images" / ("red_wall" if number % 2 else "sky")
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16 + number % 3), (200 + number, 10, 10) if number % 2 else (10, 10, 200)).save(
            place / f"{number}.png"
        )
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "red", "wall", "sky"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "encoder")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder / "encoder")
    return folder


def run(folder: Path, output: Path, calls: int = 10_000, *also: str) -> dict[str, Any]:
    """Run the example with a clock that ticks a second each time it is read."""
    script = example("tiny_latent_diffusion")
    ticks = itertools.count()
    script["run"].__globals__["time"] = SimpleNamespace(monotonic=lambda: next(ticks))
    given = ["--images", str(folder / "images"), "--text-encoder", str(folder / "encoder"), "--output", str(output)]
    return script["run"](script["arguments"]([*given, *TOY, "--minutes", str(calls / 60), *also]))


def weights(output: Path) -> dict[str, torch.Tensor]:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(output / "pipeline")
    return {f"{part}.{k}": v for part in ("vae", "unet") for k, v in getattr(pipe, part).state_dict().items()}


def test_parts_are_one_training(folder: Path, tmp_path: Path) -> None:
    whole = run(folder, tmp_path / "whole")
    assert whole["finished"]
    assert whole["steps"] == {"vae": 5, "unet": 6}
    assert 0 < whole["reconstruction_db"] < 40
    assert set(whole["by_caption"]) == {"a photo of a red wall", "a photo of a sky"}
    assert (tmp_path / "whole" / "samples.png").is_file()
    steps = []
    for _ in range(20):
        steps.append(run(folder, tmp_path / "parts", 12)["steps"])
        if steps[-1] == whole["steps"]:
            break
    assert len(steps) > 2
    torch.testing.assert_close(weights(tmp_path / "parts"), weights(tmp_path / "whole"), atol=0, rtol=0)

    pipe_files = list((tmp_path / "whole" / "carried").glob("*.safetensors"))
    assert pipe_files
    assert max(f.stat().st_size for f in pipe_files) <= 16 * 2**20


def test_what_is_cut_off_goes_on_where_it_was_saved(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here it is saved after every step, and cut off in the UNet's fourth."""
    whole = run(folder, tmp_path / "whole")
    script = example("tiny_latent_diffusion")
    usual, calls = script["unet_loss"], []

    def failing(*given: Any) -> torch.Tensor:
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return usual(*given)

    script["run"].__globals__.update(unet_loss=failing, SAVE_EVERY=-1.0)
    given = ["--images", str(folder / "images"), "--text-encoder", str(folder / "encoder"), "--output", str(tmp_path / "cut")]
    with pytest.raises(KeyboardInterrupt):
        script["run"](script["arguments"]([*given, *TOY]))
    assert not (tmp_path / "cut" / "pipeline").exists()
    assert run(folder, tmp_path / "cut")["steps"] == whole["steps"]
    torch.testing.assert_close(weights(tmp_path / "cut"), weights(tmp_path / "whole"), atol=0, rtol=0)


def test_a_new_sitting_begins_at_the_averaged_weights(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "out")
    (tmp_path / "out" / "state.pt").unlink()
    before = weights(tmp_path / "out")
    found = run(folder, tmp_path / "out", 0)
    assert found["steps"] == {"vae": 5, "unet": 6}
    rounded = {name: p.bfloat16().float() for name, p in before.items()}
    torch.testing.assert_close(weights(tmp_path / "out"), rounded, atol=0, rtol=0)


def test_the_files_are_split(folder: Path, tmp_path: Path) -> None:
    wide = ["--vae-channels", "8", "8", "304", "--vae-steps", "1", "--unet-steps", "0"]
    run(folder, tmp_path / "out", 10_000, *wide)
    sizes = [f.stat().st_size for f in (tmp_path / "out" / "carried").glob("*.safetensors")]
    assert len(sizes) > 1
    assert max(sizes) <= 16 * 2**20


def test_captions_from_a_table(folder: Path, tmp_path: Path) -> None:
    script = example("tiny_latent_diffusion")
    lines = [json.dumps({"file_name": f"images/{f.parent.name}/{f.name}", "text": "a wall"}) for f in folder.glob("images/*/*")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    (tmp_path / "images").symlink_to(folder / "images")
    images, captions = script["read_images"](tmp_path, 8)
    assert images.shape == (40, 3, 8, 8)
    assert set(captions) == {"a wall"}
    assert sum(image[:, 0, 0].tolist() == [10, 10, 200] for image in images) == 20


def test_bad_input(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(HalotuneError, match="multiple of 8; got 20"):
        run(folder, tmp_path / "out", 1, "--size", "20")
    with pytest.raises(HalotuneError, match="0 captioned images were found"):
        example("tiny_latent_diffusion")["read_images"](tmp_path, 8)
