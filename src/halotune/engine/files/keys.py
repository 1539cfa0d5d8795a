"""What a file of an adapter holds: the keys of its tensors, and the check that our own reader finds what it asks for.

One rule maps a parameter's path to its key: the adapter's name is taken out,

    X.adapters.default.hra_u                    <->  X.hra_u
    lm_head.modules_to_save.default.weight      <->  lm_head.weight

and biases and embeddings keep their own names. Names are those of the plain model: what `torch.compile`, FSDP and
DistributedDataParallel put into them is never there.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress

import torch
from torch import Tensor, nn

from ...core.base import base_for
from ...core.config import AdapterConfig
from ...core.errors import HalotuneError, few
from ...core.layer import AdaptedLayer
from ...core.sharded_parameters import whole_size
from ...core.wrapper import PerAdapter
from ...methods.registry import method_of
from ..injection.experts import create
from ..injection.modules import adapted_layers, innermost, is_attention, plain_modules, visible_modules
from ..injection.modules_to_save import ModulesToSaveWrapper
from ..injection.resolve import modules_to_save_paths, named_paths

PREFIX = "base_model.model."  # of every key in a file

PREFIXES = (PREFIX, "model.", "")  # of a PeftModel, an AdapterModel, a bare module
_COMPILED = re.compile(r"(?<![^.])_orig_mod\.")
_SHARDING = re.compile(r"(?<![^.])(_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PARALLEL = re.compile(r"(?<![^.])module\.")  # of DistributedDataParallel; it may be a model's own name, too


def config_of(model: nn.Module, name: str) -> AdapterConfig:
    configs: dict[str, AdapterConfig] = getattr(model, "peft_config", {})
    if name not in configs:
        raise HalotuneError(f"there is no adapter named {name!r}; the model has {sorted(configs) or 'none'}.")
    return configs[name]


def held_tensors(model: nn.Module, keep_vars: bool = False) -> dict[str, Tensor]:
    """The state dict as far as it is parameters and buffers, under plain names. Quantized layers are left alone: asked for
    theirs, some repack their weight in place (bitsandbytes on the CPU: to a wrong one).
    """
    out: dict[str, Tensor] = {}
    for path, module in plain_modules(model):
        nn.Module._save_to_state_dict(module, out, f"{path}." if path else "", keep_vars)
    return out


def adapter_keys(model: nn.Module, name: str) -> dict[str, str]:
    """File key -> key of the model's state dict, for an adapter's own tensors and its trained modules."""
    out = {}
    for path, module in plain_modules(model):
        if isinstance(module, PerAdapter) and name in module.by_name:
            outer = f"{path}." if path else ""
            for key in held_tensors(module.by_name[name]):
                out[f"{outer}{key}".replace(".original_module.", ".")] = f"{outer}{module._holds}.{name}.{key}"
    return out


def bias_keys(model: nn.Module, state_keys: Iterable[str], name: str, bias: str) -> list[str]:
    if bias == "none":
        return []
    if bias == "all":
        skipped = (".adapters.", ".modules_to_save.", ".original_module.")
        return [k for k in state_keys if k.rsplit(".", 1)[-1] == "bias" and not any(s in k for s in skipped)]
    known = set(state_keys)
    layers = [path for path, layer in adapted_layers(model).items() if name in layer.adapters]
    return [k for k in (f"{path}.base_layer.bias" for path in layers) if k in known]


def embedding_keys(model: nn.Module, state_keys: Iterable[str]) -> list[str]:
    """Keys of the input and output embeddings, adapted ones through their base."""
    embeddings = []
    for get in ("get_input_embeddings", "get_output_embeddings"):
        with suppress(AttributeError, NotImplementedError):
            embeddings.append(getattr(innermost(model), get)())
    paths = [n for n, m in visible_modules(model) if any(m is e for e in embeddings if e is not None)]
    wanted = {f"{p}{infix}.weight" for p in paths for infix in ("", ".base_layer")}
    return [k for k in state_keys if k in wanted]


def without_sharding(key: str) -> str:
    """A key as FSDP writes it into a state dict: without the names of its own units, and of checkpoints'."""
    return _SHARDING.sub("", key)


def under_own_names(given: Mapping[str, Tensor], wanted: Collection[str]) -> Mapping[str, Tensor]:
    """Given tensors under a model's plain names: what wrappers put into their names is taken off, and of the prefixes of a
    PeftModel, an AdapterModel and a bare module the one is taken under which most of the wanted names are found.
    """
    best, most = given, sum(key in given for key in wanted)
    bare = {_COMPILED.sub("", without_sharding(key)): t for key, t in given.items()}
    for named in (bare, {_PARALLEL.sub("", key): t for key, t in bare.items()}):
        for old in PREFIXES:
            for new in PREFIXES:
                if most == len(wanted):
                    return best
                renamed = {new + key.removeprefix(old): t for key, t in named.items() if key.startswith(old)}
                found = sum(key in renamed for key in wanted)
                if found > most:
                    best, most = renamed, found
    return best


# -- the check


def asked(model: nn.Module, config: AdapterConfig) -> dict[str, torch.Size]:
    """What reading an adapter of this configuration into this base model asks for: file key -> shape.

    The model may have adapters already; the configuration has its targets spelled out.
    """
    named = list(visible_modules(model))
    modules, method = dict(named), method_of(config.peft_type)
    targets = {modules[path]: path for path in named_paths(modules, config)}
    copied = {modules[path] for path in modules_to_save_paths(modules, config)}
    made: dict[object, dict[str, torch.Size]] = {}
    out: dict[str, torch.Size] = {}
    for path, module in named:  # a layer may have several names
        if module in targets:
            shape = module.base.shape if isinstance(module, AdaptedLayer) else base_for(module, path).shape
            own = config.at(targets[module])
            stored = module.base_layer if isinstance(module, AdaptedLayer) else module
            same = shape, getattr(stored, "experts", None)
            key = same if own is config else (same, targets[module])
            if key not in made:
                with torch.device("meta"):
                    made[key] = {k: t.shape for k, t in held_tensors(create(method, stored, shape, own)).items()}
            out.update({f"{PREFIX}{_path_in_file(path, modules)}.{k}": size for k, size in made[key].items()})
        if module in copied:
            copies = module.modules_to_save.values() if isinstance(module, ModulesToSaveWrapper) else ()
            copy = next(iter(copies), module)  # the original may have another adapter in it
            out.update({f"{PREFIX}{path}.{k}": whole_size(t) for k, t in held_tensors(copy).items()})
    return out


def _path_in_file(path: str, modules: Mapping[str, nn.Module]) -> str:
    """Attention's output projection lies in its base there."""
    parent, _, leaf = path.rpartition(".")
    return f"{parent}.base_layer.{leaf}" if leaf == "out_proj" and is_attention(modules.get(parent)) else path


def check_readable(
    model: nn.Module, config: AdapterConfig, tensors: Mapping[str, Tensor | None], beside: Collection[str] = ()
) -> dict[str, Tensor]:
    """Refuse to write what our own reader would refuse, with this configuration on this base model.

    Args:
        tensors: by file key; None where there should be one.
        beside: keys that may be there too: biases, embeddings.

    Returns:
        the tensors.

    Raises:
        HalotuneError: a tensor is missing, not asked for, of another shape, sharded, or not finite.
    """
    shapes = asked(model, config)
    missing = [k for k, t in tensors.items() if t is None] or [k for k in shapes if k not in tensors]
    extra = [k for k in tensors if k not in shapes and k not in beside]
    if missing and not extra:
        raise _refused(
            f"{few(missing)} missing",
            "Pass the state dict of the whole model as state_dict (of all its shards, where it is sharded), or leave it out.",
        )
    if extra:
        raise _refused(
            f"the configuration asks for other tensors than the adapter has ({few(extra)} not asked for, "
            f"{few(missing) if missing else 'none'} missing)",
            "Its target_modules, modules_to_save and ranks must name what was adapted: change none of them after wrapping.",
        )
    present = {key: t for key, t in tensors.items() if t is not None}
    for key, t in present.items():
        shape = shapes.get(key, t.shape)
        if t.shape != shape or t.is_meta or hasattr(t, "full_tensor"):
            found = "is on the meta device" if t.is_meta else "is a DTensor" if t.shape == shape else f"has {tuple(t.shape)}"
            raise _refused(
                f"{key} {found} where {tuple(shape)} is asked for",
                "Call save_pretrained on every process without a state dict, which gathers the adapter (FSDP2, ZeRO-3); or "
                "pass the whole one: state_dict=accelerator.get_state_dict(model), and for FSDP1 torch's FULL_STATE_DICT.",
            )
        if t.is_floating_point() and not torch.isfinite(t).all():
            raise _refused(f"{key} holds values that are not finite", "The training has diverged: lower its learning rate.")
    return present


def _refused(problem: str, remedy: str) -> HalotuneError:
    return HalotuneError(f"nothing was written, since it could not be read back: {problem}. {remedy}")
