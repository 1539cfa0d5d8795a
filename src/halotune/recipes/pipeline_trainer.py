"""How recipes train the adapters of a diffusion pipeline: the loss, whole checkpoints, an average over the steps."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Trainer, TrainerCallback

from ..core.errors import HalotuneError
from ..core.files import WEIGHTS_NAME
from ..core.generators import forked_generators
from ..engine.files.state_dict import read_tensors, set_peft_model_state_dict
from ..integrations.diffusers import PipelineAdapters
from .common.trainer import RunTrainerMixin
from .diffusion import TEXT_TARGETS, Family


def share(text: str) -> tuple[int, int] | None:
    """i/n as numbers; None where it is none."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    return (int(found[1]), int(found[2])) if found and int(found[1]) < int(found[2]) else None


def adapted_models(family: Family) -> list[str]:
    """The models of a pipeline that its only adapter is in, by name."""
    (names,) = PipelineAdapters(family.pipe).names.values()
    return list(names)


class Denoiser(nn.Module):
    """The models that are trained, as the Trainer takes them: examples -> their loss."""

    def __init__(self, family: Family, config: Any) -> None:
        super().__init__()
        self.family, self.settings = family, config
        self.parts = nn.ModuleDict({name: getattr(family.pipe, name) for name in adapted_models(family)})

    def forward(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Subject's mean squared error + prior weight × that of the class; pictures of one size go through together."""
        groups: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
        for example in examples:
            shapes = {k: v.shape for k, v in example["text"].items()}
            groups[tuple(example["mean"].shape), str(shapes)].append(example)
        errors: dict[bool, list[Tensor]] = {False: [], True: []}
        for group in groups.values():
            for example, error in zip(group, self.errors(group), strict=True):
                errors[example["prior"]].append(error)
        loss = torch.stack(errors[False]).mean()
        if errors[True]:
            loss = loss + self.settings.prior_weight * torch.stack(errors[True]).mean()
        return {"loss": loss}

    def errors(self, group: Sequence[Mapping[str, Any]]) -> Tensor:
        """Of each example the mean squared error, over what its mask marks, times the weight of its time: `(n,)`."""
        family = self.family
        mean, deviation, mask = (torch.cat([e[k] for e in group]) for k in ("mean", "deviation", "mask"))
        latents = family.normalized(mean + deviation * torch.randn_like(mean))
        if self.settings.train_text_encoder:
            texts = [family.text(e["caption"], latents.device) for e in group]
        else:
            texts = [e["text"] for e in group]
        text = {k: torch.cat([t[k] for t in texts]) for k in texts[0]}
        noisy, t, target, weight = family.noised(latents, self.settings.min_snr or None)
        squared = (family.predict(noisy, t, text).float() - target).square().mean(1, keepdim=True)
        return weight * (squared * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))

    # What the Trainer and the report ask of a model with adapters.

    def activation_checkpointing_enable(self, **_: Any) -> None:
        names = ("enable_gradient_checkpointing", "activation_checkpointing_enable", "gradient_checkpointing_enable")
        for part in self.parts.values():  # of diffusers; of transformers 5, and 4
            next(getattr(part, name) for name in names if hasattr(part, name))()

    gradient_checkpointing_enable = activation_checkpointing_enable

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        everything = [p for m in self.family.pipe.components.values() if isinstance(m, nn.Module) for p in m.parameters()]
        return sum(p.numel() for p in everything if p.requires_grad), sum(p.numel() for p in everything)

    def get_base_model(self) -> nn.Module:
        return self.family.model

    @property
    def active_peft_config(self) -> Any:
        (config,) = self.family.model.peft_config.values()
        return config


def adapt(family: Family, config: Any) -> PipelineAdapters:
    if config.min_snr and family.flow:
        kind = type(family.pipe).__name__
        raise HalotuneError(f"min_snr: a {kind} learns a flow, which has no such weights; got {config.min_snr}. Leave it out.")
    own: Any = config.adapter
    parts = {family.model_name: own}
    if config.train_text_encoder:
        there = [name for name in family.text_encoders if getattr(family.pipe, name, None) is not None]
        parts |= {name: replace(own, target_modules=TEXT_TARGETS) for name in there}
    adapters = PipelineAdapters(family.pipe)
    adapters.add(parts, config.RECIPE)
    return adapters


class PipelineTrainer(RunTrainerMixin, Trainer):
    """Saves and loads the adapters of a pipeline, averages them, and draws pictures where others evaluate."""

    model: Denoiser

    def __init__(self, *args: Any, adapters: PipelineAdapters, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapters = adapters
        self.config: Any = self.model.settings
        self.average = EMAModel(self.trained(), decay=self.config.ema) if self.config.ema else None
        if self.average:
            self.add_callback(_Average(self.average, self.trained))

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return super().training_step(*args, **kwargs)  # cuDNN's backward fails on FLUX (torch 2.11, H200)

    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the adapters are their average over the steps, if there is one."""
        if self.average is None:
            yield
            return
        parameters = self.trained()
        self.average.store(parameters)
        self.average.copy_to(parameters)
        try:
            yield
        finally:
            self.average.restore(parameters)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(str(output_dir))
        if folder.name.startswith("checkpoint-"):
            self.save_parts(folder)
            if self.average:
                torch.save(self.average.state_dict(), folder / "average.pt")
        else:
            with self.averaged():
                self.save_parts(folder)

    def save_parts(self, folder: Path) -> None:
        """What is trained, into a folder."""
        self.adapters.save(folder)

    def load_parts(self, folder: Path) -> None:
        for name in adapted_models(self.model.family):
            part, (adapter,) = self.model.parts[name], self.adapters.names
            set_peft_model_state_dict(part, read_tensors(folder / name / WEIGHTS_NAME), adapter)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        self.load_parts(folder)
        if self.average:
            self.average.load_state_dict(torch.load(folder / "average.pt", map_location="cpu", weights_only=True))
            self.average.to(self.args.device)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The loss on the subject's pictures, always with the same noise; and the pictures of this step."""
        with forked_generators(self.args.device), self.averaged(), torch.no_grad():
            self.model.eval()
            torch.manual_seed(0)
            losses = []
            pictures: Any = self.eval_dataset
            for number in range(max(16, len(pictures))):
                inputs = self._prepare_inputs(self.data_collator([pictures[number % len(pictures)]]))
                with self.compute_loss_context_manager():
                    losses.append(self.model(**inputs)["loss"].item())
            self.draw()
            self.model.train()
        metrics = {"eval_loss": sum(losses) / len(losses)}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def draw(self) -> None:
        """Write the pictures of this step, and the gallery of the run's page."""
        raise NotImplementedError


class _Average(TrainerCallback):
    def __init__(self, average: EMAModel, trained: Callable[[], list[nn.Parameter]]) -> None:
        self.average, self.trained = average, trained

    def on_train_begin(self, args: Any, *_: Any, **__: Any) -> None:
        self.average.to(args.device)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.average.step(self.trained())
