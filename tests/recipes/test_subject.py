"""The recipe for a subject at toy size: end to end, resumed, and what it refuses."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from halotune import HalotuneError
from halotune.cli.main import main
from halotune.recipes.common.run import FINISHED, read_run

pytest.importorskip("diffusers")

from halotune.recipes import subject as recipe
from halotune.recipes.diffusion import draw, family_class, load_family
from halotune.recipes.pictures import Cache, buckets, file_name, read_picture
from halotune.recipes.subject import Denoiser, SubjectConfig, adapt, train_subject
from halotune.recipes.subject_data import Encoder, Picture, class_pictures, collate, find_pictures, mask_of
from halotune.recipes.subject_pictures import SubjectPictures

from .. import toy_pipelines
from ..examples.models import save_stable_diffusion
from .pictures import adapter, flags, save_subject, single_file, toy_options


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("image")
    stable_diffusion = save_stable_diffusion(folder / "sd")
    for kind in ("sdxl", "sd3", "flux"):
        getattr(toy_pipelines, kind)(stable_diffusion).save_pretrained(folder / kind)
    save_subject(folder / "flower")
    return folder


def options(root: Path, output: Path, **also: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "subject": str(root / "flower"),
        "class_word": "flower",
        "class_images": 2,
        "class_folder": str(root / "class_images"),
        "validation_seeds": 1,
    }
    return toy_options(root, output, **values | also)


def test_train_report_generate_and_load_elsewhere(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diffusers import StableDiffusionPipeline

    from halotune.integrations.diffusers import PipelineAdapters

    run = tmp_path / "run"
    given = flags(options(root, run, learning_rate=0.02, ema=0.5, min_snr=5, also="lora,kohya", evaluate_every=2))
    (run / ".adapter.incomplete").mkdir(parents=True)
    (run / ".adapter.incomplete" / "half.tmp").touch()  # as a process that was killed while saving leaves
    assert main(["train", "subject", *given]) == 0
    record = read_run(run)
    assert record is not None
    assert record["status"] == FINISHED
    assert not list((run / "adapter").rglob("*.tmp"))
    assert record["pictures"] == {"subject": 3, "class": 2}
    assert record["parameters"]["trainable"] > 0
    gallery = json.loads((run / "gallery.json").read_text())
    assert gallery["columns"] == ["subject", "base", "step 2", "step 4"]
    assert [row["label"] for row in gallery["rows"]] == ["a photo of qwe flower · seed 0"]
    assert (run / "index.html").read_text().count("data:image/png;base64") == 4
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["evaluation"]["loss"] for line in lines if "evaluation" in line]
    assert losses[-1] < losses[0]

    capsys.readouterr()
    common = ["--prompt", "a qwe flower", "--device", "cpu", "--output", str(tmp_path / "drawn"), "--seed", "3"]
    for scale in ("0", "1"):
        assert main(["generate", "subject", str(run), *common, "--scale", scale]) == 0
    base, trained = (Image.open(file) for file in capsys.readouterr().out.split())
    pipe = StableDiffusionPipeline.from_pretrained(root / "sd" / "pipeline")
    pipe.set_progress_bar_config(disable=True)

    def drawn() -> bytes:
        size = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 7.5}
        return pipe("a qwe flower", **size, generator=torch.Generator().manual_seed(3)).images[0].tobytes()

    plain = drawn()
    assert base.tobytes() == plain
    assert main(["generate", "subject", str(run), *common, "--resolution", "18"]) == 2
    assert "resolution: this model needs a multiple of 8; got 18. Use 16." in capsys.readouterr().err
    PipelineAdapters(pipe).load(run / "adapter")
    assert drawn() == trained.tobytes() != plain
    PipelineAdapters(pipe).unload()
    pipe.load_lora_weights(run / "lora")
    as_lora = torch.frombuffer(bytearray(drawn()), dtype=torch.uint8).int()
    assert (as_lora - torch.frombuffer(bytearray(trained.tobytes()), dtype=torch.uint8).int()).abs().max() <= 1
    assert list((run / "kohya").glob("*.safetensors"))


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_resumed_run_is_the_uninterrupted_one(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ema: float
) -> None:
    values = {"save_every": 2, "evaluate_every": 4, "ema": ema, "flip": True, "learning_rate": 0.01}
    train_subject(SubjectConfig(**options(root, tmp_path / "whole", **values)))
    usual = Denoiser.forward
    calls = []

    def failing(self: Denoiser, examples: Any) -> Any:
        calls.append(self.training)
        if sum(calls) == 4:
            raise KeyboardInterrupt
        return usual(self, examples)

    monkeypatch.setattr(Denoiser, "forward", failing)
    with pytest.raises(KeyboardInterrupt):
        train_subject(SubjectConfig(**options(root, tmp_path / "parts", **values)))
    monkeypatch.undo()
    train_subject(SubjectConfig(**options(root, tmp_path / "parts", **values)))
    for name, p in adapter(tmp_path / "whole").items():
        torch.testing.assert_close(adapter(tmp_path / "parts")[name], p, atol=0, rtol=0)


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux"])
def test_every_family_learns(root: Path, tmp_path: Path, kind: str) -> None:
    values = {"model": str(root / kind), "prior_weight": 0.0, "learning_rate": 0.02, "max_steps": 6}
    train_subject(SubjectConfig(**options(root, tmp_path / kind, **values)))
    lines = [json.loads(line) for line in (tmp_path / kind / "metrics.jsonl").read_text().splitlines()]
    losses = [line["evaluation"]["loss"] for line in lines if "evaluation" in line]
    assert losses[-1] < losses[0]


def test_min_snr_is_for_noise_alone(root: Path, tmp_path: Path) -> None:
    config = SubjectConfig(**options(root, tmp_path / "run", min_snr=5.0))
    family, latents = load_family(config), torch.zeros(64, 4, 2, 2)
    torch.manual_seed(0)
    _, t, _, weight = family.noised(latents, 5.0)
    alpha = family.scheduler.alphas_cumprod[t]
    torch.testing.assert_close(weight, torch.clamp(5 * (1 - alpha) / alpha, max=1.0))
    assert torch.equal(family.noised(latents).weight, torch.ones(64))
    config = SubjectConfig(**options(root, tmp_path / "run", min_snr=5.0, model=str(root / "flux")))
    with pytest.raises(HalotuneError, match="min_snr: a FluxPipeline learns a flow"):
        adapt(load_family(config), config)


def test_fluxs_answer_is_laid_out_as_its_latents(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = load_family(SubjectConfig(**options(root, tmp_path / "run", model=str(root / "flux"))))
    monkeypatch.setattr(
        type(family.model), "forward", lambda self, hidden_states, **_: type("Answer", (), {"sample": hidden_states})
    )
    latents = torch.randn(2, 4, 4, 6)
    text = {"encoder_hidden_states": torch.zeros(2, 3, 32), "pooled_projections": torch.zeros(2, 32)}
    assert torch.equal(family.predict(latents, torch.ones(2), text), latents)


def test_the_text_encoder_learns_too(root: Path, tmp_path: Path) -> None:
    values = {"train_text_encoder": True, "max_steps": 2, "gradient_checkpointing": True, "targets": "convolutions"}
    train_subject(SubjectConfig(**options(root, tmp_path / "run", **values)))
    index = json.loads((tmp_path / "run" / "adapter" / "adapter_index.json").read_text())
    assert set(index["components"]) == {"unet", "text_encoder"}
    moved = [k for k, p in adapter(tmp_path / "run").items() if "conv1" in k and p.abs().sum() > 0]
    assert moved


@pytest.mark.parametrize("kind", ["sd/pipeline", "sdxl"])
def test_a_lora_holds_the_text_encoders_too(root: Path, tmp_path: Path, kind: str) -> None:
    from diffusers import DiffusionPipeline

    from halotune.integrations.diffusers import PipelineAdapters

    values = {"train_text_encoder": True, "also": "lora,kohya", "learning_rate": 0.05, "model": str(root / kind)}
    train_subject(SubjectConfig(**options(root, tmp_path / "run", prior_weight=0.0, **values)))
    pipe = DiffusionPipeline.from_pretrained(root / kind)

    def told() -> torch.Tensor:
        with torch.no_grad():
            found = pipe.encode_prompt("a qwe", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
        return found[0]

    plain = told()
    PipelineAdapters(pipe).load(tmp_path / "run" / "adapter")
    trained = told()
    PipelineAdapters(pipe).unload()
    assert (trained - plain).abs().max() > 1e-2
    for name in ("lora", "kohya"):
        pipe.load_lora_weights(tmp_path / "run" / name)
        torch.testing.assert_close(told(), trained, atol=1e-4, rtol=1e-4)
        pipe.unload_lora_weights()
    keys = load_file(tmp_path / "run" / "kohya" / "pytorch_lora_weights.safetensors")
    assert all(key.startswith(("lora_unet_", "lora_te1_text_model_", "lora_te2_text_model_")) for key in keys)  # A1111's


@pytest.mark.filterwarnings("ignore:.upcast_vae.:FutureWarning")  # diffusers' own, which calls it
def test_a_decoder_that_wants_fp32_has_it(root: Path, tmp_path: Path) -> None:
    """As SDXL's does in fp16, where it would overflow, and every picture be black."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(root / "sdxl")
    with torch.no_grad():
        for p in pipe.vae.post_quant_conv.parameters():
            p.mul_(3e4)
    assert pipe.vae.config.force_upcast
    pipe.save_pretrained(tmp_path / "sdxl")
    config = SubjectConfig(**options(root, tmp_path / "run", model=str(tmp_path / "sdxl"), precision="fp16"))
    family = load_family(config)
    adapt(family, config)
    assert np.asarray(draw(family, config, "a qwe flower", 0, torch.device("cpu"))).mean() > 10


@pytest.mark.parametrize("changes", [{"_class_name": "EDMEulerScheduler"}, {"prediction_type": "sample"}])
def test_a_scheduler_of_another_training(root: Path, tmp_path: Path, changes: dict[str, str]) -> None:
    shutil.copytree(root / "sd" / "pipeline", tmp_path / "sd")
    own, index = tmp_path / "sd" / "scheduler" / "scheduler_config.json", tmp_path / "sd" / "model_index.json"
    entries = json.loads(own.read_text()) | changes
    own.write_text(json.dumps({"_class_name": entries["_class_name"]} if "_class_name" in changes else entries))
    index.write_text(json.dumps(json.loads(index.read_text()) | {"scheduler": ["diffusers", entries["_class_name"]]}))
    with pytest.raises(HalotuneError, match="stands for another training than this"):
        load_family(SubjectConfig(**options(root, tmp_path / "run", model=str(tmp_path / "sd"))))


def test_the_loss_counts_what_the_mask_marks(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SubjectConfig(**options(root, tmp_path / "run", prior_weight=2.0))
    family = load_family(config)
    adapt(family, config)
    model = Denoiser(family, config)
    target = torch.zeros(1, 4, 4, 4)
    target[..., 0] = 3.0
    example = {"mean": torch.zeros(1, 4, 4, 4), "deviation": torch.zeros(1, 4, 4, 4), "text": {}, "caption": "", "prior": False}
    monkeypatch.setattr(family, "noised", lambda z, _: (z, z, target.expand_as(z), torch.ones(len(z))))
    monkeypatch.setattr(family, "predict", lambda noisy, t, text: torch.zeros_like(noisy))
    ones, first = torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    first[..., 0] = 1.0
    assert model([example | {"mask": ones}])["loss"] == pytest.approx(9 / 4)
    assert model([example | {"mask": first}])["loss"] == pytest.approx(9)
    both = [example | {"mask": first}, example | {"mask": ones, "prior": True}]
    assert model(both)["loss"] == pytest.approx(9 + 2 * 9 / 4)


def test_the_cache_knows_what_changed(root: Path, tmp_path: Path) -> None:
    config = SubjectConfig(
        **options(root, tmp_path / "run", subject=str(save_subject(tmp_path / "own")), cache=str(tmp_path / "c"))
    )
    family = load_family(config)
    cpu = torch.device("cpu")

    def latents() -> torch.Tensor:
        encoder = Encoder(family, config, cpu)
        return encoder.examples(find_pictures(config.subject, "a qwe flower"), prior=False)[0]["mean"]

    before, files = latents(), set(Path(config.cache).iterdir())
    assert torch.equal(latents(), before)
    assert set(Path(config.cache).iterdir()) == files
    Image.new("RGB", (32, 32), "red").save(tmp_path / "own" / "00.png")
    assert not torch.equal(latents(), before)
    with torch.no_grad():
        family.pipe.vae.encoder.conv_in.weight.mul_(2)
    assert len(set(Path(config.cache).iterdir())) == len(files) + 1
    latents()
    assert len(set(Path(config.cache).iterdir())) == len(files) + 4
    family.pipe.tokenizer.model_max_length -= 1
    latents()
    assert len(set(Path(config.cache).iterdir())) == len(files) + 5
    made = Cache(tmp_path / "d").get({"a": 1}, lambda: {"x": torch.ones(2)})
    file = next((tmp_path / "d").iterdir())
    file.write_bytes(b"damaged")
    assert torch.equal(Cache(tmp_path / "d").get({"a": 1}, lambda: {"x": torch.ones(2)})["x"], made["x"])


def test_class_pictures_go_on(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk ends the command; the next one makes what is missing."""
    config = SubjectConfig(**options(root, tmp_path / "run", class_images=3, class_folder=str(tmp_path / "class")))
    family = load_family(config)
    cpu = torch.device("cpu")
    usual = Image.Image.save
    saved = []

    def save(self: Image.Image, file: Any, *args: Any, **kwargs: Any) -> None:
        if len(saved) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        saved.append(file)
        usual(self, file, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(OSError, match="No space left"):
        class_pictures(config, family, cpu)
    monkeypatch.undo()
    kept = {f: f.stat().st_mtime_ns for f in (tmp_path / "class").iterdir()}
    assert len(kept) == 2
    assert len(class_pictures(config, family, cpu)) == 3
    assert {f: f.stat().st_mtime_ns for f in kept} == kept


def test_class_pictures_are_not_black(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a safety checker leaves some: another seed is taken, and nothing is learned from those."""
    config = SubjectConfig(**options(root, tmp_path / "run", class_images=2, class_folder=str(tmp_path / "class")))
    family, seeds = load_family(config), []

    def drawn(_family: Any, _config: Any, _prompt: str, seed: int, _device: Any) -> Image.Image:
        seeds.append(seed)
        return Image.new("RGB", (16, 16), "red" if seed in (1, 1 << 32) else "black")

    monkeypatch.setattr("halotune.recipes.subject_data.draw", drawn)
    assert [read_picture(p.file).getpixel((0, 0)) for p in class_pictures(config, family, torch.device("cpu"))] == [
        (255, 0, 0)
    ] * 2
    assert sorted(seeds) == [0, 1, 1 << 32]
    config.class_images = 3
    with pytest.raises(HalotuneError, match=r"its pictures of 'a photo of flower' are black\. Use another --precision"):
        class_pictures(config, family, torch.device("cpu"))


def test_pictures_as_cameras_save_them(tmp_path: Path) -> None:
    """Turned by EXIF, CMYK, transparent."""
    sideways = Image.new("RGB", (8, 4), "red")
    exif = sideways.getexif()
    exif[0x0112] = 6
    sideways.save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "turned.jpg").size == (4, 8)
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    found = read_picture(tmp_path / "cmyk.jpg")
    assert found.mode == "RGB"
    red, green, _ = found.getpixel((4, 4))  # type: ignore[misc]
    assert red > 200 > 60 > green
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_picture(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "preview.jpg", "MPO", save_all=True, append_images=[sideways])
    assert read_picture(tmp_path / "preview.jpg").size == (8, 8)


def test_what_is_transparent_in_a_mask_is_not_the_subject(tmp_path: Path) -> None:
    cut_out = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    cut_out.paste((255, 255, 255, 255), (0, 0, 2, 8))
    cut_out.save(tmp_path / "mask.png")
    mask = mask_of(Picture(tmp_path, "", tmp_path / "mask.png"), (8, 8), [(8, 8)], 0.0)
    assert mask is not None
    assert mask.mean() == pytest.approx(1 / 4)


def test_pictures_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HalotuneError, match="there is no such folder"):
        find_pictures(tmp_path / "none", "a")
    with pytest.raises(HalotuneError, match="holds no picture"):
        find_pictures(tmp_path, "a")
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:])
    with pytest.raises(HalotuneError, match="is animated, of 2 frames"):
        read_picture(tmp_path / "moving.webp")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    with pytest.raises(HalotuneError, match=r"broken.jpg: cannot be read as a picture"):
        read_picture(tmp_path / "broken.jpg")
    sideways = BytesIO()
    exif = frames[0].getexif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    frames[0].save(sideways, "JPEG", exif=exif)
    wrong = sideways.getvalue().replace(b"\x01\x0f\x00\x02", b"\x01\x00\x00\x02")  # a text as the width
    for content in (b"\x89PNG\r\n\x1a\n\0\0\0\5IHDR\0\0\0\5\0\0\0\0\0", wrong):
        (tmp_path / "broken.jpg").write_bytes(content)
        with pytest.raises(HalotuneError, match=r"broken.jpg: cannot be read as a picture"):
            read_picture(tmp_path / "broken.jpg")
    (tmp_path / "broken.txt").write_text("a photo of a dog")
    with pytest.raises(HalotuneError, match=r"broken.txt: lacks the identifier 'qwe'"):
        find_pictures(tmp_path, "a qwe dog", "qwe")
    (tmp_path / "masks").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "masks" / "other.png")
    with pytest.raises(HalotuneError, match="there is no picture other for this mask"):
        find_pictures(tmp_path, "a")


def test_configurations_that_are_refused(root: Path, tmp_path: Path) -> None:
    def config(**also: Any) -> SubjectConfig:
        return SubjectConfig(**options(root, tmp_path / "run", **also))

    with pytest.raises(HalotuneError, match="class_word: is needed"):
        config(class_word=None)
    with pytest.raises(HalotuneError, match="prompt: lacks 'qwe'"):
        config(prompt="a photo of a qwerty flower")
    with pytest.raises(HalotuneError, match="also: expected some of lora, kohya"):
        config(also="gguf")
    with pytest.raises(HalotuneError, match="shard: expected i/n"):
        config(shard="2/2")
    with pytest.raises(HalotuneError, match="resolution: must be at least 1; got 0"):
        config(resolution=0)
    with pytest.raises(HalotuneError, match="--count: must be at least 1; got 0"):
        SubjectPictures(str(tmp_path), prompt="a qwe flower", count=0)
    with pytest.raises(HalotuneError, match="identifier: is needed; got ''"):
        config(identifier="")
    for field, value in {"class_index": 0, "prompt_index": 0, "paper_code": True, "shard": "1/2"}.items():
        with pytest.raises(HalotuneError, match=rf"{field}: is of a suite; got .*\. Add --suite dreambooth"):
            config(**{field: value})
    for field, value in {"class_word": "dog", "prompt": "a qwe", "class_prompt": "a", "validation_prompts": ["a"]}.items():
        with pytest.raises(HalotuneError, match=f"{field}: is each subject's own in a suite"):
            config(suite="dreambooth", **{"class_word": None, field: value})
    assert config().learning_rate == pytest.approx(1e-3)  # a tenth of HRA's usual one
    with pytest.raises(HalotuneError, match="of no known type"):
        family_class("KandinskyPipeline", "a/b")
    with pytest.raises(HalotuneError, match=r"multiple of 4; got 18. Use 16"):
        buckets(18, 4, aspect=False)
    with pytest.raises(HalotuneError, match="resolution: this model draws at most 32 pixels a side; got 64"):
        load_family(config(model=str(root / "sd3"))).sizes(64)
    assert config(preset="paper-code", max_steps=None).max_steps == 2005
    assert config(targets="convolutions").adapter.target_modules != recipe.SubjectConfig.TARGETS  # type: ignore[union-attr]


def test_shapes_of_pictures(root: Path, tmp_path: Path) -> None:
    """A wide picture and a tall one, in one batch; all shapes are ones that the pipeline draws."""
    folder = tmp_path / "shapes"
    folder.mkdir()
    Image.new("RGB", (64, 32), "red").save(folder / "wide.png")
    Image.new("RGB", (32, 64), "blue").save(folder / "tall.png")
    config = SubjectConfig(**options(root, tmp_path / "run", subject=str(folder), aspect=True, resolution=32))
    family = load_family(config)
    adapt(family, config)
    encoder = Encoder(family, config, torch.device("cpu"))
    assert len(encoder.sizes) > 2 and all(side % 8 == 0 for size in encoder.sizes for side in size)
    tall, wide = encoder.examples(find_pictures(folder, "a qwe flower"), prior=False)
    assert tall["mean"].shape[-2] > tall["mean"].shape[-1]
    assert wide["mean"].shape[-2] < wide["mean"].shape[-1]
    assert Denoiser(family, config)(**collate([[tall], [wide]]))["loss"] > 0


def learns(root: Path, run: Path, **held: str) -> bool:
    train_subject(SubjectConfig(**options(root, run, learning_rate=0.02, prior_weight=0.0, max_steps=6, **held)))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["evaluation"]["loss"] for line in lines if "evaluation" in line]
    return losses[-1] < losses[0]


def test_the_base_in_half_precision(root: Path, tmp_path: Path) -> None:
    assert learns(root, tmp_path / "run", precision="bf16")
    assert all(p.dtype == torch.float32 for p in adapter(tmp_path / "run").values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_the_base_in_few_bits(root: Path, tmp_path: Path, quant: str) -> None:
    pytest.importorskip("bitsandbytes")
    assert learns(root, tmp_path / "run", precision="bf16", quant=quant, device="auto")


def test_few_bits_need_an_accelerator(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(HalotuneError, match="quant: diffusers quantizes on an accelerator alone; got 'nf4'"):
        learns(root, tmp_path / "run", quant="nf4")


def test_a_dry_run_writes_nothing(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = flags(options(root, tmp_path / "run", class_folder=str(tmp_path / "class")))
    assert main(["train", "subject", *given, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "subject  4 × 8 × 8 latents, 100% of them in the loss  a photo of qwe flower" in out
    assert "trained parameters" in out
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "class").exists()


def test_a_single_file_is_the_pipeline_it_was_made_of(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pickle that holds more than weights is refused; of safetensors beside a pickle, safetensors are read."""
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import save_file

    folder = root / "sd" / "pipeline"
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    weights = single_file(pipe)
    config = SubjectConfig(
        **options(root, tmp_path / "run", model=str(tmp_path / "toy.ckpt"), pipeline_config=str(folder), prior_weight=0.0)
    )
    torch.save({"state_dict": weights, "hook": print}, tmp_path / "toy.ckpt")
    with pytest.raises(HalotuneError, match="cannot be loaded: Unable to load weights"):
        load_family(config)
    torch.save({"state_dict": weights}, tmp_path / "toy.ckpt")
    for name in ("toy.ckpt", "toy.safetensors"):
        family = load_family(config)
        for part in ("unet", "vae", "text_encoder"):
            for a, b in zip(getattr(family.pipe, part).parameters(), getattr(pipe, part).parameters(), strict=True):
                assert torch.equal(a, b)
        if name == "toy.ckpt":
            save_file(weights, tmp_path / "toy.safetensors")
    assert "toy.safetensors is read, not toy.ckpt" in capsys.readouterr().err
    with pytest.raises(HalotuneError, match=r"toy.safetensors: is no whole FluxPipeline: Failed to load T5EncoderModel"):
        load_family(replace(config, pipeline_config=str(root / "flux")))
    train_subject(config)
    assert adapter(tmp_path / "run")


def test_what_users_folders_hold(root: Path, tmp_path: Path) -> None:
    """Files of the system, one pixel, sixteen bits, names and captions in any language."""
    folder = tmp_path / "собака 犬"
    folder.mkdir()
    (folder / "._00.jpg").write_bytes(b"of the system")
    (folder / "thumbnails.png").mkdir()
    Image.new("RGB", (1, 1), "red").save(folder / "один.png")
    (folder / "один.txt").write_text("фото qwe собаки", encoding="utf-8-sig")
    Image.fromarray(np.full((8, 8), 128 << 8, dtype=np.uint16)).save(folder / "deep.png")
    found = find_pictures(folder, "a qwe dog", "qwe")
    assert [p.caption for p in found] == ["a qwe dog", "фото qwe собаки"]
    assert read_picture(found[0].file).getpixel((0, 0)) == (128, 128, 128)
    values = options(root, tmp_path / "бег", subject=str(folder), class_word="собака", prompt="a qwe", max_steps=1)
    assert main(["train", "subject", *flags(values | {"class_folder": str(tmp_path / "класс")})]) == 0
    (folder / "один.txt").write_bytes("собака".encode("koi8-r"))
    with pytest.raises(HalotuneError, match=r"один.txt: cannot be read as UTF-8"):
        find_pictures(folder, "a")


def test_files_that_are_not_used_are_named(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_subject(tmp_path / "own", 1)
    (folder / "00.txt").write_text("a photo of qwe flower")
    (folder / "0.txt").write_text("a photo of qwe flower on a wall")
    (folder / "01.heic").touch()
    train_subject(SubjectConfig(**options(root, tmp_path / "run", subject=str(folder), prior_weight=0.0, max_steps=1)))
    assert "nor their captions, so not used: 0.txt, 01.heic\n" in capsys.readouterr().err


def test_files_of_different_prompts_have_different_names() -> None:
    assert file_name("a qwe dog in the snow") == "a_qwe_dog_in_the_snow"
    prompts = ["a qwe dog", "a qwe dog!", "a qwe dog?", "a_qwe_dog", *(f"{'a qwe ' * 20}{i}" for i in range(3))]
    assert len({file_name(prompt) for prompt in prompts}) == len(prompts)


def test_a_run_does_not_go_on_with_other_pictures(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"subject": str(save_subject(tmp_path / "own")), "prior_weight": 0.0, "save_every": 2, "evaluate_every": 4}
    values = options(root, tmp_path / "run", **own)

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe.SubjectTrainer, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_subject(SubjectConfig(**values))
    monkeypatch.undo()
    (tmp_path / "own" / "02.png").rename(tmp_path / "02.png")
    with pytest.raises(HalotuneError, match="run: the data have changed since the run began"):
        train_subject(SubjectConfig(**values))
    (tmp_path / "02.png").rename(tmp_path / "own" / "02.png")
    assert train_subject(SubjectConfig(**values))["status"] == FINISHED


def test_a_full_disk_ends_a_run_that_then_goes_on(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = options(root, tmp_path / "run", prior_weight=0.0, save_every=2)

    for error in (OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")):

        def full(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr("halotune.integrations.diffusers.PipelineAdapters.save", full)
        assert main(["train", "subject", *flags(values)]) == 1
        assert "No space left on device" in capsys.readouterr().err
    record = read_run(tmp_path / "run")
    assert record
    assert record["status"] == "failed"
    assert not list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    monkeypatch.undo()
    assert main(["train", "subject", *flags(values)]) == 0
    assert adapter(tmp_path / "run")


def test_a_pipeline_of_another_kind(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text('{"_class_name": "Flux2Pipeline"}')
    assert main(["train", "subject", *flags(options(root, tmp_path / "run", model=str(tmp_path / "other")))]) == 2
    assert "a Flux2Pipeline is of no known type. Use a model of one of StableDiffusionPipeline" in capsys.readouterr().err
