"""What training with adapters needs of a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import warn
from ..core.sharded_parameters import gathered
from .injection.modules import adapted_layers


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
) -> nn.Module:
    """Freeze a quantized model, keep what is not quantized (norms, embeddings, the head) in fp32, turn on checkpointing.

    Args:
        use_gradient_checkpointing: trade time for memory; inputs of blocks then ask for gradients.
        gradient_checkpointing_kwargs: for `torch.utils.checkpoint.checkpoint`.
    """
    for p in model.parameters():
        p.requires_grad_(False)
        if p.dtype in (torch.float16, torch.bfloat16) and type(p) is nn.Parameter:  # quantized weights are of other types
            p.data = p.data.to(torch.float32)
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # transformers 5 and 4
    turn_on = next((getattr(model, n) for n in names if hasattr(model, n)), None)
    if use_gradient_checkpointing and turn_on is not None:
        model.enable_input_require_grads()  # type: ignore[operator]
        turn_on(gradient_checkpointing_kwargs or {"use_reentrant": False})
    return model


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimiser groups: weight decay for what has a scale that matters, none for HRA's vectors, biases and norms.

    An adapter class names the parameters that decay would only rescale in its attribute `scale_free`.
    """
    free: set[int] = set()
    for layer in adapted_layers(model).values():
        for adapter in layer.adapters.values():
            free |= {id(adapter.get_parameter(n)) for n in adapter.scale_free}  # type: ignore[operator, union-attr]
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for p in model.parameters():
        if p.requires_grad:
            (kept if id(p) in free or p.dim() < 2 else decayed).append(p)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]


def penalty(model: nn.Module) -> Tensor | float:
    """The sum of the active adapters' penalties, to be added to the loss once per optimizer step; 0.0 where none has one.

    Where FSDP2 has sharded the model, every process has to call it: it gathers the parameters.

    Args:
        model: a `PeftModel`, or any module with adapters somewhere in it.
    """
    alike: dict[Hashable, list[list[Tensor]]] = defaultdict(list)
    one: dict[Hashable, Any] = {}
    for layer in adapted_layers(model).values():
        for name in layer.active_adapters:
            adapter: Any = layer.adapters[name]
            if adapter.penalized is not None:
                layer.penalty_taken = True
                parameters = [gathered(p) for p in adapter.parameters()]
                key = type(adapter), adapter.penalized, *[(p.shape, p.dtype, p.device) for p in parameters]
                one[key] = adapter
                alike[key].append(parameters)
    total: Tensor | float = 0.0
    for key, all_ in alike.items():  # a few launches for all of them, instead of a few for each
        term = one[key].penalty(*[torch.stack(each) for each in zip(*all_, strict=True)])
        total = total + term.to(total.device) if isinstance(total, Tensor) else term  # where the first layers are, and inputs
    return total


def warn_if_penalty_unused(model: nn.Module) -> None:
    """Warn where active adapters have a penalty that nothing has asked for: in training it would be left out silently."""
    for layer in adapted_layers(model).values():
        adapters = [layer.adapters[name] for name in layer.active_adapters]
        if not layer.penalty_taken and any(a.penalized is not None for a in adapters):
            warn(
                "the configuration asks for a penalty (orthogonality_weight), but nothing has added it to the loss so far. Add "
                "model.penalty() once per optimizer step, or train with halotune.integrations.transformers.AdapterTrainer "
                "(AdapterTrainerMixin for other trainers), which does."
            )
            return
