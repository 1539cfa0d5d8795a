"""`halotune train control`: teach an image model to follow hints - edges, landmarks, label maps, depth - with an adapter.

    train_control(ControlConfig(model="stable-diffusion-v1-5/stable-diffusion-v1-5", control="canny", data="data/coco"))

A small encoder of hints is trained beside the adapter; what it makes of a hint is added after the UNet's first convolution.
Reads from top to bottom: configuration, loss, training, pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor
from transformers import set_seed

from ..core.files import write_atomically
from ..core.generators import forked_generators
from .common.config import RunConfig
from .common.dry_run import dry_run as show_dry_run
from .common.run import Run, said
from .common.trainer import arguments
from .control_data import Pair, Preparation, Preparer, as_text, collate, evenly, has_split, read_pairs
from .control_model import ENCODER, ControlEncoder, Controlled, new_control
from .diffusion import TARGETS, load_family
from .pipeline_trainer import Denoiser, PipelineTrainer, adapt

EPOCHS = {"segm": 20.0, "canny": 11.0, "landmark": 20.0, "depth": 11.0}  # of the paper's code, by data set
EVALUATIONS = 4  # in a run of so many steps, where nothing else is said
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"learning_rate": 3e-5, "encoder_learning_rate": 3e-5, "batch_size": 64},
    "paper-code": {"learning_rate": 9e-4, "encoder_learning_rate": 9e-4, "batch_size": 64},
}


@dataclass(kw_only=True)
class ControlConfig(RunConfig):
    """Teach a diffusion pipeline with a UNet to follow hints: edges, landmarks of faces, label maps, depth.

    Args:
        control: what the hints are.
        data: a folder with a row for each picture in prompts.jsonl or metadata.jsonl, or laid out by `halotune data`.
        palette: of label maps without one: ade20k, voc, or a JSON file with [[r, g, b], …]; by default voc.
        resolution: of the pictures, in pixels; by default what the model was made for.
        aspect: bring pictures to one of several shapes, the nearest, instead of cutting squares.
        flip: also learn from the mirror images.
        targets: the layers that are adapted, where `adapter.target_modules` does not say; each adds to the one before:
            attention, the first layer of the feed-forward parts, both of them, convolutions.
        train_text_encoder: adapt the attention of the text encoders, too.
        encoder_learning_rate: of the encoder of hints; by default the preset's, else 1e-3.
        empty_prompts: share of the prompts that are replaced by the empty one, which guidance starts from.
        min_snr: γ of the weights min(SNR, γ) / SNR of the loss, such as 5; 0 for none.
        ema: decay of an average over the steps, such as 0.999, which is what is kept; 0 for none.
        cache: where latents, hints and embeddings of prompts are kept; by default runs/.cache.
        validation_count: pictures that are drawn as it trains.
        evaluation_count: pictures that the loss is measured on.
        inference_steps: of the pictures drawn, by DDIM.
        guidance_scale: of the pictures drawn.
        preset: learning rate and batch size of the HRA paper, or of its authors' scripts; flags win over them.
    """

    control: Literal["canny", "landmark", "segm", "depth"]
    data: str
    palette: str | None = None
    resolution: int | None = None
    aspect: bool = False
    flip: bool = False
    targets: Literal["attention", "geglu", "feed-forward", "convolutions"] = "geglu"
    train_text_encoder: bool = False
    encoder_learning_rate: float | None = None
    empty_prompts: float = 0.0
    min_snr: float = 0.0
    ema: float = 0.0
    cache: str = "runs/.cache"
    validation_count: int = 4
    evaluation_count: int = 64
    inference_steps: int = 50
    guidance_scale: float = 9.0
    preset: Literal["paper", "paper-code"] | None = None
    batch_size: int | None = None  # type: ignore[assignment]
    schedule: str = "constant"

    RECIPE: ClassVar[str] = "control"
    TARGETS: ClassVar[str] = TARGETS["geglu"]
    WARMUP: ClassVar[float] = 0.0
    RATE: ClassVar[float] = 0.1

    @property
    def name(self) -> str:
        return f"control-{self.control}-{self.method}"

    def fill(self) -> None:
        self.fill_in(**PRESETS.get(self.preset or "", {}))
        self.fill_in(batch_size=8, encoder_learning_rate=1e-3, epochs=EPOCHS[self.control])
        if self.max_steps:
            self.fill_in(evaluate_every=max(self.max_steps // EVALUATIONS, 1))
        self.fill_in(save_every=self.evaluate_every)
        if self.adapter.target_modules == self.TARGETS:  # type: ignore[union-attr]
            self.adapter.target_modules = TARGETS[self.targets]  # type: ignore[union-attr]

    def check(self) -> None:
        for name in ("validation_count", "evaluation_count", "inference_steps"):
            self.require(name, getattr(self, name) >= 1, "must be at least 1", "Use a whole number such as 4.")
        for name in ("min_snr", "guidance_scale"):
            self.require(name, getattr(self, name) >= 0, "must not be negative", "Use 0 for none.")
        self.require(
            "resolution", self.resolution is None or self.resolution >= 1, "must be at least 1", "Use for example 512."
        )
        self.require(
            "encoder_learning_rate", (self.encoder_learning_rate or 0) > 0, "must be above 0", "Use a positive number."
        )
        self.require("ema", 0 <= self.ema < 1, "must be from 0 to below 1", "Use a decay such as 0.999.")
        self.require("empty_prompts", 0 <= self.empty_prompts <= 1, "must be from 0 to 1", "Use a share such as 0.1.")


# -- the loss


class ControlledDenoiser(Denoiser):
    """The models that are trained: examples with hints -> their loss."""

    def __init__(self, controlled: Controlled, family: Any, config: ControlConfig, empty: Mapping[str, Tensor]) -> None:
        super().__init__(family, config)
        self.controlled, self.encoder, self.empty = controlled, controlled.encoder, empty

    def errors(self, group: Sequence[Mapping[str, Any]]) -> Tensor:
        """As without hints, of a UNet that has them; some of the prompts are empty."""
        if self.training and self.settings.empty_prompts:
            left_out = torch.rand(len(group)) < self.settings.empty_prompts
            device = group[0]["mean"].device
            empty = {"text": {k: v.to(device) for k, v in self.empty.items()}, "caption": ""}
            group = [{**e, **empty} if out else e for e, out in zip(group, left_out.tolist(), strict=True)]
        with self.controlled.adding(self.encoder(torch.cat([e["hint"] for e in group]))):
            return super().errors(group)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        trained, everything = super().get_nb_trainable_parameters()
        own = sum(p.numel() for p in self.encoder.parameters())
        return trained + own, everything + own


# -- the training


class ControlTrainer(PipelineTrainer):
    """Saves the encoder of hints beside the adapters, has a learning rate for it, and draws pictures as it evaluates."""

    model: ControlledDenoiser  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, *args: Any, shown: Sequence[Pair], preparation: Preparation, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shown, self.preparation = shown, preparation

    def create_optimizer(self, model: Any = None) -> Any:
        there = self.optimizer is not None
        optimizer: Any = super().create_optimizer(model)
        if not there:
            own = {id(p) for p in self.model.encoder.parameters()}
            for group in list(optimizer.param_groups):
                moved = [p for p in group["params"] if id(p) in own]
                group["params"] = [p for p in group["params"] if id(p) not in own]
                if moved:
                    optimizer.add_param_group({**group, "params": moved, "lr": self.config.encoder_learning_rate})
        return optimizer

    def save_parts(self, folder: Path) -> None:
        super().save_parts(folder)
        self.model.encoder.save_pretrained(folder / ENCODER)

    def load_parts(self, folder: Path) -> None:
        super().load_parts(folder)
        saved = ControlEncoder.from_pretrained(folder / ENCODER, low_cpu_mem_usage=False)
        self.model.encoder.load_state_dict(saved.state_dict())  # type: ignore[union-attr]

    # -- pictures

    def draw(self) -> None:
        """pictures/STEP/NUMBER.png of the hints of `shown`; and the gallery of the run's page, hint | target | drawn."""
        if not self.is_world_process_zero():
            return
        step = self.state.global_step
        self.draw_row(f"{step:06}", conditioning_scale=1.0)
        steps = sorted(f.name for f in (self.run.folder / "pictures").iterdir() if f.name.isdigit() and int(f.name) <= step)
        columns = {"hint": "hint", "target": "target", "base": "base"} | {name: f"step {int(name)}" for name in steps}
        rows = [
            {"label": f"{pair.prompt} · {pair.name}", "images": [f"pictures/{column}/{i}.png" for column in columns]}
            for i, pair in enumerate(self.shown)
        ]
        self.run.write("gallery.json", {"columns": list(columns.values()), "rows": rows, "shared": 3})

    def draw_base(self) -> None:
        """pictures/hint, pictures/target, and what the base alone makes of the prompts, in pictures/base."""
        if not self.is_world_process_zero():
            return
        for i, pair in enumerate(self.shown):
            self.write_picture("hint", i, self.preparation.hint(pair))
            self.write_picture("target", i, self.preparation.picture(pair))
        with self.adapters.disabled():
            self.draw_row("base", conditioning_scale=0.0)

    def draw_row(self, column: str, conditioning_scale: float) -> None:
        from .control_pictures import draw_controlled

        for i, pair in enumerate(self.shown):
            (image,) = draw_controlled(
                self.model.controlled,
                [pair.prompt],
                [self.preparation.hint(pair)],
                [i],
                conditioning_scale=conditioning_scale,
                inference_steps=self.config.inference_steps,
                guidance_scale=self.config.guidance_scale,
                device=self.args.device,
            )
            self.write_picture(column, i, image)

    def write_picture(self, column: str, number: int, image: Image.Image) -> None:
        file = self.run.folder / "pictures" / column / f"{number}.png"
        write_atomically(file, lambda out: image.save(out, "png"))


def train_control(config: ControlConfig, *, dry_run: bool = False, command: str | None = None) -> dict[str, Any]:
    """Train, draw, and write the run's folder; what run.json holds.

    A run that was interrupted goes on at its last checkpoint; a finished one is left as it is.

    Args:
        dry_run: show what would be done and what two steps cost, and write nothing but the cache.
        command: what run.json says the user typed.
    """
    run = Run(config, command)
    if not dry_run and run.left_alone():
        return run.record
    left_out: list[str] | None = [] if config.skip_bad_rows else None
    pairs = read_pairs(config.data, "train", config.control, left_out)
    held_out = has_split(config.data, "val")
    validation = read_pairs(config.data, "val", config.control, left_out) if held_out else pairs
    if not held_out:
        said(f"{config.data}: has no val split, so evaluations are on pictures of the training.")
    family = load_family(config)
    controlled = new_control(family.pipe, config.control, config.seed)
    args = arguments(config, run, include_num_input_tokens_seen="no", remove_unused_columns=False)
    if not config.quant:
        family.model.to(args.device)
    preparer = Preparer(family, config, args.device)
    train, problems = preparer.examples(pairs, "training")
    evaluation, more = preparer.examples(evenly(validation, config.evaluation_count), "validation")
    run.same_data(train.contents, evaluation.contents)
    set_seed(config.seed)  # of the adapter
    adapters = adapt(family, config)
    model = ControlledDenoiser(controlled, family, config, preparer.text(""))
    trainer = ControlTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=collate,
        run=run,
        adapters=adapters,
        shown=[entry[0] for entry in evenly(evaluation.entries, config.validation_count)],
        preparation=preparer.preparation,
    )
    if dry_run:
        show_dry_run(run, trainer, as_text)
        return run.record
    with run.open():
        run.update(pictures={"train": len(train), "validation": len(evaluation)}, pipeline=type(family.pipe).__name__)
        run.update(skipped=[*(left_out or []), *problems, *more])
        if run.last_checkpoint()[0] is None:
            with forked_generators(args.device):
                trainer.draw_base()
        trainer.train_run()
        if not any(line["step"] == trainer.state.global_step for line in run.metrics() if "evaluation" in line):
            trainer.evaluate()
        losses = [line["evaluation"]["loss"] for line in run.metrics() if "evaluation" in line]
        trainer.finish({"evaluation_loss": losses[-1], "least_evaluation_loss": min(losses)})
    return run.record
