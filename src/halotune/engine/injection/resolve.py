"""From the names in a configuration to the modules of a model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress

from torch import nn

from ...core.base import LinearLike, base_for, base_kind
from ...core.config import AdapterConfig
from ...core.errors import HalotuneError, warn
from ...core.layer import AdaptedLayer
from ...core.trial import unusual_output
from .default_targets import default_targets, known_architectures
from .modules import is_attention, is_expert_weights, visible_modules
from .targets import ALL_LINEAR, matches, matches_suffix, select, select_parameters, shortest_suffixes

# Modules at a classifier's root that are drawn anew as its head is: wav2vec2's, DeBERTa's.
_BEFORE_HEADS = ("projector", "pooler")

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)

# Heads that are their model's output layer, at its root; "all-linear" leaves them out.
_HEADS = frozenset({"lm_head", "embed_out", "score", "classifier", "qa_outputs"})


def resolve_targets(model: nn.Module, config: AdapterConfig) -> tuple[AdapterConfig, list[str]]:
    """The configuration with its targets spelled out, and the paths of the modules they mean."""
    modules = dict(visible_modules(model))
    everything, experts = _free(modules, config)
    free = {n: m for n, m in everything.items() if n not in experts}
    adaptable = [n for n, m in free.items() if isinstance(m, AdaptedLayer) or base_kind(m)]
    linear = {n for n in adaptable if issubclass(_kind(free[n]), LinearLike)} - _output_layers(model)
    if config.target_modules is None and not config.target_parameters:
        config = copy.copy(config)
        config.target_modules = {t for t in _defaults(model) if any(matches_suffix(n, t) for n in adaptable)}
    every = config.target_modules == ALL_LINEAR
    if every:
        routers = _routers(free, experts)
        linear -= set(routers)
        _warn_of_experts(free, experts, routers, config)
        found = [n for n in everything if n in linear or n in experts]
        named = spelled_out(config, found, everything)
    else:
        named = config
        _report_experts(config, free, experts)
    inside = [n for n in modules if n not in everything]
    chosen: set[str] = set()
    if config.target_modules and (linear or not (every and experts)):
        chosen |= _expanded(select(config, free, linear, adaptable, inside), free)
    chosen |= set(select_parameters(named, experts, adaptable, _parameters(free)))
    paths = [n for n in everything if n in chosen]
    for path in paths:
        if not isinstance(everything[path], AdaptedLayer):
            base_for(everything[path], path)
    return named, paths


def named_paths(modules: Mapping[str, nn.Module], config: AdapterConfig) -> list[str]:
    """The paths that targets spelled out before mean, without a word on those that match nothing."""
    everything, experts = _free(modules, config)
    free = {n: m for n, m in everything.items() if n not in experts}
    targets = config.target_modules or ()
    chosen = set(select_parameters(config, experts, list(free)))
    if targets:
        chosen |= _expanded(select(config, free, (), (), () if isinstance(targets, str) else targets), free)
    return [n for n in everything if n in chosen]


def spelled_out(config: AdapterConfig, paths: Sequence[str], modules: Mapping[str, nn.Module]) -> AdapterConfig:
    """The configuration with these paths as its targets."""
    config, names = copy.copy(config), list(modules)
    experts = [n for n in paths if is_expert_weights(modules[n])]
    config.target_modules = shortest_suffixes([n for n in paths if n not in experts], names)
    config.target_parameters = parameter_suffixes(experts, names) or None
    return config


def parameter_suffixes(chosen: Sequence[str], names: Sequence[str]) -> set[str]:
    """As `shortest_suffixes`, with the module before the parameter: "experts.down_proj"."""
    short = shortest_suffixes(chosen, names)
    return {".".join(n.split(".")[-max(2, s.count(".") + 1) :]) for s in short for n in chosen if matches_suffix(n, s)}


def _free(modules: Mapping[str, nn.Module], config: AdapterConfig) -> tuple[dict[str, nn.Module], list[str]]:
    """The modules that are not fully fine-tuned; and which of them are weights of fused experts."""
    to_save = config.modules_to_save or []
    free = {n: m for n, m in modules.items() if n and not any(_inside(n, w) for w in to_save)}
    return free, [n for n, m in free.items() if is_expert_weights(m)]


def _parameters(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Every parameter, and what it is, for errors."""
    out = {}
    for path, module in modules.items():
        for name, p in module.named_parameters(recurse=False):
            own = f"{path}.{name}" if path else name
            out[own] = f"a parameter of a {type(module).__name__}, {tuple(p.shape)} in {p.dtype}"
            if not p.is_floating_point():
                out[own] += ", packed in a form that its own kernels read; load the model dequantized to adapt it"
    return out


def _report_experts(config: AdapterConfig, free: Mapping[str, nn.Module], experts: Sequence[str]) -> None:
    """Names of modules that mean fused experts' weights too, which target_parameters names."""
    target = config.target_modules or ()
    holders = {n.rpartition(".")[0] for n in experts}
    means = [n for n in experts if matches(n, target) or matches(n.rpartition(".")[0], target)]
    missed = [n for n in means if not any(matches_suffix(n, t) for t in config.target_parameters or ())]
    if not missed:
        return
    how = f"target_parameters={sorted(parameter_suffixes(missed, [*free, *experts]))}"
    if all(matches(n, config.exclude_modules) for n in missed):
        return
    if any(matches(n, target) for n in holders) or not any(matches(n, target) for n in free):
        raise HalotuneError(
            f"target_modules: {missed[0]} is no module but one weight of all experts, which is named as a parameter. Use {how}."
        )
    warn(
        f"target_modules: {len(missed)} weights of fused experts, such as {missed[0]}, have that name too and stay as they "
        f"are. Add {how} to adapt them, or name them in exclude_modules to leave them out knowingly."
    )


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


def _routers(modules: Mapping[str, nn.Module], experts: Sequence[str]) -> list[str]:
    """Modules beside fused experts whose weight is a matrix, and which are no linear layers or give more than one gives."""
    around = {n.rpartition(".")[0].rpartition(".")[0] for n in experts}
    blocks = tuple(f"{n}." if n else "" for n in around)

    def is_router(module: nn.Module) -> bool:
        own = module.base_layer if isinstance(module, AdaptedLayer) else module
        kind = base_kind(own)
        if isinstance(own, nn.Embedding) or not any(p.dim() == 2 for p in own.parameters(recurse=False)):
            return False
        return kind is None or not (kind(own).takes_weight or unusual_output(kind(own)) is None)

    return [n for n, m in modules.items() if blocks and n.startswith(blocks) and is_router(m)]


def _warn_of_experts(
    modules: Mapping[str, nn.Module], experts: Sequence[str], routers: Sequence[str], config: AdapterConfig
) -> None:
    """Say what "all-linear" leaves out of a mixture of experts: experts of a kind that is not known, and routers."""
    known = {n.rpartition(".")[0] for n in experts}
    fused = [
        name
        for name, module in modules.items()
        if name not in known
        and not isinstance(module, (AdaptedLayer, nn.modules.conv._ConvNd, nn.utils.parametrize.ParametrizationList))
        and not matches(name, config.exclude_modules)
        and any(p.dim() == 3 and min(p.shape) > 1 for p in module.parameters(recurse=False))
    ]
    if fused:
        warn(
            f"target_modules='all-linear': {len(fused)} modules hold several matrices in one weight (experts) and are not made "
            f"by transformers' experts interface, so they get no adapter, for example {fused[0]}. They can be fully fine-tuned "
            "with modules_to_save."
        )
    left = [n for n in routers if not matches(n, config.exclude_modules)]
    if left:
        leaf = left[0].rpartition(".")[2]
        warn(
            f"target_modules='all-linear': {len(left)} routers of experts are no plain linear layers and stay as they are, for "
            f"example {left[0]} ({type(modules[left[0]]).__name__}). Train them in full with modules_to_save=[{leaf!r}], "
            f"or leave them out knowingly with exclude_modules=[{leaf!r}]."
        )


def _expanded(paths: list[str], modules: Mapping[str, nn.Module]) -> set[str]:
    """Attention modules mean their projections."""
    attention = {path for path in paths if is_attention(modules[path])}
    return ({*paths} - attention) | {n for n in modules if any(n.startswith(f"{path}.") for path in attention)}


def _kind(module: nn.Module) -> type:
    return type(module.base) if isinstance(module, AdaptedLayer) else base_kind(module) or object


def _inside(name: str, to_save: str) -> bool:
    """Whether `modules_to_save` names a module, or one that it lies in; as in PEFT, "norm" names "input_norm" too."""
    parts = name.split(".")
    return any(".".join(parts[:k]).endswith(to_save) for k in range(1, len(parts) + 1))


def _output_layers(model: nn.Module) -> set[str]:
    output = None
    with suppress(NotImplementedError, AttributeError):  # a model without one, and transformers' answers for such
        output = model.get_output_embeddings()  # type: ignore[operator]
    return {n for n, m in visible_modules(model) if n in _HEADS or m is output}


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
