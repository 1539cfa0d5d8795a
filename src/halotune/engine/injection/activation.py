"""Which adapters are active, for which samples, and what is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

from torch import nn

from ...core.config import AdapterConfig
from ...core.errors import HalotuneError
from ...core.layer import AdaptedLayer
from ...core.rows import BASE, MIXED, Batch, Rows
from ...core.wrapper import PerAdapter
from .modules import adapted_layers, modules_to_save_wrappers, per_adapter, plain_modules, public_path


def activate(model: nn.Module, names: list[str], trainable: bool = True) -> None:
    """Make these adapters the active ones, in this order; exactly they are trained."""
    wrappers = modules_to_save_wrappers(model)
    for path, wrapper in wrappers.items():
        wrapper.check(names, path)
    for layer in adapted_layers(model).values():
        layer.set_adapter(names, inference_mode=not trainable)
    for wrapper in wrappers.values():
        wrapper.active_adapters = [n for n in names if n in wrapper.modules_to_save]
        for n, module in wrapper.modules_to_save.items():
            for p in module.parameters():
                if p.is_floating_point():
                    p.requires_grad_(trainable and n in names)


def enable(model: nn.Module, on: bool) -> None:
    for module in per_adapter(model).values():
        module.enabled = on


@contextmanager
def per_sample(
    model: nn.Module, names: Sequence[str], batch: int | None = None, modules: Mapping[str, PerAdapter] | None = None
) -> Iterator[None]:
    """Inside, sample i of a batch goes through adapter `names[i]`, or through the base for `"__base__"`.

    Args:
        model: the base model, with adapters.
        batch: the number of samples, where it is known.
        modules: the layers with adapters, by their paths, where they are no submodules of the model.
    """
    if batch is not None and len(names) != batch:
        raise HalotuneError(f"adapter_names: got {len(names)} names for a batch of {batch} samples. Give one name per sample.")
    modules = per_adapter(model) if modules is None else modules
    known = {n for m in modules.values() for n in m.by_name}
    unknown = sorted(set(names) - known - {BASE})
    if unknown or not names:
        raise HalotuneError(f"adapter_names: {unknown or 'empty'}; the model has {sorted(known)}, and {BASE!r} for none.")
    if any(isinstance(m, AdaptedLayer) and m.merged for m in modules.values()):
        raise HalotuneError("adapter_names: adapters are merged into the weights. Call unmerge_adapter() first.")
    if not all(m.enabled for m in modules.values()):
        raise HalotuneError(f"adapter_names: adapters are disabled. Leave disable_adapter(), or name {BASE!r} for samples.")
    if model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        raise HalotuneError(
            "adapter_names: checkpointed blocks are recomputed in backward, when the names are gone. Turn gradient "
            "checkpointing off, or train one adapter at a time."
        )
    sizes, around = Batch(model, len(names)), dict(plain_modules(model))
    rows, outer = {}, (MIXED.batch, MIXED.rows)
    for path, m in modules.items():
        is_convolution = isinstance(m.wrapped, nn.modules.conv._ConvNd)
        rows[m] = Rows(tuple(names), sizes, public_path(path), _batch_first(path, around), is_convolution)
    MIXED.batch, MIXED.rows = sizes, rows
    try:
        yield
    finally:
        MIXED.batch, MIXED.rows = outer


# Models of transformers that transpose what goes through their layers.
_SEQUENCE_FIRST = ("BridgeTower", "FSMT", "LED", "Longformer", "Mask2Former", "OmDet", "OneFormer", "XLNet")


def _batch_first(path: str, modules: Mapping[str, nn.Module]) -> bool | Literal["usual"] | None:
    """What the nearest module around says, or one of those that it holds, as torch's attention; or else its library's rule."""
    while path:
        path = path.rpartition(".")[0]
        for module in (modules[path], *modules[path].children()):
            if isinstance(said := getattr(module, "batch_first", None), bool):
                return said
        for kind in type(modules[path]).__mro__:
            if kind.__module__.startswith("transformers.") and kind.__name__.startswith(_SEQUENCE_FIRST):
                return None
            if kind.__name__ in ("PreTrainedModel", "ModelMixin") and kind.__module__.startswith(
                ("transformers.", "diffusers.")
            ):
                return "usual"
    return None


def freeze(model: nn.Module) -> None:
    """Freeze what is no adapter and no trained copy."""
    ours = {id(p) for module in per_adapter(model).values() for p in module.by_name.parameters()}
    for p in model.parameters():
        if id(p) not in ours:
            p.requires_grad_(False)


def check_bias(others: Mapping[str, AdapterConfig], config: AdapterConfig, name: str) -> None:
    """Two adapters cannot both train biases, which belong to the base."""
    if config.bias == "none":
        return
    trained = [n for n, c in others.items() if n != name and getattr(c, "bias", "none") != "none"]  # peft's may have none
    if trained:
        raise HalotuneError(
            f"adapter {name!r}: bias={config.bias!r}, but {trained[0]!r} trains biases already, and they belong to the "
            'base. Use bias="none" for all adapters but one.'
        )
