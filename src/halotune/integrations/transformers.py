"""A mixin for transformers' Trainer and those built on it (TRL's, sentence-transformers').

It adds the adapters' penalty (HRA's `orthogonality_weight`) to the training loss. And with PEFT installed a stock Trainer
saves, resumes from and reloads the adapter alone; with this mixin it does so without PEFT, too.

    from halotune.integrations.transformers import AdapterTrainer

    trainer = AdapterTrainer(model=get_peft_model(base, HRAConfig(r=8, orthogonality_weight=1e-4)), ...)

    class AdapterSFTTrainer(AdapterTrainerMixin, SFTTrainer):
        pass
"""

from __future__ import annotations

from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.errors import HalotuneError
from ..engine.injection.modules import unwrapped
from ..engine.model import PeftModel
from ..engine.training import penalty

try:
    from accelerate.utils import is_peft_model
    from transformers import Trainer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.trainer import TRAINING_ARGS_NAME
    from transformers.utils.generic import find_labels
except ImportError as e:
    raise HalotuneError(
        "halotune.integrations.transformers needs transformers and accelerate. Install them with: "
        'pip install "halotune[transformers]"'
    ) from e


class AdapterTrainerMixin(Trainer if TYPE_CHECKING else object):
    """Put before a Trainer class, for models with adapters.

    - The penalty joins the loss of training, never that of evaluation: once per optimizer step, whatever the number of
      accumulation steps and processes, and however the Trainer scales its own loss. It is logged as `penalty`; `loss` stays
      the task's own.
    - The adapter alone is saved, resumed from and reloaded as the best; label smoothing shifts the labels of causal language
      models; the base's label names are used. All this the stock Trainer does too, but only where PEFT is installed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._penalty_sum: Tensor | float = 0.0  # since the last log
        self._penalty_count = 0
        if isinstance(self.model, PeftModel):
            base = type(unwrapped(self.model.get_base_model()))
            if self.args.label_names is None:
                self.label_names = find_labels(base)
            if self.label_smoother is not None and base.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
                self.label_smoother = partial(self.label_smoother, shift_labels=True)

    # -- the penalty

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's, with the backward pass of `loss + penalty / accumulation steps`.

        Before, Trainers scale the loss by numbers of tokens, of steps and of processes, each in its own way.
        """
        backward = self.accelerator.backward

        def backward_with_penalty(loss: Tensor, **kwargs: Any) -> None:
            term = penalty(model)
            if isinstance(term, Tensor):
                self._penalty_sum = self._penalty_sum + term.detach()
                self._penalty_count += 1
                loss = loss + (term / self.current_gradient_accumulation_steps).to(loss.device)
            backward(loss, **kwargs)

        self.accelerator.backward = backward_with_penalty  # type: ignore[method-assign]
        try:
            return super().training_step(model, *args, **kwargs)
        finally:
            del self.accelerator.backward

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._penalty_count:
            logs["penalty"] = float(self._penalty_sum) / self._penalty_count
            self._penalty_sum, self._penalty_count = 0.0, 0
        super().log(logs, *args, **kwargs)

    # -- files

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        model = self.model
        if not isinstance(model, PeftModel) or is_peft_model(model):
            return super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir or ".")
        model.save_pretrained(folder, state_dict=state_dict, is_main_process=self.args.should_save)
        if not self.args.should_save:
            return
        processor = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if processor is not None:
            processor.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, checkpoint: str, *args: Any, **kwargs: Any) -> None:
        if self._adapted is None:
            return super()._load_from_checkpoint(checkpoint, *args, **kwargs)
        load_checkpoint(self._adapted, checkpoint)

    def _load_best_model(self) -> None:
        model, best = self._adapted, self.state.best_model_checkpoint
        if model is None or best is None:
            return super()._load_best_model()
        load_checkpoint(model, best)

    @property
    def _adapted(self) -> PeftModel | None:
        """The model with adapters, or the part of the model; None where its parameters are sharded."""
        if self.model is None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return None
        return next((m for m in self.model.modules() if isinstance(m, PeftModel)), None)


class AdapterTrainer(AdapterTrainerMixin, Trainer):
    """transformers' Trainer for models with adapters."""


def load_checkpoint(model: PeftModel, folder: str | PathLike[str]) -> None:
    """Load into every adapter of `model` what `save_pretrained` wrote for it; which are active and trained stays as it is."""
    for name in model.peft_config:
        model.load_adapter(Path(folder) / ("" if name == "default" else name), name, is_trainable=True)  # the mode stays
