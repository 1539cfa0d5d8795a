"""`halotune generate subject`: pictures of a subject that a run has learned."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal

import torch

from ..cli.loading import find_device
from ..core.errors import HalotuneError
from ..core.files import write_atomically
from ..integrations.diffusers import PipelineAdapters
from .common.run import configuration, read_run, said
from .diffusion import Family, draw, load_family
from .pictures import file_name
from .subject import ADAPTER, SubjectConfig
from .subject_data import has_word


@dataclass
class SubjectPictures:
    """Draw pictures with what a run has learned.

    Args:
        run: the run's folder.
        prompt: what is drawn, with the run's identifier in it.
        output: the folder they go to; by default the run's folder drawn/.
        count: how many, each of the next seed.
        seed: the first one's.
        scale: of the adapter: 0 is the base, 1 what was trained.
        resolution: in pixels; by default the run's.
        inference_steps, guidance_scale: by default the run's.
        device: auto takes the accelerator where there is one.
    """

    run: str
    _: KW_ONLY
    prompt: str
    output: str | None = None
    count: int = 1
    seed: int = 0
    scale: float = 1.0
    resolution: int | None = None
    inference_steps: int | None = None
    guidance_scale: float | None = None
    device: Literal["auto", "cpu"] = "auto"

    def __post_init__(self) -> None:
        for name in ("count", "resolution", "inference_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise HalotuneError(f"--{name.replace('_', '-')}: must be at least 1; got {value}. Use a number such as 4.")


def trained_subject(folder: str | Path, device: str) -> tuple[SubjectConfig, Family, PipelineAdapters, torch.device]:
    """A finished run's configuration, its pipeline with the adapter, and where it runs."""
    record = read_run(Path(folder))
    if record is None or record.get("recipe") != SubjectConfig.RECIPE or not (Path(folder) / "adapter").is_dir():
        raise HalotuneError(f"{folder}: is no finished run of `halotune train subject`: it has no run.json, or no adapter/.")
    config = SubjectConfig(**configuration(record) | {"device": device})
    where = find_device(device)
    family = load_family(config)
    adapters = PipelineAdapters(family.pipe)
    adapters.load(Path(folder) / "adapter", ADAPTER)
    if not config.quant:
        family.model.to(where)
    return config, family, adapters, where


def draw_subject(options: SubjectPictures) -> list[Path]:
    """Write the pictures; their files."""
    config, family, adapters, device = trained_subject(options.run, options.device)
    if not has_word(options.prompt, config.identifier):
        said(f"the prompt lacks {config.identifier!r}, the run's word for its subject: {options.prompt!r}")
    adapters.set(ADAPTER, options.scale)
    for name in ("resolution", "inference_steps", "guidance_scale"):
        if getattr(options, name) is not None:
            setattr(config, name, getattr(options, name))
    family.sizes(config.resolution)  # refuses what the model cannot draw
    folder, written = Path(options.output or f"{options.run}/drawn"), []
    for seed in range(options.seed, options.seed + options.count):
        image = draw(family, config, options.prompt, seed, device)
        file = folder / f"{file_name(options.prompt)}-seed{seed}-scale{options.scale:g}.png"
        write_atomically(file, lambda out, image=image: image.save(out, "png"))
        written.append(file)
    return written
