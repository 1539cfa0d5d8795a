"""`halotune eval subject`: how like its subject, its prompts and its base the pictures of a run are.

    dino, dinov2, clip_i    mean cosine of all real and all drawn pictures; efficientnet-lite likewise
    clip_t                  mean cosine of a picture and the prompt that it was drawn from
    NAME_drift              mean (1 − cosine) / 2 of the run's and the base's pictures of prompts without the subject
    lpips_fidelity          mean distance of real and drawn pictures: less is more alike
    lpips_diversity         mean distance of the pictures drawn from one prompt: more is more varied

base.… are the same figures of the base model's own pictures of the same prompts, the identifier included.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..cli.loading import find_device
from ..core.errors import HalotuneError
from ..core.files import write_atomically
from ..report.record import write_record
from .common.run import FINISHED, configuration, read_run, said
from .diffusion import Family, draw
from .pictures import file_name, read_picture
from .scorers import DISTANCES, IMAGE_SCORERS, load_scorers, similarity
from .subject import ADAPTER, SubjectConfig
from .subject_data import find_pictures
from .subject_pictures import trained_subject

DRIFT_PROMPTS = (
    "a photo of a red bicycle",
    "a bowl of fruit on a table",
    "a mountain lake in the morning",
    "a street at night",
    "a wooden chair in a garden",
    "an old stone bridge",
    "a sailing boat at sea",
    "a cup of coffee",
    "a field of tulips",
    "a portrait of an old man",
)


@dataclass
class SubjectEvaluation:
    """Compare what a run draws with its subject, its prompts and the base model.

    Args:
        run: a run's folder, or a folder of runs such as that of a suite.
        scorers: some of dino, dinov2, clip, efficientnet-lite and lpips, with commas; NAME=ID or NAME=FOLDER for another
            network of the same kind.
        prompts: what is drawn; by default the run's validation prompts.
        drift_prompts: prompts that have nothing to do with the subject; by default ten.
        count: pictures of each prompt.
        paper_code: judge the pictures that were drawn in training instead, and report the step that the authors' code would:
            the one with the greatest sum of its figures, each divided by its range over the steps.
        device: auto takes the accelerator where there is one.
    """

    run: str
    _: KW_ONLY
    scorers: str = "dino,dinov2,clip"
    prompts: list[str] | None = None
    drift_prompts: list[str] | None = None
    count: int = 4
    paper_code: bool = False
    device: Literal["auto", "cpu"] = "auto"


def evaluate_subject(options: SubjectEvaluation) -> dict[str, Any]:
    """Of one run its figures; of several each one's, and the mean over all. Written to evaluation.json beside the runs."""
    root = Path(options.run)
    runs = [root] if (root / "run.json").is_file() else sorted(f.parent for f in root.glob("*/run.json"))
    runs = [run for run in runs if (read_run(run) or {}).get("recipe") == SubjectConfig.RECIPE]
    if not runs:
        raise HalotuneError(f"{root}: holds no run of `halotune train subject`. Give a run's folder, or a folder of runs.")
    if unfinished := [str(run) for run in runs if (read_run(run) or {}).get("status") != FINISHED]:
        raise HalotuneError(f"{', '.join(unfinished)}: not finished. The command that began a run goes on with it.")
    if options.count < 1:
        raise HalotuneError(f"count: must be at least 1; got {options.count}. Use 4.")
    scorers = load_scorers(options.scorers, find_device(options.device))
    judged = judge_steps if options.paper_code else judge_run
    found = {run.name: judged(run, options, scorers) for run in runs}
    if runs == [root]:
        return found[root.name]
    result = {"subjects": found, "mean": mean_over(list(found.values()))}
    write_record(root / "evaluation.json", result)
    return result


def judge_run(run: Path, options: SubjectEvaluation, scorers: Mapping[str, Any]) -> dict[str, Any]:
    """Draw with the adapter and without, and compare."""
    config, family, adapters, device = trained_subject(run, options.device)
    real = [read_picture(p.file) for p in find_pictures(config.subject, "")]
    prompts = options.prompts or config.validation_prompts or [str(config.prompt)]
    unrelated = options.drift_prompts or list(DRIFT_PROMPTS)

    def drawn(kind: str, texts: Sequence[str], count: int) -> list[list[Image.Image]]:
        folder = run / "evaluation" / kind
        return [[_picture(folder, family, config, text, seed, device) for seed in range(count)] for text in texts]

    adapters.set(ADAPTER, 1.0)
    own, drifted = drawn("run", prompts, options.count), drawn("run", unrelated, 1)
    with adapters.disabled():
        base, kept = drawn("base", prompts, options.count), drawn("base", unrelated, 1)
    result: dict[str, Any] = figures(scorers, real, own, prompts)
    for name in scorers.keys() & IMAGE_SCORERS.keys():
        a, b = (scorers[name].embed([p for group in groups for p in group]) for groups in (drifted, kept))
        result[f"{_field(name)}_drift"] = ((1 - (a * b).sum(-1)) / 2).mean().item()
    result["base"] = figures(scorers, real, base, prompts)
    write_record(run / "evaluation.json", result)
    return result


def _picture(folder: Path, family: Family, config: SubjectConfig, text: str, seed: int, device: torch.device) -> Image.Image:
    """One picture; drawn once, and read from then on."""
    file = folder / f"{file_name(text)}-seed{seed}.png"
    if not file.is_file():
        image = draw(family, config, text, seed, device)
        write_atomically(file, lambda out: image.save(out, "png"))
    return read_picture(file)


def figures(
    scorers: Mapping[str, Any], real: Sequence[Image.Image], drawn: Sequence[Sequence[Image.Image]], prompts: Sequence[str]
) -> dict[str, float]:
    """The figures of pictures, in one group for each prompt. Black ones, which a safety checker leaves, are out."""
    groups = [[p for p in group if np.asarray(p).any()] for group in drawn]
    pictures = [p for group in groups for p in group]
    if not pictures:
        raise HalotuneError("all pictures are black, so there is nothing to compare. Draw them with another seed or precision.")
    out: dict[str, float] = {}
    for name, scorer in scorers.items():
        if name in DISTANCES:
            out[f"{name}_fidelity"] = scorer.distance(real, pictures).mean().item()
            pairs = [_off_diagonal(scorer.distance(group, group)) for group in groups if len(group) > 1]
            if pairs:
                out[f"{name}_diversity"] = torch.cat(pairs).mean().item()
            continue
        embedded = scorer.embed(pictures)
        field = "clip_i" if name == "clip" else _field(name)
        out[field] = similarity(scorer.embed(real), embedded).mean().item()
        if name == "clip":
            texts = scorer.embed_texts(prompts)
            owners = torch.tensor([i for i, group in enumerate(groups) for _ in group])
            out["clip_t"] = (embedded * texts[owners]).sum(-1).mean().item()
    return out


def _field(name: str) -> str:
    return name.replace("-", "_")


def _off_diagonal(distances: Tensor) -> Tensor:
    return distances[~torch.eye(len(distances), dtype=torch.bool)]


def judge_steps(run: Path, options: SubjectEvaluation, scorers: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of the step that `best_step` chooses, and of all steps."""
    record = read_run(run) or {}
    config = SubjectConfig(**configuration(record))
    real = [read_picture(p.file) for p in find_pictures(config.subject, "")]
    prompts = config.validation_prompts or [str(config.prompt)]
    steps, seeds = {}, range(config.validation_seeds)
    for folder in sorted(f for f in (run / "pictures").glob("*") if f.is_dir() and f.name.isdigit() and int(f.name) > 0):
        groups = [[read_picture(folder / f"{i}-{seed}.png") for seed in seeds] for i in range(len(prompts))]
        steps[int(folder.name)] = figures(scorers, real, groups, prompts)
    if not steps:
        raise HalotuneError(f"{run / 'pictures'}: holds no pictures of a step after the start. Train with --evaluate-every.")
    chosen = best_step(steps)
    result = steps[chosen] | {"step": chosen, "steps": {str(step): found for step, found in steps.items()}}
    write_record(run / "evaluation_steps.json", result)
    said(f"{run}: step {chosen} of {', '.join(map(str, steps))}")
    return result


def best_step(steps: Mapping[int, Mapping[str, float]]) -> int:
    """The authors' choice: argmax over steps of the sum of figures, each over its range; one that never changes counts nothing.

    Their LPIPS, of real and drawn pictures, counts as better where it is greater; here that is `lpips_fidelity`.
    """
    names = [n for n in next(iter(steps.values())) if n != "lpips_diversity"]
    ranges = {n: max(s[n] for s in steps.values()) - min(s[n] for s in steps.values()) for n in names}
    return max(steps, key=lambda step: sum(steps[step][n] / ranges[n] for n in names if ranges[n]))


def mean_over(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of every figure that all have, the mean over subjects."""
    out: dict[str, Any] = {}
    for name, value in results[0].items():
        values = [r[name] for r in results if name in r]
        if isinstance(value, Mapping):
            if name != "steps":
                out[name] = mean_over(values)
        elif len(values) == len(results):
            out[name] = statistics.fmean(values)
    return out
