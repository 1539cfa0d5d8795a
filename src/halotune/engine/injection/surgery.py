"""Modules put where others were, and taken out again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from ...core.attention import AdaptedAttention
from ...core.experts import AdaptedExperts
from ...core.layer import AdaptedLayer
from ...core.wrapper import PerAdapter
from .modules import HOLDERS, adapted_layers, modules_to_save_wrappers, per_adapter


def swap(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put each new module where the old one was, wherever the model holds it."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]


def eject(model: nn.Module, *, trained: bool) -> None:
    """Take all adapters out: every layer is its base again.

    Args:
        trained: keep the active trained copies of `modules_to_save`; else the originals.
    """
    _unwrap(model, _bases(model, trained=trained))


@contextmanager
def taken_out(model: nn.Module, *, trained: bool | None = None) -> Iterator[None]:
    """Inside, the model holds its own modules alone, with the weights that they have now: merged adapters stay in them.

    Args:
        trained: with the active trained copies of `modules_to_save`; None is where adapters are merged.
    """
    if trained is None:
        trained = any(layer.merged for layer in adapted_layers(model).values())
    bases = _bases(model, trained=trained)
    swap(model, bases)
    try:
        yield
    finally:
        swap(model, {base: wrapper for wrapper, base in bases.items()})


def remove(model: nn.Module, name: str) -> None:
    """Take one adapter out; a module that has no other left is as it was before it was wrapped."""
    held = per_adapter(model).values()
    for module in held:
        module.remove(name)
    _unwrap(model, {module: module.wrapped for module in held if not module.by_name})
    _unwrap(model, {m: m.base_layer for m in model.modules() if isinstance(m, HOLDERS) and not adapted_layers(m)})


def _unwrap(model: nn.Module, bases: Mapping[nn.Module, nn.Module]) -> None:
    """Put what is in wrappers where these are; without the last one the model runs as it did before."""
    swap(model, bases)
    for wrapper in bases:
        if isinstance(wrapper, AdaptedExperts):
            wrapper.detach()
    if not any(isinstance(m, PerAdapter) for m in model.modules()):
        leave_fused_paths(model, back=True)
        tie_own_modules(model, back=True)


def _bases(model: nn.Module, *, trained: bool) -> dict[nn.Module, nn.Module]:
    """Each wrapper -> the module that it wraps."""
    bases: dict[nn.Module, nn.Module] = {layer: layer.base_layer for layer in adapted_layers(model).values()}
    for wrapper in modules_to_save_wrappers(model).values():
        bases[wrapper] = wrapper.current if trained else wrapper.original_module
    bases.update({m: m.base_layer for m in model.modules() if isinstance(m, HOLDERS)})
    return bases


# torch's own encoder has a fused inference path, on nested tensors, which reads weights and so passes adapters by. It takes
# that path only while these attributes are true.
_FUSED = ((nn.TransformerEncoderLayer, "activation_relu_or_gelu"), (nn.TransformerEncoder, "use_nested_tensor"))


def leave_fused_paths(model: nn.Module, *, back: bool = False) -> None:
    inside = [c for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer) for c in m.children()]
    if not back and not any(isinstance(c, (AdaptedLayer, AdaptedAttention)) for c in inside):
        return
    for kind, name in _FUSED:
        for m in model.modules():
            if isinstance(m, kind):
                own = m.__dict__.setdefault("_halotune_fused", getattr(m, name))
                setattr(m, name, own if back else 0)
                if back:
                    del m.__dict__["_halotune_fused"]


def tie_own_modules(model: nn.Module, *, back: bool = False) -> None:
    """Let transformers' `tie_weights` see the model without adapters: it looks modules up by name, and would put parameters
    into ours, or tie to a trained copy what the model itself ties to the original.
    """
    for m in model.modules():
        if back:
            m.__dict__.pop("tie_weights", None)
        elif callable(getattr(type(m), "tie_weights", None)):
            m.__dict__["tie_weights"] = partial(_tie_weights, m)


def _tie_weights(model: Any, *args: Any, **kwargs: Any) -> Any:
    with taken_out(model, trained=False):
        return type(model).tie_weights(model, *args, **kwargs)
