"""What is where in a model with adapters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from ..core.layer import AdaptedLayer
from ..core.prepared import Form
from ..methods.registry import method_of
from .injection.modules import adapted_layers, modules_to_save_wrappers

if TYPE_CHECKING:
    from .model import PeftModel


@dataclass
class LayerStatus:
    """One adapted layer, or one fully fine-tuned module."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Literal["irregular"]]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None
    form: dict[str, Form] = field(default_factory=dict)  # of each adapter: see `PeftModel.set_adapter_form`


@dataclass
class ModelStatus:
    """All layers together; "irregular" where they differ."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Literal["irregular"]
    active_adapters: list[str] | Literal["irregular"]
    merged_adapters: list[str] | Literal["irregular"]
    requires_grad: dict[str, bool | Literal["irregular"]]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None
    form: dict[str, Form | Literal["irregular"]]


def _one(values: Iterable[Any]) -> Any:
    """The value that all share, or "irregular"."""
    first, *others = [*values] or ["irregular"]
    return first if all(v == first for v in others) else "irregular"


def _trained(module: nn.Module) -> bool | Literal["irregular"]:
    flags = [p.requires_grad for p in module.parameters()]
    return _one(flags) if flags else False


def layer_status(model: PeftModel) -> list[LayerStatus]:
    base, scope, out = model.get_base_model(), model.base_model.scope, []
    scope.look(base)  # forms are settled then, at the latest in the next pass
    for path, module in {**adapted_layers(base), **modules_to_save_wrappers(base)}.items():
        is_layer, copies = isinstance(module, AdaptedLayer), module.by_name
        out.append(
            LayerStatus(
                name=path,
                module_type=type(module.wrapped).__name__,
                enabled=module.enabled,
                active_adapters=list(module.active_adapters),
                merged_adapters=list(module.merged_adapters) if is_layer else [],
                requires_grad={n: _trained(m) for n, m in copies.items()},
                available_adapters=sorted(copies),
                devices={n: sorted({str(p.device) for p in m.parameters()}) for n, m in copies.items()},
                quantization_backend=module.base.quantization if is_layer else None,
                form={n: a.form for n, a in module.adapters.items()} if is_layer else {},  # type: ignore[misc]
            )
        )
    return out


def model_status(model: PeftModel) -> ModelStatus:
    rows = layer_status(model)
    trainable, total = model.get_nb_trainable_parameters()
    names = list(model.peft_config)
    layers = [r for r in rows if any(n in r.available_adapters for n in names)]
    shown = [[n for n in model.active_adapters if n in r.available_adapters] for r in layers]
    return ModelStatus(
        base_model_type=type(model.get_base_model()).__name__,
        adapter_model_type=type(model.base_model).__name__,
        peft_types={n: method_of(c.peft_type).peft_type for n, c in model.peft_config.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_one(r.enabled for r in layers),
        active_adapters=list(model.active_adapters)
        if all(r.active_adapters == s for r, s in zip(layers, shown, strict=True))
        else "irregular",
        merged_adapters=_one(r.merged_adapters for r in layers if r.name in adapted_layers(model.get_base_model())),
        requires_grad={n: _one(r.requires_grad[n] for r in layers if n in r.requires_grad) for n in names},
        available_adapters=sorted(names),
        devices={n: sorted({d for r in layers for d in r.devices.get(n, [])}) for n in names},
        quantization_backend=_one(r.quantization_backend for r in layers),
        form={n: _one(r.form[n] for r in layers if n in r.form) for n in names},
    )
