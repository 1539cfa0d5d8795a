"""The modules of a model, and which of them have adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

from torch import Tensor, nn

from ...core.attention import AdaptedAttention
from ...core.experts import AdaptedExperts, ExpertWeights, is_experts
from ...core.layer import AdaptedLayer
from ...core.wrapper import PerAdapter, Wrapper
from .modules_to_save import ModulesToSaveWrapper

M = TypeVar("M", bound=nn.Module)

HOLDERS = (AdaptedAttention, AdaptedExperts)  # of adapters on parameters of the module that they wrap


def public_path(path: str) -> str:
    """A layer's path as configurations and reports name it: attention's output projection lies in its base layer."""
    return path.replace(".base_layer.", ".")


def _wraps(module: nn.Module) -> str | None:
    """What a wrapper of torch's calls the module inside: `torch.compile`, FSDP, checkpoints, (Distributed)DataParallel."""
    for name in ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"):
        if name in module._modules:
            return name
    return "module" if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)) else None


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside all of torch's wrappers around it."""
    while (name := _wraps(module)) is not None:
        module = module._modules[name]  # type: ignore[assignment]
    return module


def innermost(model: nn.Module) -> nn.Module:
    """The base model, inside our own wrappers too."""
    while isinstance(model := unwrapped(model), Wrapper):
        model = getattr(model, model._wraps)
    return model


def plain_modules(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """As `named_modules(remove_duplicate=False)`, without torch's wrappers: neither they nor their names are there."""
    model = unwrapped(model)
    yield path, model
    for name, child in model._modules.items():
        if child is not None:
            yield from plain_modules(child, f"{path}.{name}" if path else name)


def _of_kind(model: nn.Module, kind: type[M]) -> dict[str, M]:
    """Each once, under its first name."""
    found: dict[M, str] = {}
    for path, module in plain_modules(model):
        if isinstance(module, kind):
            found.setdefault(module, path)
    return {path: module for module, path in found.items()}


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """Every adapted layer, by its path in `model`."""
    return _of_kind(model, AdaptedLayer)


def modules_to_save_wrappers(model: nn.Module) -> dict[str, ModulesToSaveWrapper]:
    """Every module with trained copies, by its path in `model`."""
    return _of_kind(model, ModulesToSaveWrapper)


def per_adapter(model: nn.Module) -> dict[str, PerAdapter]:
    """All of both, by their paths in `model`."""
    return _of_kind(model, PerAdapter)


def visible_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's own modules under the names they had before any was wrapped."""

    wrapped: dict[nn.Module, AdaptedAttention | AdaptedExperts] = {}

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        module = unwrapped(module)
        yield name, module
        if isinstance(module, AdaptedLayer):
            return
        if isinstance(module, HOLDERS):
            yield from _projections(module, name)
        elif isinstance(module, nn.MultiheadAttention) or is_experts(module):
            if module not in wrapped:  # under a second name it is the same
                kind = AdaptedAttention if isinstance(module, nn.MultiheadAttention) else AdaptedExperts
                wrapped[module] = kind(module)  # type: ignore[arg-type]
            yield from _projections(wrapped[module], name)  # as they will be
        inner = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
        inner = inner.base_layer if isinstance(inner, HOLDERS) else inner
        for child_name, child in inner._modules.items():  # named_children() leaves out second names
            if child is not None:
                yield from walk(child, f"{name}.{child_name}" if name else child_name)

    yield from walk(model, "")


def _projections(holder: AdaptedAttention | AdaptedExperts, name: str) -> list[tuple[str, nn.Module]]:
    return [(f"{name}.{n}" if name else n, m) for n, m in holder.named_children() if n != "base_layer"]


def is_attention(module: nn.Module | None) -> bool:
    return isinstance(module, (nn.MultiheadAttention, AdaptedAttention))


def is_expert_weights(module: nn.Module) -> bool:
    """Whether it is a projection of all experts of a module, with adapters or without."""
    return isinstance(module.base_layer if isinstance(module, AdaptedLayer) else module, ExpertWeights)


def tied_parameters(model: nn.Module) -> list[list[str]]:
    """Parameters, or memory, that several modules share: all names of each."""
    names: dict[int, list[str]] = {}
    for prefix, module in _of_kind(model, nn.Module).items():  # each module once, though it may have two names
        for name, p in module.named_parameters(prefix, recurse=False, remove_duplicate=False):
            plain = type(p) is nn.Parameter and not p.is_meta and p.numel() > 0
            names.setdefault(p.data_ptr() if plain else id(p), []).append(name)
    return [n for n in names.values() if len(n) > 1]


def paths_in_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> list[str]:
    """The modules of `model` that the keys of a state dict name: the longest path that each begins with."""
    names = {n for n, _ in visible_modules(model) if n}
    found: dict[str, None] = {}
    for key in state_dict:
        path = key.removeprefix("base_model.model.").rpartition(".")[0]
        while path and path not in names:
            path = path.rpartition(".")[0]
        if path:
            found[path] = None
    return list(found)
