"""An adapter's tensors under PEFT's names, and strict reading of them.

One rule maps a parameter's path to its key: the adapter's name is taken out,

    X.adapters.default.hra_u                    <->  X.hra_u
    lm_head.modules_to_save.default.weight      <->  lm_head.weight

and biases and embeddings keep their own names.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ...core.config import AdapterConfig
from ...core.errors import AdapterFileError, HalotuneError, warn
from ..injection.modules import adapted_layers, visible_modules


class LoadResult(NamedTuple):
    """What PEFT's functions return; both lists are empty, since here each is an error."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def _configs(model: nn.Module) -> dict[str, AdapterConfig]:
    found: dict[str, AdapterConfig] = getattr(model, "peft_config", {})
    return found


def config_of(model: nn.Module, name: str) -> AdapterConfig:
    configs = _configs(model)
    if name not in configs:
        raise HalotuneError(f"there is no adapter named {name!r}; the model has {sorted(configs) or 'none'}.")
    return configs[name]


def held_tensors(model: nn.Module, keep_vars: bool = False) -> dict[str, Tensor]:
    """The state dict as far as it is parameters and buffers. Quantized layers are left alone: asked for theirs, some repack
    their weight in place (bitsandbytes on the CPU: to a wrong one).
    """
    out: dict[str, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        nn.Module._save_to_state_dict(module, out, f"{path}." if path else "", keep_vars)
    return out


def _own_keys(state_keys: list[str], name: str) -> dict[str, str]:
    """File key -> key of the model's state dict, for the adapter's own tensors and its trained modules."""
    out = {}
    for infix in (f".adapters.{name}.", f".modules_to_save.{name}."):
        out.update({key.replace(infix, ".", 1): key for key in state_keys if infix in key})
    return out


def _bias_keys(model: nn.Module, state_keys: list[str], name: str, bias: str) -> list[str]:
    if bias == "none":
        return []
    if bias == "all":
        skipped = (".adapters.", ".modules_to_save.", ".original_module.")
        return [k for k in state_keys if k.rsplit(".", 1)[-1] == "bias" and not any(s in k for s in skipped)]
    known = set(state_keys)
    layers = [path for path, layer in adapted_layers(model).items() if name in layer.adapters]
    return [k for k in (f"{path}.base_layer.bias" for path in layers) if k in known]


def embedding_keys(model: nn.Module, state_keys: list[str]) -> list[str]:
    """Keys of the input and output embeddings, adapted ones through their base."""
    embeddings = []
    for get in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, get)()
        except (AttributeError, NotImplementedError):
            continue
        embeddings.append(module)
    paths = [n for n, m in visible_modules(model) if any(m is e for e in embeddings if e is not None)]
    wanted = {f"{p}{infix}.weight" for p in paths for infix in ("", ".base_layer")}
    return [k for k in state_keys if k in wanted]


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> dict[str, Tensor]:
    """The tensors of one adapter, under the keys of PEFT's files.

    Args:
        model: a `PeftModel`, or any module that adapters were put into.
        state_dict: the model's state dict, where it is at hand already.
        adapter_name: which adapter.
        unwrap_compiled: take the model out of `torch.compile`'s wrapper first.
        save_embedding_layers: store input and output embeddings too; "auto": those that are targets, and both where the
            vocabulary was resized.
    """
    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
    config = config_of(model, adapter_name)
    tensors = held_tensors(model) if state_dict is None else state_dict
    merged = {f"{p}.base_layer.weight": layer for p, layer in adapted_layers(model).items() if layer.merged}
    tensors = {**tensors, **{key: layer.original_weight for key, layer in merged.items() if key in tensors}}
    keys = list(tensors)
    out = {file_key: tensors[key] for file_key, key in _own_keys(keys, adapter_name).items()}
    out.update({key: tensors[key] for key in _bias_keys(model, keys, adapter_name, config.bias)})
    embeddings = embedding_keys(model, keys) if save_embedding_layers else []
    if save_embedding_layers == "auto" and not vocabulary_differs(model, config):
        layers = adapted_layers(model)
        targets = {f"{path}.base_layer.weight" for path, layer in layers.items() if adapter_name in layer.adapters}
        embeddings = [key for key in embeddings if key in targets]
    out.update({key: tensors[key] for key in embeddings if key not in out})
    return out


def vocabulary_differs(model: nn.Module, config: AdapterConfig) -> bool:
    """Whether the model holds another number of words than the base model's own file says."""
    base = config.base_model_name_or_path
    here = getattr(getattr(model, "config", None), "vocab_size", None)
    if not base or here is None:
        return False
    from ...core.files import read_json

    file = Path(base) / "config.json"
    if not file.is_file():
        try:
            from huggingface_hub import try_to_load_from_cache

            cached = try_to_load_from_cache(base, "config.json", revision=config.revision)
        except (ImportError, ValueError):
            return False
        if not isinstance(cached, str):
            return False
        file = Path(cached)
    return read_json(file).get("vocab_size", here) != here


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
    *,
    file: str | PathLike[str] = "the state dict",
    keep_dtype: bool = False,
) -> LoadResult:
    """Load an adapter's tensors; the model is untouched where an error is raised.

    Args:
        model: a `PeftModel`, or any module that adapters were put into.
        peft_model_state_dict: tensors under the keys of PEFT's files.
        adapter_name: the adapter that they are of.
        ignore_mismatched_sizes: leave tensors of another shape out, with a warning.
        low_cpu_mem_usage: replace parameters (of the meta device, say) instead of copying into them.
        file: what errors call the source.
        keep_dtype: parameters take the dtype of the tensors.

    Raises:
        AdapterFileError: missing, extra, misshapen or non-finite tensors.
    """
    config = config_of(model, adapter_name)
    if any(adapter_name in layer.merged_adapters for layer in adapted_layers(model).values()):
        raise HalotuneError(
            f"adapter {adapter_name!r} is merged into the weights, which new tensors would not change. Call "
            "unmerge_adapter() first."
        )
    tensors = _dropping_ignored(dict(peft_model_state_dict))
    state = held_tensors(model, keep_vars=True)
    keys = list(state)
    expected = _own_keys(keys, adapter_name)
    biases = {k: k for k in _bias_keys(model, keys, adapter_name, config.bias)}
    optional = {k: k for k in embedding_keys(model, keys)}
    tensors = _under_prefix_of(tensors, {*expected, *biases, *optional})
    _check_keys(tensors, expected, biases, optional, file)
    targets = {**optional, **biases, **expected}
    for key in list(tensors):
        if not _fits(key, tensors[key], state[targets[key]], ignore_mismatched_sizes, file):
            del tensors[key]
    _warn_of_changed_embeddings({k: t for k, t in tensors.items() if k in optional}, state, file)
    for key, tensor in tensors.items():
        _assign(model, targets[key], tensor, replace=low_cpu_mem_usage or keep_dtype, keep_dtype=keep_dtype)
    _pass_on_warnings(model, adapter_name)
    return LoadResult([], [])


_PREFIXES = ("base_model.model.", "model.", "")  # of a PeftModel, an AdapterModel, a bare module


def _under_prefix_of(tensors: dict[str, Tensor], known: set[str]) -> dict[str, Tensor]:
    """The tensors under the prefix of the model at hand, whichever of the three they were written under."""
    if not tensors or known & tensors.keys():
        return tensors
    for old in _PREFIXES:
        for new in _PREFIXES:
            renamed = {new + key.removeprefix(old): t for key, t in tensors.items() if key.startswith(old)}
            if len(renamed) == len(tensors) and known & renamed.keys():
                return renamed
    return tensors


def _dropping_ignored(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """peft's bias="all" also writes biases of the originals of `modules_to_save`, which never run."""
    return {k: t for k, t in tensors.items() if ".original_module." not in k}


def _check_keys(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, str],
    biases: Mapping[str, str],
    optional: Mapping[str, str],
    file: str | PathLike[str],
) -> None:
    extra = [k for k in tensors if k not in expected and k not in biases and k not in optional]
    missing = [k for k in expected if k not in tensors]
    if extra and any(k.startswith(("lora_unet_", "lora_transformer_", "lora_te", "lycoris_")) for k in extra):
        raise AdapterFileError(
            file,
            "the names are those of kohya and LyCORIS, not of PEFT.",
            key=extra[0],
            remedy="Convert it (halotune convert FILE --to peft --base MODEL --output FOLDER), or load it with "
            "halotune.load_lycoris(model, file). Nothing was loaded.",
        )
    if extra or missing:
        first = (extra or missing)[0]
        raise AdapterFileError(
            file,
            f"{_listed(missing, 'missing')}{' and ' if extra and missing else ''}{_listed(extra, 'not of this adapter')}.",
            key=first,
            remedy="Use the adapter_config.json of the same adapter, and the base model that it was trained on.",
        )
    absent = [k for k in biases if k not in tensors]
    if absent:
        warn(
            f"{file}: the configuration trains biases, but the file lacks {len(absent)} of them (peft before 0.16 did "
            f"not store those of all methods): {', '.join(absent)}. The base model's own are used, so outputs may differ."
        )


def _listed(keys: list[str], what: str) -> str:
    if not keys:
        return ""
    shown = ", ".join(keys[:3]) + (f" … ({len(keys)} in all)" if len(keys) > 3 else "")
    return f"{what}: {shown}"


def _fits(key: str, tensor: Tensor, target: Tensor, ignore_shape: bool, file: str | PathLike[str]) -> bool:
    if tensor.shape != target.shape:
        sizes = f"expected {tuple(target.shape)}, found {tuple(tensor.shape)}"
        if ignore_shape:
            warn(f"{file}: {key}: {sizes}; left out, as ignore_mismatched_sizes asks.")
            return False
        raise AdapterFileError(
            file,
            f"{sizes}.",
            key=key,
            remedy="Use the rank in adapter_config.json and the base model that belong to this file.",
        )
    if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
        what = f"{tensor.dtype}" if not tensor.is_floating_point() else "values that are not finite"
        raise AdapterFileError(
            file,
            f"expected finite floating-point numbers, found {what}.",
            key=key,
            remedy="Get the file again: it is damaged, or its training diverged.",
        )
    return True


def _warn_of_changed_embeddings(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor], file: str | PathLike[str]) -> None:
    changed = [k for k, t in tensors.items() if not torch.equal(t.to(state[k]), state[k].detach())]
    if changed:
        warn(
            f"{file}: holds embeddings that differ from the base model's, which they replace: {', '.join(changed)}; a "
            "module that shares such a weight changes with it."
        )


@torch.no_grad()
def _assign(model: nn.Module, key: str, tensor: Tensor, *, replace: bool, keep_dtype: bool) -> None:
    path, _, leaf = key.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, leaf)
    ours = ".adapters." in key or ".modules_to_save." in key
    if not old.is_meta and not (replace and ours):  # a tensor of the base may be shared: it stays the same object
        old.copy_(tensor)
        return
    device = _device_beside(model, path) if old.is_meta else old.device
    dtype = tensor.dtype if keep_dtype and ours else old.dtype
    new = tensor.to(device=device, dtype=dtype, copy=True)
    setattr(module, leaf, nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new)


def _device_beside(model: nn.Module, path: str) -> torch.device:
    """Where a parameter of the meta device belongs: where its layer runs, or beside the module that it is a copy of."""
    owner, in_layer, _ = path.partition(".adapters.")
    if in_layer:
        return model.get_submodule(owner).base.device  # type: ignore[union-attr, return-value]
    owner, _, _ = path.partition(".modules_to_save")
    return next(model.get_submodule(f"{owner}.original_module").parameters()).device


def _pass_on_warnings(model: nn.Module, name: str) -> None:
    found: dict[str, list[str]] = {}
    for path, layer in adapted_layers(model).items():
        if name in layer.adapters:
            warning = layer.adapters[name].loading_warning()  # type: ignore[operator]
            if warning:
                found.setdefault(warning, []).append(path.removeprefix("base_model.model."))
    for warning, paths in found.items():
        warn(f"adapter {name!r}, {', '.join(paths)}: {warning}.")


# -- files


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        AdapterFileError: it is damaged, or empty.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as e:
        size = file.stat().st_size
        raise AdapterFileError(
            file,
            f"cannot be read as safetensors ({size} bytes: {e}).",
            remedy="It is truncated or damaged: get it again.",
        ) from e
    if not tensors:
        raise AdapterFileError(file, "holds no tensor.", remedy="Save the adapter again.")
    return tensors


def read_metadata(file: Path) -> dict[str, str]:
    """The strings stored beside the tensors of a safetensors file that `read_tensors` can read."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return {k: v for k, v in (opened.metadata() or {}).items() if k != "format"}


def write_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, atomically; tensors that share memory are stored each on its own."""
    from safetensors.torch import save_file

    from ...core.files import write_atomically

    own: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, t in tensors.items():
        t = t.detach().contiguous()
        own[key] = t.clone() if t.data_ptr() in seen else t
        seen.add(t.data_ptr())
    write_atomically(file, lambda path: save_file(own, path, metadata={"format": "pt", **(metadata or {})}))
