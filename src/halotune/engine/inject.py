"""Putting adapters into a model's layers and taking them out again."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.attention import AdaptedAttention, Projection
from ..core.base import LinearLike, base_for, base_kind
from ..core.config import AdapterConfig
from ..core.errors import HalotuneError, warn
from ..core.layer import BASE, AdaptedLayer, Rows
from ..methods.registry import method_of
from .architectures import default_targets, known_architectures
from .offloading import check_offloaded
from .targets import ALL_LINEAR, matches_suffix, select, shortest_suffixes
from .whole import WholeModule

# Heads that are their model's output layer, at its root; "all-linear" leaves them out.
_HEADS = frozenset({"lm_head", "embed_out", "score", "classifier", "qa_outputs"})


def public_path(path: str) -> str:
    """A layer's path as configurations and reports name it: attention's output projection lies in its base layer."""
    return path.replace(".base_layer.", ".")


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """Every adapted layer, by its path in `model`."""
    return {name: m for name, m in model.named_modules() if isinstance(m, AdaptedLayer)}


def whole_modules(model: nn.Module) -> dict[str, WholeModule]:
    """Every module with trained copies, by its path in `model`."""
    return {name: m for name, m in model.named_modules() if isinstance(m, WholeModule)}


def visible_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's own modules under the names they had before any was wrapped."""

    wrapped: dict[nn.Module, AdaptedAttention] = {}

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        yield name, module
        if isinstance(module, AdaptedLayer):
            return
        if isinstance(module, nn.MultiheadAttention):
            if module not in wrapped:  # under a second name it is the same
                wrapped[module] = AdaptedAttention(module)
            yield from _projections(wrapped[module], name)  # as they will be
        if isinstance(module, AdaptedAttention):
            yield from _projections(module, name)
        inner = module.original_module if isinstance(module, WholeModule) else module
        inner = inner.base_layer if isinstance(inner, AdaptedAttention) else inner
        for child_name, child in inner._modules.items():  # named_children() leaves out second names
            if child is not None:
                yield from walk(child, f"{name}.{child_name}" if name else child_name)

    yield from walk(model, "")


def _projections(attention: AdaptedAttention, name: str) -> list[tuple[str, nn.Module]]:
    return [(f"{name}.{n}", m) for n, m in attention.named_children() if n != "base_layer"]


def check_name(name: str) -> None:
    """Adapter names become names of modules and of folders."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_\-]*", name) or hasattr(nn.ModuleDict, name):
        raise HalotuneError(
            f"adapter name {name!r}: use letters, digits, '_' and '-' (it names a folder and a module), and none of the "
            "names that torch.nn.ModuleDict has itself, such as 'keys' or 'update'."
        )


def resolve_targets(model: nn.Module, config: AdapterConfig) -> tuple[AdapterConfig, list[str]]:
    """The configuration with its targets spelled out, and the paths of the modules they mean."""
    modules = dict(visible_modules(model))
    whole = config.modules_to_save or []
    free = {n: m for n, m in modules.items() if n and not any(_inside(n, w) for w in whole)}
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


def _warn_of_experts(modules: Mapping[str, nn.Module]) -> None:
    """Experts fused into one three-dimensional weight are no linear layers: say that "all-linear" leaves them out."""
    fused = [
        name
        for name, module in modules.items()
        if not isinstance(module, nn.modules.conv._ConvNd)
        and any(p.dim() == 3 and min(p.shape) > 1 for p in module.parameters(recurse=False))
    ]
    if fused:
        warn(
            f"target_modules='all-linear': {len(fused)} modules hold several matrices in one weight (experts) and "
            f"get no adapter, for example {fused[0]}. They can be trained whole with modules_to_save."
        )


def _expanded(paths: list[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Attention modules stand for their projections."""
    out: dict[str, None] = {}
    for path in paths:
        inside = [n for n in modules if n.startswith(f"{path}.")] if _is_attention(modules[path]) else [path]
        out.update(dict.fromkeys(inside))
    return list(out)


def _is_attention(module: nn.Module | None) -> bool:
    return isinstance(module, (nn.MultiheadAttention, AdaptedAttention))


def _kind(module: nn.Module) -> type:
    return type(module.base) if isinstance(module, AdaptedLayer) else base_kind(module) or object


def _inside(name: str, whole: str) -> bool:
    """Whether `modules_to_save` names a module, or one that it lies in; as in PEFT, "norm" names "input_norm" too."""
    parts = name.split(".")
    return any(".".join(parts[:k]).endswith(whole) for k in range(1, len(parts) + 1))


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


def inject(
    model: nn.Module,
    config: AdapterConfig,
    name: str,
    *,
    low_cpu_mem_usage: bool = False,
    autocast_adapter_dtype: bool = True,
    paths: list[str] | None = None,
) -> AdapterConfig:
    """Put an adapter named `name` on every target; the model is untouched where an error is raised.

    Args:
        low_cpu_mem_usage: create the parameters on the meta device, to be loaded afterwards.
        autocast_adapter_dtype: parameters in fp32 over a half-precision base; else in the base's dtype.
        paths: the modules to adapt, where they are known already.

    Returns:
        the configuration with its targets spelled out.
    """
    check_name(name)
    if paths is None:
        config, paths = resolve_targets(model, config)
    if isinstance(model, nn.MultiheadAttention):
        raise HalotuneError(
            "the model itself is a torch.nn.MultiheadAttention, and attention is adapted in its place in a model. Make it a "
            "submodule of one."
        )
    modules = dict(visible_modules(model))
    method = method_of(config.peft_type)
    created: dict[str, tuple[AdaptedLayer, Adapter]] = {}
    for path in paths:
        module = modules[path]
        layer = module if isinstance(module, AdaptedLayer) else AdaptedLayer(module, path)
        if name in layer.adapters:
            raise HalotuneError(f"{path}: already has an adapter named {name!r}. Delete it first, or use another name.")
        base = layer.base
        with torch.device("meta") if low_cpu_mem_usage else torch.device(base.device):
            try:
                adapter = method.create(base.shape, config.at(path))
            except HalotuneError as e:
                raise HalotuneError(f"{path}: {e}") from e
        if adapter.dropout and _is_attention(modules.get(path.rpartition(".")[0])):
            raise HalotuneError(
                f"{path}: the projections of torch.nn.MultiheadAttention are adapted as weights, where dropout is not defined; "
                f"got {adapter.dropout:g}. Set the dropout to 0, or leave the module out with exclude_modules."
            )
        created[path] = layer, adapter.to(_parameter_dtype(base.dtype, autocast_adapter_dtype))
    reading = _reading_quantized(created)
    if not low_cpu_mem_usage:
        for layer, adapter in created.values():
            adapter.start_from(layer.base)
    whole = _whole_targets(modules, config)
    check_offloaded(modules, config, paths, whole)
    for notice in [*([] if low_cpu_mem_usage else config.notices()), *reading]:
        warn(notice)
    _warn_if_tied(model, [*paths, *whole])
    swap(model, _wrapped_attention(modules, created))
    wrappers: dict[nn.Module, nn.Module] = {}
    for path, (layer, adapter) in created.items():
        layer.add(name, adapter)
        wrappers[modules[path]] = layer.train(modules[path].training)
    for path in whole:
        wrapper = modules[path] if isinstance(modules[path], WholeModule) else WholeModule(modules[path])
        wrapper.add(name)  # type: ignore[operator]
        wrappers[modules[path]] = wrapper.train(modules[path].training)
    swap(model, {old: new for old, new in wrappers.items() if old is not new})
    _leave_fused_paths(model)
    return config


def _wrapped_attention(modules: Mapping[str, nn.Module], paths: Iterable[str]) -> dict[nn.Module, nn.Module]:
    """Attention modules that are to be wrapped, since one of these paths is a projection of theirs."""
    out: dict[nn.Module, nn.Module] = {}
    for path in paths:
        parent = path.rpartition(".")[0]
        attention = modules.get(parent)
        if isinstance(attention, nn.MultiheadAttention):
            projections = (m for n, m in modules.items() if n.startswith(f"{parent}.") and isinstance(m, Projection))
            out[attention] = next(projections).__dict__["owner"]
    return out


# torch's own encoder has a fused inference path, on nested tensors, which reads weights and so passes adapters by. It takes
# that path only while these attributes are true.
_FUSED = ((nn.TransformerEncoderLayer, "activation_relu_or_gelu"), (nn.TransformerEncoder, "use_nested_tensor"))


def _leave_fused_paths(model: nn.Module, *, back: bool = False) -> None:
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


def _reading_quantized(created: Mapping[str, tuple[AdaptedLayer, Adapter]]) -> list[str]:
    """What to say of adapters that need the weight itself, of layers that have it in few bits."""
    found: list[tuple[str, Adapter, str]] = []
    for path, (layer, adapter) in created.items():
        base = layer.base
        if not (base.quantization and adapter.reads_weight(base)):
            continue
        if base.opaque:
            raise HalotuneError(
                f"{path}: {type(adapter).__name__} is a map on the weight itself, and that of {base} cannot be read. Use a "
                "method that calls the layer as it is (as HRA, LoHa, Bone and LoRA do), or load the base in floats."
            )
        found.append((path, adapter, base.quantization))
    if not found:
        return []
    path, adapter, quantization = found[0]
    return [
        f"{type(adapter).__name__} with r={adapter.rank} may need the weight itself: {len(found)} quantized layers (such as "
        f"{path}, {quantization}) are then dequantized, one at a time, in every forward and backward pass. Methods and ranks "
        "with thin factors call the layer as it is."
    ]


def _parameter_dtype(base: torch.dtype, autocast: bool) -> torch.dtype:
    half = base in (torch.float16, torch.bfloat16)
    return base if base in (torch.float32, torch.float64) or (half and not autocast) else torch.float32


def _whole_targets(modules: Mapping[str, nn.Module], config: AdapterConfig) -> list[str]:
    found: dict[nn.Module, str] = {}
    for wanted in config.modules_to_save or []:
        named = {n: m for n, m in modules.items() if n.endswith(wanted)}
        if not named and wanted not in _HEADS:  # a task's usual heads are tried, each model has one of them
            raise HalotuneError(
                f"modules_to_save: no module matches {wanted!r}. The model's top modules are "
                f"{', '.join(n for n in modules if n and '.' not in n)}."
            )
        found.update({m: n for n, m in named.items()})
    return list(found.values())


def check_bias(others: Mapping[str, AdapterConfig], config: AdapterConfig, name: str) -> None:
    """Two adapters cannot both train biases, which belong to the base."""
    if getattr(config, "bias", "none") == "none":
        return
    trained = [n for n, c in others.items() if n != name and getattr(c, "bias", "none") != "none"]
    if trained:
        raise HalotuneError(
            f"adapter {name!r}: bias={config.bias!r}, but {trained[0]!r} trains biases already, and they belong to the "  # type: ignore[attr-defined]
            'base. Use bias="none" for all adapters but one.'
        )


def tied_parameters(model: nn.Module) -> dict[int, list[str]]:
    """Parameters that several modules share: id -> all their names."""
    names: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():  # each module once, though it may have two names
        for name, p in module.named_parameters(prefix, recurse=False, remove_duplicate=False):
            names.setdefault(id(p), []).append(name)
    return {i: n for i, n in names.items() if len(n) > 1}


def _warn_if_tied(model: nn.Module, paths: list[str]) -> None:
    shared = {n: others for others in tied_parameters(model).values() for n in others}
    for path in paths:
        for key in (f"{path}.weight", f"{path}.base_layer.weight"):
            others = [n for n in shared.get(key, []) if n != key]
            if others:
                warn(
                    f"{path} shares its weight with {', '.join(others)}, which stays as it is: training acts on {path} "
                    "alone, and a merge unties the two."
                )


def swap(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put each new module in the place of the old one, wherever the model holds it."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]


def eject(model: nn.Module, *, trained: bool) -> None:
    """Take all adapters out: every layer is its base again.

    Args:
        trained: keep the active trained copies of `modules_to_save`; else the originals.
    """
    swap(model, _bases(model, trained=trained))
    _leave_fused_paths(model, back=True)


@contextmanager
def taken_out(model: nn.Module) -> Iterator[None]:
    """Inside, the model holds its own modules alone, with the weights that they have now: merged adapters stay in them."""
    bases = _bases(model, trained=any(layer.merged for layer in adapted_layers(model).values()))
    swap(model, bases)
    try:
        yield
    finally:
        swap(model, {base: wrapper for wrapper, base in bases.items()})


def _bases(model: nn.Module, *, trained: bool) -> dict[nn.Module, nn.Module]:
    """Each wrapper -> the module that it stands for."""
    bases: dict[nn.Module, nn.Module] = {layer: layer.base_layer for layer in adapted_layers(model).values()}
    for wrapper in whole_modules(model).values():
        bases[wrapper] = wrapper.current if trained else wrapper.original_module
    bases.update({m: m.base_layer for m in model.modules() if isinstance(m, AdaptedAttention)})
    return bases


# -- which adapters are active, and what is trained


def freeze(model: nn.Module) -> None:
    """Freeze what is no adapter and no trained copy."""
    ours: set[int] = set()
    for layer in adapted_layers(model).values():
        ours |= {id(p) for p in layer.adapters.parameters()}
    for wrapper in whole_modules(model).values():
        ours |= {id(p) for p in wrapper.modules_to_save.parameters()}
    for p in model.parameters():
        if id(p) not in ours:
            p.requires_grad_(False)


def train_biases(model: nn.Module, config: AdapterConfig, name: str) -> None:
    """Make trainable the biases that the configuration names."""
    bias = getattr(config, "bias", "none")
    if bias == "none":
        return
    for layer in adapted_layers(model).values() if bias != "all" else ():
        if name in layer.adapters and isinstance(layer.base.bias, nn.Parameter):
            layer.base.bias.requires_grad_(True)
    if bias == "all":
        for key, p in model.named_parameters():
            if (key == "bias" or key.endswith(".bias")) and ".original_module." not in key:
                p.requires_grad_(True)


def activate(model: nn.Module, names: list[str], trainable: bool = True) -> None:
    """Make these adapters the active ones, in this order; exactly they are trained."""
    wholes = whole_modules(model)
    for path, wrapper in wholes.items():
        wrapper.check(names, path)
    for layer in adapted_layers(model).values():
        layer.set_adapter(names, inference_mode=not trainable)
    for wrapper in wholes.values():
        wrapper.active_adapters = [n for n in names if n in wrapper.modules_to_save]
        for n, module in wrapper.modules_to_save.items():
            for p in module.parameters():
                if p.is_floating_point():
                    p.requires_grad_(trainable and n in names)


def enable(model: nn.Module, on: bool) -> None:
    for module in (*adapted_layers(model).values(), *whole_modules(model).values()):
        module.enabled = on


@contextmanager
def per_sample(
    model: nn.Module, names: Sequence[str], batch: int | None = None, modules: Sequence[Any] | None = None
) -> Iterator[None]:
    """Inside, sample i of a batch goes through adapter `names[i]`, or through the base for `"__base__"`.

    Args:
        batch: the number of samples, where it is known.
        modules: the layers with adapters, where they are no submodules of the model.
    """
    if batch is not None and len(names) != batch:
        raise HalotuneError(f"adapter_names: got {len(names)} names for a batch of {batch} samples. Give one name per sample.")
    if modules is None:
        modules = [*adapted_layers(model).values(), *whole_modules(model).values()]
    known = {n for m in modules for n in (m.adapters if isinstance(m, AdaptedLayer) else m.modules_to_save)}
    unknown = sorted(set(names) - known - {BASE})
    if unknown or not names:
        raise HalotuneError(f"adapter_names: {unknown or 'empty'}; the model has {sorted(known)}, and {BASE!r} for none.")
    if any(isinstance(m, AdaptedLayer) and m.merged for m in modules):
        raise HalotuneError("adapter_names: adapters are merged into the weights. Call unmerge_adapter() first.")
    if not all(m.enabled for m in modules):
        raise HalotuneError(f"adapter_names: adapters are disabled. Leave disable_adapter(), or name {BASE!r} for samples.")
    if model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        raise HalotuneError(
            "adapter_names: checkpointed blocks run again in backward, when the names are gone. Turn gradient checkpointing "
            "off, or train one adapter at a time."
        )
    rows = Rows(tuple(names))
    for m in modules:
        m.rows = rows
    try:
        yield
    finally:
        for m in modules:
            m.rows = None


def remove(model: nn.Module, name: str) -> None:
    """Take one adapter out; a module that has no other left is as it was before it was wrapped."""
    layers, wholes = adapted_layers(model).values(), whole_modules(model).values()
    for module in (*layers, *wholes):
        module.remove(name)
    empty: dict[nn.Module, nn.Module] = {layer: layer.base_layer for layer in layers if not layer.adapters}
    empty.update({w: w.original_module for w in wholes if not w.modules_to_save})
    swap(model, empty)
    attentions = [m for m in model.modules() if isinstance(m, AdaptedAttention) and not adapted_layers(m)]
    swap(model, {m: m.base_layer for m in attentions})
    if not any(isinstance(m, (AdaptedLayer, WholeModule)) for m in model.modules()):
        _leave_fused_paths(model, back=True)


def paths_in_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> list[str]:
    """The modules of `model` that the keys of a state dict name: the longest path that each begins with."""
    names = {n for n, _ in visible_modules(model) if n}
    found: dict[str, None] = {}
    for key in state_dict:
        parts = key.removeprefix("base_model.model.").split(".")
        for k in range(len(parts) - 1, 0, -1):
            if ".".join(parts[:k]) in names:
                found[".".join(parts[:k])] = None
                break
    return list(found)
