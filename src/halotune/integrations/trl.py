"""TRL's SFTTrainer for models with adapters.

from halotune.integrations.trl import AdapterSFTTrainer

trainer = AdapterSFTTrainer(get_peft_model(base, HRAConfig(target_modules="all-linear")), args=trl.SFTConfig(...), ...)
"""

from __future__ import annotations

from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.errors import HalotuneError
from ..core.layer import AdaptedLayer
from ..engine.injection.first_pass import note_call
from ..engine.injection.modules_to_save import ModulesToSaveWrapper
from ..engine.model import PeftModel
from .transformers import AdapterTrainerMixin

try:
    from accelerate.utils import is_peft_model
    from trl.trainer.sft_trainer import SFTTrainer
    from trl.trainer.utils import add_fused_lm_head
except ImportError as e:
    raise HalotuneError('halotune.integrations.trl needs trl. Install it with: pip install "halotune[sft]"') from e


class AdapterSFTTrainer(AdapterTrainerMixin, SFTTrainer):
    """`AdapterTrainerMixin` on SFTTrainer, and what TRL's chunked loss needs to know of adapters.

    - The chunked loss multiplies by the head's weight itself: an adapted head, or one that is fully fine-tuned, gives the
      weight that it computes with, and so learns.
    - Trained parameters keep their dtype on a quantized base, where TRL rounds them to bf16.
    - `eval_loss`, `eval_entropy` and `eval_mean_token_accuracy` are means over all tokens that count, whatever the batches are.
    """

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        trained = [(p, p.data) for p in model.parameters() if p.requires_grad]
        if isinstance(model, PeftModel):
            show_head(model.get_base_model())
        super().__init__(model, *args, **kwargs)
        if isinstance(model, PeftModel) and not is_peft_model(model):  # TRL took the model with adapters for a plain one
            del model.forward
            base: Any = model.get_base_model()
            add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
        for parameter, data in trained:
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)
        self._eval_sums: list[Tensor] = []

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        positions = inputs.get("position_ids")
        if model.training and "attention_mask" not in inputs and positions is not None:  # TRL counts the tokens of one row
            more = positions.numel() - positions.shape[1]
            self._total_train_tokens += more * self.accelerator.num_processes
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        if loss is not None and "labels" in inputs:
            counted = (inputs["labels"][:, 1:] != -100).sum().to(loss.device)
            sums = torch.stack([loss.double() * counted, counted.double()])
            self._eval_sums.append(self.accelerator.reduce(sums, "sum"))  # type: ignore[arg-type]
        return loss, logits, labels

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._eval_sums = []
        output = super().evaluation_loop(*args, **kwargs)
        key = f"{kwargs.get('metric_key_prefix', 'eval')}_loss"
        if self._eval_sums and output.metrics is not None and key in output.metrics:
            totals, counted = torch.stack(self._eval_sums).T
            output.metrics[key] = float(totals.sum() / counted.sum().clamp(min=1))
            for name in ("entropy", "mean_token_accuracy"):  # of which TRL has a batch's mean
                means = torch.tensor(self._metrics["eval"][name], dtype=torch.float64, device=counted.device)
                self._metrics["eval"][name] = [float((means * counted).sum() / counted.sum().clamp(min=1))]
        return output


class Head(NamedTuple):
    """What the chunked loss reads of a head: the weight that it computes with, differentiable in what is trained."""

    weight: Tensor
    bias: Tensor | None


def show_head(base: nn.Module) -> None:
    """Have `base.get_output_embeddings()` return a `Head` where the head has adapters or is fully fine-tuned."""
    original = base.get_output_embeddings

    def get_output_embeddings(self: nn.Module) -> Any:
        head = original()  # type: ignore[operator]
        if isinstance(head, AdaptedLayer):
            note_call(head)
            return Head(head.operator().weight().to(head.base.dtype), getattr(head.base_layer, "bias", None))
        if isinstance(head, ModulesToSaveWrapper):
            own: Any = head.current
            return Head(own.weight, getattr(own, "bias", None))
        return head

    base.get_output_embeddings = MethodType(get_output_embeddings, base)  # type: ignore[assignment]
