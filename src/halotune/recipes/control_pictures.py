"""`halotune generate control`: pictures that follow one hint, or those of a whole split, in shares that can be restarted.

OUTPUT/results/NAME.png     what was drawn; NAME-1.png … where there are several of a hint
OUTPUT/hints/NAME.png       the hint
OUTPUT/source/NAME.png      the picture that it is of, as large as the others
OUTPUT/base/NAME.png        what the base alone makes of the prompt, with --base
OUTPUT/settings.json        how they were drawn
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import nn

from ..cli.loading import find_device
from ..core.errors import HalotuneError
from ..core.files import write_atomically
from ..integrations.diffusers import PipelineAdapters
from ..report.record import write_record
from .common.run import configuration, read_run, said
from .control import ControlConfig
from .control_data import Pair, Preparation, evenly, read_pairs
from .control_hints import read_depth, read_labels
from .control_model import Controlled, load_control
from .diffusion import Family, load_family
from .pictures import fitted, read_picture
from .pipeline_trainer import share


@dataclass
class ControlPictures:
    """Draw pictures that follow hints, with what a run has learned: of one hint and prompt, or of a split.

    Args:
        run: the run's folder.
        prompt: what is drawn, of one hint.
        hint: the hint's file.
        image: a picture that the hint is made of, instead.
        split: draw all pictures of the data's train or val.
        data: the folder of the data; by default the run's.
        shard: of the split, the i-th of n shares, as i/n, from 0.
        limit: of the split, only so many, at even distances.
        output: the folder they go to; by default the run's folder drawn/, and of a split drawn/SPLIT.
        count: pictures of each hint.
        seed: of the first one; each next one has the next.
        scale: of the adapter: 0 is the base's layers, 1 what was trained.
        conditioning_scale: of what the hint adds: 0 is none, 1 what was trained.
        resolution: in pixels; by default the run's.
        inference_steps: of DDIM; by default the run's.
        guidance_scale: by default the run's.
        base: also draw what the base alone makes of the prompts.
        batch_size: of a split, pictures drawn at once: faster on an accelerator, and the same but for rounding.
        device: auto takes the accelerator where there is one.
    """

    run: str
    _: KW_ONLY
    prompt: str | None = None
    hint: str | None = None
    image: str | None = None
    split: Literal["train", "val"] | None = None
    data: str | None = None
    shard: str = "0/1"
    limit: int | None = None
    output: str | None = None
    count: int = 1
    seed: int = 0
    scale: float = 1.0
    conditioning_scale: float = 1.0
    resolution: int | None = None
    inference_steps: int | None = None
    guidance_scale: float | None = None
    base: bool = False
    batch_size: int = 1
    device: Literal["auto", "cpu"] = "auto"

    def __post_init__(self) -> None:
        one = self.hint is not None or self.image is not None
        if one == (self.split is not None) or (self.hint is not None and self.image is not None):
            raise HalotuneError("give one of --hint FILE, --image FILE and --split SPLIT: what the pictures are to follow.")
        if one and not (self.prompt or "").strip():
            raise HalotuneError("--prompt: is needed with --hint and --image. Say what is to be drawn.")
        if self.split and self.prompt is not None:
            raise HalotuneError(f"--prompt: the rows of a split have their own; got {self.prompt!r}. Leave it out.")
        if share(self.shard) is None:
            raise HalotuneError(f"--shard: expected i/n with 0 ≤ i < n; got {self.shard!r}. Use for example 0/4.")
        for name in ("count", "limit", "inference_steps", "resolution", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise HalotuneError(f"--{name.replace('_', '-')}: must be at least 1; got {value}. Use a number such as 4.")


def draw_controlled(
    controlled: Controlled,
    prompts: Sequence[str],
    hints: Sequence[Image.Image],
    seeds: Sequence[int],
    *,
    conditioning_scale: float,
    inference_steps: int,
    guidance_scale: float,
    device: torch.device,
) -> list[Image.Image]:
    """Pictures of the hints' one size; the noise is drawn on the CPU, so that it is the same on every machine."""
    pipe: Any = controlled.pipe
    for part in pipe.components.values():
        if isinstance(part, nn.Module) and part is not pipe.unet:
            part.to(device)
    with torch.no_grad():  # and no autocast, as in `diffusion.draw`
        return controlled(
            list(prompts),
            list(hints),
            conditioning_scale,
            num_inference_steps=inference_steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        ).images


@dataclass(frozen=True)
class Trained:
    """A finished run, ready to draw."""

    config: ControlConfig
    family: Family
    controlled: Controlled
    adapters: PipelineAdapters
    preparation: Preparation
    device: torch.device


def read_config(folder: str | Path, **also: Any) -> ControlConfig:
    """The configuration of a finished run; some of its fields may be given anew."""
    record = read_run(Path(folder))
    if record is None or record.get("recipe") != ControlConfig.RECIPE or not (Path(folder) / "adapter").is_dir():
        raise HalotuneError(f"{folder}: is no finished run of `halotune train control`: it has no run.json, or no adapter/.")
    return ControlConfig(**configuration(record) | {k: v for k, v in also.items() if v is not None})


def load_trained(folder: str | Path, config: ControlConfig) -> Trained:
    device = find_device(config.device)
    family = load_family(config)
    if not config.quant:
        family.model.to(device)
    controlled = load_control(family.pipe, Path(folder) / "adapter")
    preparation = Preparation(config, family.sizes(config.resolution, config.aspect))
    return Trained(config, family, controlled, PipelineAdapters(family.pipe), preparation, device)


def draw_control(options: ControlPictures) -> list[Path]:
    """Write the pictures that are not there yet; the files of all of them."""
    fields = ("data", "resolution", "inference_steps", "guidance_scale", "device")
    config = read_config(options.run, **{name: getattr(options, name) for name in fields})
    if options.split is None:
        return _draw_one(options, config)
    folder = Path(options.output or f"{options.run}/drawn/{options.split}")
    jobs = split_jobs(options, config)
    if not jobs:
        said(f"{folder}: share {options.shard} has no picture, as there are fewer than shares. Nothing was done.")
        return []
    check_settings(folder, options, config)
    kinds = ("results", "base") if options.base else ("results",)
    files = {(kind, job): folder / kind / f"{job.name}.png" for job in jobs for kind in kinds}
    missing = {place: file for place, file in files.items() if not file.is_file()}
    said(f"{folder}: {len(files)} pictures, {len(files) - len(missing)} of them drawn already")
    if missing:
        trained = load_trained(options.run, config)
        for kind in kinds:
            for batch in _batches(trained, folder, [job for k, job in missing if k == kind], options.batch_size):
                images = _drawn(
                    trained, options, [j.pair.prompt for j, _ in batch], [h for _, h in batch], [j.seed for j, _ in batch], kind
                )
                for (job, _), image in zip(batch, images, strict=True):
                    _save(image, files[kind, job])
    return [file for file in files.values() if file.is_file()]


@dataclass(frozen=True, eq=False)
class Job:
    """A picture of a split that is to be drawn."""

    name: str
    pair: Pair
    seed: int


def split_jobs(options: ControlPictures, config: ControlConfig) -> list[Job]:
    """This process's share of the split. A picture has the same seed in whatever share it is."""
    left_out: list[str] | None = [] if config.skip_bad_rows else None
    pairs = evenly(list(enumerate(read_pairs(config.data, str(options.split), config.control, left_out))), options.limit)
    number, shares = share(options.shard) or (0, 1)
    return [
        Job(f"{pair.name}-{k}" if k else pair.name, pair, options.seed + i * options.count + k)
        for i, pair in pairs[number::shares]
        for k in range(options.count)
    ]


def _batches(trained: Trained, folder: Path, jobs: Sequence[Job], batch_size: int) -> Iterator[list[tuple[Job, Image.Image]]]:
    """Jobs and their hints, so many of one size at a time; the hints and sources are written on the way."""
    waiting: dict[tuple[int, int], list[tuple[Job, Image.Image]]] = {}
    for job in jobs:
        pair = job.pair
        try:
            hint = trained.preparation.hint(pair)
        except HalotuneError as e:
            if not trained.config.skip_bad_rows:
                raise
            said(f"left out: {e}")
            continue
        for name, image in (("hints", hint), ("source", trained.preparation.picture(pair))):
            if not (folder / name / f"{pair.name}.png").is_file():
                _save(image, folder / name / f"{pair.name}.png")
        batch = waiting.setdefault(hint.size, [])
        batch.append((job, hint))
        if len(batch) == batch_size:
            yield waiting.pop(hint.size)
    yield from waiting.values()


def _drawn(
    trained: Trained,
    options: ControlPictures,
    prompts: Sequence[str],
    hints: Sequence[Image.Image],
    seeds: Sequence[int],
    kind: str,
) -> list[Image.Image]:
    """Pictures with the adapter and the hints; or, where `kind` is base, without both."""
    (name,) = trained.adapters.names
    trained.adapters.set(name, 0.0 if kind == "base" else options.scale)
    return draw_controlled(
        trained.controlled,
        prompts,
        hints,
        seeds,
        conditioning_scale=0.0 if kind == "base" else options.conditioning_scale,
        inference_steps=trained.config.inference_steps,
        guidance_scale=trained.config.guidance_scale,
        device=trained.device,
    )


def _draw_one(options: ControlPictures, config: ControlConfig) -> list[Path]:
    trained = load_trained(options.run, config)
    folder, prompt = Path(options.output or f"{options.run}/drawn"), str(options.prompt).strip()
    given = Path(str(options.hint or options.image))
    if options.image is not None:
        if config.control in ("segm", "depth"):
            raise HalotuneError(f"--image: a hint of {config.control} cannot be made of a picture. Give it with --hint.")
        hint = trained.preparation.hint(Pair(given, prompt))
        _save(trained.preparation.picture(Pair(given, prompt)), folder / "source" / f"{given.stem}.png")
    else:
        sizes, palette = trained.preparation.sizes, trained.preparation.palette
        if config.control == "segm":
            hint = fitted(read_labels(given, palette)[1], sizes, Image.Resampling.NEAREST)
        else:
            hint = fitted(read_depth(given) if config.control == "depth" else read_picture(given), sizes)
    _save(hint, folder / "hints" / f"{given.stem}.png")
    written = []
    for seed in range(options.seed, options.seed + options.count):
        for kind in ("results", "base") if options.base else ("results",):
            file = folder / kind / f"{given.stem}-seed{seed}-scale{options.scale:g}-hint{options.conditioning_scale:g}.png"
            _save(_drawn(trained, options, [prompt], [hint], [seed], kind)[0], file)
            written.append(file)
    return written


def _save(image: Image.Image, file: Path) -> None:
    write_atomically(file, lambda out: image.save(out, "png"))


def check_settings(folder: Path, options: ControlPictures, config: ControlConfig) -> None:
    """Write how the pictures of a folder are drawn; refuse to mix them with others."""
    own = {name: getattr(options, name) for name in ("split", "seed", "count", "scale", "conditioning_scale")}
    own |= {name: getattr(config, name) for name in ("data", "resolution", "inference_steps", "guidance_scale")}
    file = folder / "settings.json"
    if file.is_file():
        there = json.loads(file.read_text(encoding="utf-8"))
        differ = [f"{k}: {there.get(k)!r} there, {v!r} here" for k, v in own.items() if there.get(k) != v]
        if differ:
            raise HalotuneError(
                f"{folder}: holds pictures that were drawn otherwise ({'; '.join(differ)}). Give another --output."
            )
    write_record(file, own)
