"""`halotune train subject`: teach an image model one subject from a few pictures (DreamBooth), with an adapter.

    train_subject(SubjectConfig(model="stable-diffusion-v1-5/stable-diffusion-v1-5", subject="my_dog", class_word="dog"))

The pictures are captioned with a rare word before the class's; pictures of the class that the base itself makes keep it
from forgetting what others of the class look like. Reads from top to bottom: configuration, data, loss, training, pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers.utils.pil_utils import make_image_grid
from transformers import set_seed

from ..core.files import write_atomically
from ..core.generators import forked_generators
from .common.config import RunConfig
from .common.dry_run import dry_run as show_dry_run
from .common.run import Run, said
from .common.trainer import arguments
from .diffusion import LORAS, TARGETS, draw, export, load_family
from .pictures import ENDINGS
from .pipeline_trainer import Denoiser, PipelineTrainer, adapt, share
from .subject_data import (
    Encoder,
    Examples,
    as_text,
    class_pictures,
    collate,
    contents,
    find_pictures,
    has_word,
    show_subject,
    unused_files,
)

ADAPTER = "subject"
STEPS = 1000
EVALUATIONS = 4  # in a run, where nothing else is said
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"learning_rate": 7e-6, "max_steps": 2000},
    "paper-code": {"learning_rate": 1e-4, "max_steps": 2005},
}


@dataclass(kw_only=True)
class SubjectConfig(RunConfig):
    """Teach a diffusion pipeline a subject from a few pictures (DreamBooth).

    Args:
        subject: a folder with pictures; beside `NAME.jpg` may lie its caption, `NAME.txt`, and its mask, `masks/NAME.png`.
        class_word: what the subject is, such as dog.
        suite: dreambooth trains every subject of a data set in DreamBooth's layout; `subject` is its folder then.
        class_index, prompt_index: of the suite, only the subject, or the prompt, of this number.
        paper_code: of the suite, one training for each prompt, as the HRA paper's code does; else one for each subject.
        shard: of the suite, the i-th of n shares of the trainings, as i/n, from 0.
        identifier: the rare word that stands for the subject.
        prompt: of pictures without a caption; by default "a photo of IDENTIFIER CLASS".
        class_prompt: of the class; by default "a photo of CLASS".
        prior_weight: of the loss on pictures of the class; 0 for none.
        class_images: how many of them; those that are missing are made by the base.
        class_folder: where they are; by default runs/class_images/, in a folder for each model and prompt.
        pipeline_config: where `model` is one file, a pipeline's folder or id with its configuration; by default as it tells.
        resolution: of the pictures, in pixels; by default what the model was made for.
        aspect: bring pictures to one of several shapes, the nearest, instead of cutting squares.
        flip: also learn from the mirror images.
        mask_background: where a picture has a mask, the weight of the loss outside of it.
        targets: the layers that are adapted, where `adapter.target_modules` does not say; each adds to the one before.
        train_text_encoder: adapt the attention of the text encoders, too.
        min_snr: γ of the weights min(SNR, γ) / SNR of the loss, such as 5; 0 for none.
        ema: decay of an average over the adapter's steps, such as 0.99, which is what is kept; 0 for none.
        cache: where latents and embeddings of prompts are kept; by default runs/.cache.
        also: write the adapter as a LoRA, too: lora for diffusers' load_lora_weights, kohya for ComfyUI and A1111; or both,
            as lora,kohya.
        validation_prompts: what is drawn as it trains; by default `prompt`.
        validation_seeds: pictures of each prompt.
        inference_steps: of the pictures drawn.
        guidance_scale: of the pictures drawn.
        preset: learning rate and steps of the HRA paper, or of its authors' scripts; flags win over them.
    """

    subject: str
    class_word: str | None = None
    suite: Literal["dreambooth"] | None = None
    class_index: int | None = None
    prompt_index: int | None = None
    paper_code: bool = False
    shard: str = "0/1"
    identifier: str = "qwe"
    prompt: str | None = None
    class_prompt: str | None = None
    prior_weight: float = 1.0
    class_images: int = 200
    class_folder: str | None = None
    pipeline_config: str | None = None
    resolution: int | None = None
    aspect: bool = False
    flip: bool = False
    mask_background: float = 0.0
    targets: Literal["attention", "feed-forward", "convolutions"] = "attention"
    train_text_encoder: bool = False
    min_snr: float = 0.0
    ema: float = 0.0
    cache: str = "runs/.cache"
    also: str = ""
    validation_prompts: list[str] | None = None
    validation_seeds: int = 2
    inference_steps: int = 25
    guidance_scale: float = 7.5
    preset: Literal["paper", "paper-code"] | None = None
    batch_size: int = 1
    schedule: str = "constant"
    evaluate_every: int | None = None

    RECIPE: ClassVar[str] = "subject"
    TARGETS: ClassVar[str] = TARGETS["attention"]
    WARMUP: ClassVar[float] = 0.0
    RATE: ClassVar[float] = 0.1

    @property
    def name(self) -> str:
        return f"subject-{Path(self.subject).name}-{self.method}"

    def fill(self) -> None:
        self.fill_in(**PRESETS.get(self.preset or "", {}))
        if self.epochs is None:
            self.fill_in(max_steps=STEPS)
        if self.max_steps:
            self.fill_in(evaluate_every=max(self.max_steps // EVALUATIONS, 1))
        self.fill_in(save_every=self.evaluate_every)
        if self.adapter.target_modules == self.TARGETS:  # type: ignore[union-attr]
            self.adapter.target_modules = TARGETS[self.targets]  # type: ignore[union-attr]
        if self.class_word:
            self.fill_in(prompt=f"a photo of {self.identifier} {self.class_word}", class_prompt=f"a photo of {self.class_word}")
            self.fill_in(validation_prompts=[self.prompt])

    def check(self) -> None:
        for name in ("class_images", "validation_seeds", "inference_steps"):
            self.require(name, getattr(self, name) >= 1, "must be at least 1", "Use a whole number such as 4.")
        for name in ("prior_weight", "min_snr", "guidance_scale"):
            self.require(name, getattr(self, name) >= 0, "must not be negative", "Use 0 for none.")
        self.require(
            "resolution", self.resolution is None or self.resolution >= 1, "must be at least 1", "Use for example 512."
        )
        self.require("ema", 0 <= self.ema < 1, "must be from 0 to below 1", "Use a decay such as 0.99.")
        self.require("mask_background", 0 <= self.mask_background <= 1, "must be from 0 to 1", "Use 0 for none.")
        self.require("shard", bool(share(self.shard)), "expected i/n with 0 ≤ i < n", "Use for example 0/4.")
        known = set(filter(None, self.also.split(","))) <= LORAS.keys()
        self.require("also", known, f"expected some of {', '.join(LORAS)}", f"Write for example {','.join(LORAS)}.")
        self.require("identifier", bool(self.identifier.strip()), "is needed", "Use a rare word such as qwe.")
        if self.suite:
            for name in ("class_word", "prompt", "class_prompt", "validation_prompts"):
                self.require(name, getattr(self, name) is None, "is each subject's own in a suite", "Leave it out.")
        else:
            for name, usual in (("class_index", None), ("prompt_index", None), ("paper_code", False), ("shard", "0/1")):
                self.require(name, getattr(self, name) == usual, "is of a suite", "Add --suite dreambooth, or leave it out.")
            self.require("class_word", bool(self.class_word), "is needed", "Say what the subject is, such as dog.")
            self.require("prompt", has_word(self.prompt, self.identifier), f"lacks {self.identifier!r}", "Put it in.")


# -- the training


class SubjectTrainer(PipelineTrainer):
    """Draws pictures of the prompts where others evaluate."""

    config: SubjectConfig

    def draw(self) -> None:
        """pictures/STEP/PROMPT-SEED.png, their grid beside, and the gallery of the run's page."""
        if not self.is_world_process_zero():
            return
        config, folder = self.config, self.run.folder / "pictures"
        prompts = config.validation_prompts or []
        drawn = []
        for i, prompt in enumerate(prompts):
            for seed in range(config.validation_seeds):
                image = draw(self.model.family, config, prompt, seed, self.args.device)
                file = folder / f"{self.state.global_step:06}" / f"{i}-{seed}.png"
                write_atomically(file, lambda out, image=image: image.save(out, "png"))
                drawn.append(image)
        grid = make_image_grid(drawn, len(prompts), config.validation_seeds)
        write_atomically(folder / f"{self.state.global_step:06}.png", lambda out: grid.save(out, "png"))
        steps = sorted(f.name for f in folder.iterdir() if f.is_dir() and int(f.name) <= self.state.global_step)
        real = [f"subject/{i}.png" for i in range(show_subject(config, self.model.family, self.run.folder / "subject"))]
        rows = [
            {
                "label": f"{prompt} · seed {seed}",
                "images": [real[seed % len(real)], *(f"pictures/{s}/{i}-{seed}.png" for s in steps)],
            }
            for i, prompt in enumerate(prompts)
            for seed in range(config.validation_seeds)
        ]
        heads = ["subject", *("base" if int(step) == 0 else f"step {int(step)}" for step in steps)]
        self.run.write("gallery.json", {"columns": heads, "rows": rows, "shared": 2})


def train_subject(config: SubjectConfig, *, dry_run: bool = False, command: str | None = None) -> dict[str, Any]:
    """Train, draw, and write the run's folder; what run.json holds. Of a suite, all its runs; its record.

    A run that was interrupted goes on at its last checkpoint; a finished one is left as it is.

    Args:
        dry_run: show what would be done and what two steps cost, and write nothing but the cache.
        command: what run.json says the user typed.
    """
    if config.suite:
        from .dreambooth import train_suite

        return train_suite(config, train_subject, dry_run=dry_run, command=command)
    run = Run(config, command)
    if not dry_run and run.left_alone():
        return run.record
    pictures = find_pictures(config.subject, str(config.prompt), config.identifier)
    run.same_data(contents(pictures))
    if unused := unused_files(config.subject, pictures):
        said(f"{config.subject}: neither pictures ({', '.join(ENDINGS)}) nor their captions, so not used: {', '.join(unused)}")
    family = load_family(config)
    args = arguments(config, run, include_num_input_tokens_seen="no", remove_unused_columns=False, data_seed=config.seed)
    if not config.quant:
        family.model.to(args.device)
    encoder = Encoder(family, config, args.device)
    subject = encoder.examples(pictures, prior=False)
    prior: list[dict[str, Any]] = []
    if config.prior_weight:
        of_class = class_pictures(config, family, args.device, make=not dry_run)
        prior = encoder.examples(of_class, prior=True) or [example | {"prior": True} for example in subject]
    set_seed(config.seed)  # of the adapter
    adapters = adapt(family, config)
    model = Denoiser(family, config)
    trainer = SubjectTrainer(
        model=model,
        args=args,
        train_dataset=Examples(subject, prior),
        eval_dataset=Examples(subject),
        data_collator=collate,
        run=run,
        adapters=adapters,
    )
    if dry_run:
        show_dry_run(run, trainer, as_text)
        return run.record
    with run.open():
        run.update(
            pictures={"subject": len(pictures), "class": len(prior)},
            pipeline=type(family.pipe).__name__,
        )
        if run.last_checkpoint()[0] is None:
            with forked_generators(args.device):
                trainer.draw()  # what the base makes of the prompts
        if args.process_index:
            torch.manual_seed(config.seed + args.process_index)  # noise of its own; the order of the data is data_seed's
        trainer.train_run()
        if not any(line["step"] == trainer.state.global_step for line in run.metrics() if "evaluation" in line):
            trainer.evaluate()
        with trainer.averaged():
            export(run, family, [name for name in config.also.split(",") if name])
        losses = [line["evaluation"]["loss"] for line in run.metrics() if "evaluation" in line]
        trainer.finish({"evaluation_loss": losses[-1], "least_evaluation_loss": min(losses)})
    return run.record
