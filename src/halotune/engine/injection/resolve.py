"""From the names in a configuration to the modules of a model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from torch import nn

from ...core.base import LinearLike, base_for, base_kind
from ...core.config import AdapterConfig
from ...core.errors import HalotuneError, warn
from ...core.layer import AdaptedLayer
from .default_targets import default_targets, known_architectures
from .modules import is_attention, visible_modules
from .targets import ALL_LINEAR, matches_suffix, select, shortest_suffixes

# Modules at a classifier's root that are drawn anew as its head is: wav2vec2's, DeBERTa's.
_BEFORE_HEADS = ("projector", "pooler")

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)

# Heads that are their model's output layer, at its root; "all-linear" leaves them out.
_HEADS = frozenset({"lm_head", "embed_out", "score", "classifier", "qa_outputs"})


def resolve_targets(model: nn.Module, config: AdapterConfig) -> tuple[AdapterConfig, list[str]]:
    """The configuration with its targets spelled out, and the paths of the modules they mean."""
    modules = dict(visible_modules(model))
    to_save = config.modules_to_save or []
    free = {n: m for n, m in modules.items() if n and not any(_inside(n, w) for w in to_save)}
    adaptable = [n for n, m in free.items() if isinstance(m, AdaptedLayer) or base_kind(m)]
    linear = {n for n in adaptable if issubclass(_kind(free[n]), LinearLike)} - _output_layers(model)
    if config.target_modules is None:
        config = copy.copy(config)
        config.target_modules = {t for t in _defaults(model) if any(matches_suffix(n, t) for n in adaptable)}
    inside = [n for n in modules if n not in free]
    paths = _expanded(select(config, free, linear, adaptable, inside), free)
    if config.target_modules == ALL_LINEAR:
        _warn_of_experts(free)
        config = copy.copy(config)
        config.target_modules = shortest_suffixes([n for n in free if n in linear], list(free))
    for path in paths:
        if not isinstance(free[path], AdaptedLayer):
            base_for(free[path], path)
    return config, paths


def named_paths(modules: Mapping[str, nn.Module], config: AdapterConfig) -> list[str]:
    """The paths that targets spelled out before mean, without a word on those that match nothing."""
    free = {n: m for n, m in modules.items() if n and not any(_inside(n, w) for w in config.modules_to_save or [])}
    targets = config.target_modules or ()
    return _expanded(select(config, free, (), (), () if isinstance(targets, str) else targets), free)


def modules_to_save_paths(modules: Mapping[str, nn.Module], config: AdapterConfig) -> list[str]:
    found: dict[nn.Module, str] = {}
    for wanted in config.modules_to_save or []:
        named = {n: m for n, m in modules.items() if n.endswith(wanted)}
        if not named and wanted not in _HEADS:  # a task's usual heads are tried, each model has one of them
            raise HalotuneError(
                f"modules_to_save: no module matches {wanted!r}. The model's top modules are "
                f"{', '.join(n for n in modules if n and '.' not in n)}."
            )
        for name, module in named.items():
            if isinstance(module, _CONTAINERS):
                inside = ", ".join(f"{name}.{n}" for n, _ in module.named_children()) or "its owner"
                raise HalotuneError(
                    f"modules_to_save: {name} is a {type(module).__name__}, which is not called itself: a trained copy would "
                    f"never run. Name what it holds: {inside}."
                )
        found.update({m: n for n, m in named.items()})
    return list(found.values())


def task_heads(model: nn.Module, config: AdapterConfig, usual: Sequence[str], others: Sequence[str]) -> list[str]:
    """The modules of a task's head beside those of the `usual` names: of `others`, and what lies before a head.

    A configuration with all usual names was resolved before, when its adapter was made.

    Raises:
        HalotuneError: there is no head, so that it would stay as it was drawn and not be saved.
    """
    named = config.modules_to_save or []
    if set(usual) <= set(named):
        return []
    modules = dict(visible_modules(model))
    root = [n for n in modules if n and "." not in n]
    if not (any(n.endswith((*usual, *named)) for n in modules) or any(n in root for n in others)):
        raise HalotuneError(
            f"{type(model).__name__} has no head of a usual name ({', '.join([*usual, *others])}), so none would be trained "
            f"and saved for this task_type; its top modules are {', '.join(root)}. Name the head in modules_to_save, or leave "
            "task_type out."
        )
    return [n for n in (*others, *_BEFORE_HEADS) if n in root and any(True for _ in modules[n].parameters())]


def _warn_of_experts(modules: Mapping[str, nn.Module]) -> None:
    """Experts fused into one three-dimensional weight are no linear layers: say that "all-linear" leaves them out."""
    fused = [
        name
        for name, module in modules.items()
        if not isinstance(module, (nn.modules.conv._ConvNd, nn.utils.parametrize.ParametrizationList))
        and any(p.dim() == 3 and min(p.shape) > 1 for p in module.parameters(recurse=False))
    ]
    if fused:
        warn(
            f"target_modules='all-linear': {len(fused)} modules hold several matrices in one weight (experts) and "
            f"get no adapter, for example {fused[0]}. They can be fully fine-tuned with modules_to_save."
        )


def _expanded(paths: list[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Attention modules mean their projections."""
    out: dict[str, None] = {}
    for path in paths:
        inside = [n for n in modules if n.startswith(f"{path}.")] if is_attention(modules[path]) else [path]
        out.update(dict.fromkeys(inside))
    return list(out)


def _kind(module: nn.Module) -> type:
    return type(module.base) if isinstance(module, AdaptedLayer) else base_kind(module) or object


def _inside(name: str, to_save: str) -> bool:
    """Whether `modules_to_save` names a module, or one that it lies in; as in PEFT, "norm" names "input_norm" too."""
    parts = name.split(".")
    return any(".".join(parts[:k]).endswith(to_save) for k in range(1, len(parts) + 1))


def _output_layers(model: nn.Module) -> set[str]:
    get = getattr(model, "get_output_embeddings", None)
    try:
        output = get() if get else None
    except (NotImplementedError, AttributeError):  # transformers' answer for models without one
        output = None
    return {n for n, m in visible_modules(model) if n in _HEADS or (output is not None and m is output)}


def _defaults(model: nn.Module) -> tuple[str, ...]:
    config = getattr(model, "config", None)
    names = default_targets(config) or default_targets({"_class_name": type(model).__name__})
    if names is None:
        kind = getattr(config, "model_type", None) or type(model).__name__
        there = sorted({n.rsplit(".", 1)[-1] for n, m in visible_modules(model) if n and base_kind(m)})
        raise HalotuneError(
            f"target_modules: there is no default for {kind!r} ({len(known_architectures())} architectures have one). "
            f"Name the modules, for example from: {', '.join(there[:12])}; or use target_modules='all-linear'."
        )
    return names
