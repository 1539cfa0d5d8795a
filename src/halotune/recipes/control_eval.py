"""`halotune eval control`: whether the pictures of a run follow their hints.

    canny       iou, f1: of the edges of the picture and those of the original, the mean over pictures
    landmark    error: mean distance in pixels of 68 points, over pictures with a face; undetected: the share without one
                floor: the detector's own error, on the originals; original_undetected likewise
    segm        aAcc, mAcc, mIoU: of what a segmentation model sees in the pictures, against the labels
                original: the same of what it sees in the originals, which is as good as it gets

base.… are the same figures of what the base alone makes of the prompts, with --base.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import KW_ONLY, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from ..cli.loading import find_device, loadable
from ..core.errors import HalotuneError
from ..report.record import write_record
from .common.run import finite
from .control import ControlConfig
from .control_data import Preparation
from .control_hints import edges
from .control_metrics import Confusion, edge_overlap, landmark_error, mean
from .control_pictures import ControlPictures, Job, draw_control, read_config, split_jobs
from .pictures import read_picture


@dataclass
class ControlEvaluation:
    """Measure how well the pictures of a run follow their hints; those that are missing are drawn first.

    Args:
        run: the run's folder.
        split: of the data.
        data: the folder of the data; by default the run's.
        limit: only so many of the split, at even distances.
        output: where the pictures are, as `halotune generate control` wrote them; by default the run's folder drawn/SPLIT.
        base: also measure what the base alone makes of the prompts.
        segmentation_model: for segm: any of transformers' semantic segmentation, by id or folder.
        void_label: for segm: the label of pixels that do not count.
        count, seed, scale, conditioning_scale, inference_steps, guidance_scale, batch_size: of the pictures that are drawn.
        device: auto takes the accelerator where there is one.
    """

    run: str
    _: KW_ONLY
    split: Literal["train", "val"] = "val"
    data: str | None = None
    limit: int | None = None
    output: str | None = None
    base: bool = False
    segmentation_model: str = "nvidia/segformer-b4-finetuned-ade-512-512"
    void_label: int = 255
    count: int = 1
    seed: int = 0
    scale: float = 1.0
    conditioning_scale: float = 1.0
    inference_steps: int | None = None
    guidance_scale: float | None = None
    batch_size: int = 1
    device: Literal["auto", "cpu"] = "auto"


Judge = Callable[[Sequence[tuple[Job, Image.Image]]], dict[str, Any]]


def evaluate_control(options: ControlEvaluation) -> dict[str, Any]:
    """The figures of a run; also written to evaluation.json in its folder."""
    config = read_config(options.run, data=options.data, device=options.device)
    if config.control == "depth":
        raise HalotuneError("depth has no figures here, as in the paper. Look at the pictures of `generate control`.")
    known = {f.name for f in fields(ControlPictures)} & {f.name for f in fields(ControlEvaluation)}
    drawing = ControlPictures(**{k: v for k, v in asdict(options).items() if k in known})
    judge = _judge(config, options)  # first, so that what it lacks is told before anything is drawn
    draw_control(drawing)
    folder = Path(options.output or f"{options.run}/drawn/{options.split}")
    jobs = split_jobs(drawing, config)

    def judged(kind: str) -> dict[str, Any]:
        files = [(job, folder / kind / f"{job.name}.png") for job in jobs]
        return judge([(job, read_picture(file)) for job, file in files if file.is_file()])

    result: dict[str, Any] = {"control": config.control, "split": options.split, **judged("results")}
    if options.base:
        result["base"] = judged("base")
    result = finite(result)
    write_record(Path(options.run) / "evaluation.json", result)
    return result


def _judge(config: ControlConfig, options: ControlEvaluation) -> Judge:
    preparation = Preparation(config, [])
    if config.control == "canny":
        return lambda drawn: judge_edges(drawn, preparation)
    if config.control == "landmark":
        mesh = preparation.mesh
        return lambda drawn: judge_faces(drawn, preparation, mesh)
    segmenter = Segmenter(options.segmentation_model, find_device(options.device))
    return lambda drawn: judge_labels(drawn, preparation, segmenter, options.void_label)


def beside(preparation: Preparation, image: Image.Image) -> Preparation:
    """The originals, labels and landmarks in the size of a picture."""
    own = copy(preparation)
    own.sizes = [(image.height, image.width)]
    return own


def judge_edges(drawn: Sequence[tuple[Job, Image.Image]], preparation: Preparation) -> dict[str, Any]:
    pairs = [edge_overlap(edges(beside(preparation, image).picture(job.pair)), edges(image)) for job, image in drawn]
    return {"pictures": len(pairs), "iou": mean(p[0] for p in pairs), "f1": mean(p[1] for p in pairs)}


def judge_faces(drawn: Sequence[tuple[Job, Image.Image]], preparation: Preparation, mesh: Any) -> dict[str, Any]:
    """Where a row has no landmarks, those that the detector finds in the original stand for them, and its error is 0."""
    errors, floor, undetected, unknown = [], [], 0, 0
    for job, image in drawn:
        own = beside(preparation, image)
        truth = own.points(job.pair)
        if truth is None:
            unknown += 1
            continue
        original, found = mesh(own.picture(job.pair)), mesh(image)
        floor += [] if original is None else [landmark_error(original, truth)]
        if found is None:
            undetected += 1
        else:
            errors.append(landmark_error(found, truth))
    judged = len(drawn) - unknown
    return {
        "pictures": judged,
        "error": mean(errors),
        "undetected": undetected / judged if judged else None,
        "floor": mean(floor),
        "original_undetected": (judged - len(floor)) / judged if judged else None,
        **({"without_landmarks": unknown} if unknown else {}),
    }


def judge_labels(
    drawn: Sequence[tuple[Job, Image.Image]], preparation: Preparation, segmenter: Segmenter, void: int
) -> dict[str, Any]:
    seen, original = Confusion(segmenter.classes, void), Confusion(segmenter.classes, void)
    for job, image in drawn:
        own = beside(preparation, image)
        labels = own.labels(job.pair)
        strange = labels[(labels != void) & (labels >= segmenter.classes)]
        if strange.size:
            raise HalotuneError(
                f"{job.pair.labels}: has label {int(strange.max())}, but {segmenter.source} knows {segmenter.classes} classes. "
                "Give the --segmentation-model of these labels, or their --void-label."
            )
        seen.add(labels, segmenter(image))
        original.add(labels, segmenter(own.picture(job.pair)))
    return {"pictures": len(drawn), **seen.figures(), "original": original.figures()}


class Segmenter:
    """A semantic segmentation model of transformers: a picture -> the class of every pixel, `(h, w)`."""

    def __init__(self, source: str, device: torch.device) -> None:
        from transformers import (
            AutoConfig,
            AutoImageProcessor,
            AutoModelForSemanticSegmentation,
            AutoModelForUniversalSegmentation,
        )

        self.source = source
        with loadable("the segmentation model", source):
            config = AutoConfig.from_pretrained(source)
            universal = type(config) in AutoModelForUniversalSegmentation._model_mapping
            kind: Any = AutoModelForUniversalSegmentation if universal else AutoModelForSemanticSegmentation
            self.model: Any = kind.from_pretrained(source).to(device).eval()
            self.processor: Any = AutoImageProcessor.from_pretrained(source)
        self.classes = int(self.model.config.num_labels)

    def __call__(self, image: Image.Image) -> np.ndarray:
        inputs = self.processor(images=image, return_tensors="pt").to(self.model.device)
        with torch.no_grad():
            found = self.model(**inputs)
        (classes,) = self.processor.post_process_semantic_segmentation(found, target_sizes=[(image.height, image.width)])
        return classes.cpu().numpy().astype(np.int64)
