"""An adapter's tensors under PEFT's names (`keys.py`), and strict reading of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ...core.config import AdapterConfig
from ...core.errors import AdapterFileError, HalotuneError, few, warn
from ...core.files import write_atomically
from ...core.offload import at_rest
from ...core.sharded_parameters import divided_like, is_sharded, require_unflattened, reshard, store, whole, whole_size
from ..injection.modules import adapted_layers, innermost, plain_modules, unwrapped
from .experts import as_written, from_written
from .keys import adapter_keys, bias_keys, config_of, embedding_keys, held_tensors, under_own_names, without_sharding


class LoadResult(NamedTuple):
    """What PEFT's functions return; both lists are empty, since here each is an error."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> dict[str, Tensor]:
    """The tensors of one adapter, under the keys of PEFT's files.

    Args:
        model: a `PeftModel`, or any module that adapters were put into; also inside the wrappers of `torch.compile`,
            DistributedDataParallel and FSDP.
        state_dict: the model's state dict, where it is at hand already; what it lacks is left out.
        adapter_name: which adapter.
        unwrap_compiled: accepted for PEFT's sake; the model is always taken out of its wrappers.
        save_embedding_layers: store input and output embeddings too; "auto": those that are targets, and both where the
            vocabulary was resized.
    """
    found = adapter_tensors(model, adapter_name, state_dict, save_embedding_layers)[0]
    return as_written(
        model, adapter_name, config_of(model, adapter_name), {key: t for key, t in found.items() if t is not None}
    )


def adapter_tensors(
    model: nn.Module,
    name: str,
    state_dict: Mapping[str, Tensor] | None = None,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> tuple[dict[str, Tensor | None], set[str]]:
    """The tensors of one adapter by file key, None where a given state dict lacks one; and which are biases and embeddings."""
    model = unwrapped(model)
    config = config_of(model, name)
    held = {key: t if is_sharded(t) else t.detach() for key, t in held_tensors(model, keep_vars=True).items()}
    own = adapter_keys(model, name)
    biases = bias_keys(model, held, name, config.bias)
    embeddings = embedding_keys(model, held) if save_embedding_layers else []
    if save_embedding_layers == "auto" and not vocabulary_differs(model, config):
        layers = adapted_layers(model)
        targets = {f"{path}.base_layer.weight" for path, layer in layers.items() if name in layer.adapters}
        embeddings = [key for key in embeddings if key in targets]
    beside = {key: key for key in (*biases, *embeddings) if key not in own}
    tensors: Mapping[str, Tensor] = held
    if state_dict is not None:
        state_dict = from_written(model, name, config, state_dict, "the state dict")
        tensors = under_own_names(state_dict, {*own.values(), *beside})
        if not any(key in tensors for key in own.values()):  # it has a file's keys already, perhaps
            tensors = under_own_names(state_dict, {*own, *beside})
    merged = {f"{p}.base_layer.weight": layer for p, layer in adapted_layers(model).items() if layer.merged}
    tensors = {**tensors, **{key: layer.original_weight for key, layer in merged.items() if key in tensors}}
    found = {key: tensors.get(at, tensors.get(key)) for key, at in {**own, **beside}.items()}
    for key in beside:  # of the base, which may be tensor-parallel, or offloaded
        found[key] = None if (t := found[key]) is None else whole(_at_rest(model, key) if t.is_meta else t)
    return found, set(beside)


def vocabulary_differs(model: nn.Module, config: AdapterConfig) -> bool:
    """Whether the model holds another number of words than the base model's own file says, in itself or in a part of it."""
    base, here = config.base_model_name_or_path, getattr(innermost(model), "config", None)
    if not base or here is None or not hasattr(here, "get_text_config"):  # only transformers' have a vocabulary to resize
        return False
    kind: Any = type(here)
    where = {"revision": config.revision or "main", "local_files_only": True}
    try:  # a folder without the file, a pipeline's, gives an empty one
        if not kind.get_config_dict(base, **where)[0]:
            return False
        there = kind.from_pretrained(base, **where)  # which fills in what the file leaves out
    except (OSError, ValueError):  # not here, or of another class
        return False
    return _vocabularies(here.to_dict()) != _vocabularies(there.to_dict())


def _vocabularies(entries: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Every `vocab_size` of a configuration and of those inside it, by its path."""
    out = {path: entries["vocab_size"]} if "vocab_size" in entries else {}
    for key, inner in entries.items():
        if isinstance(inner, dict):
            out.update(_vocabularies(inner, f"{path}.{key}"))
    return out


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
    model = unwrapped(model)
    reshard(model)
    require_unflattened(model, f"adapter {adapter_name!r} cannot be loaded")
    if any(adapter_name in layer.merged_adapters for layer in adapted_layers(model).values()):
        raise HalotuneError(
            f"adapter {adapter_name!r} is merged into the weights, which new tensors would not change. Call "
            "unmerge_adapter() first."
        )
    state = held_tensors(model, keep_vars=True)
    tensors, targets = _placed(model, peft_model_state_dict, adapter_name, state, file)
    for key in list(tensors):
        if not _fits(key, tensors[key], state[targets[key]], ignore_mismatched_sizes, file):
            del tensors[key]
    embeddings = set(embedding_keys(model, state)) - adapter_keys(model, adapter_name).keys()
    tensors = _without_equal_embeddings(model, tensors, embeddings, state, file)
    modules = dict(plain_modules(model))
    for key, tensor in tensors.items():
        _assign(modules, targets[key], tensor, replace=low_cpu_mem_usage or keep_dtype, keep_dtype=keep_dtype)
    _pass_on_warnings(model, adapter_name)
    return LoadResult([], [])


def keys_in_model(
    model: nn.Module, tensors: Mapping[str, Tensor], adapter_name: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """An adapter's tensors, checked, and for each of their keys that of the model's own state dict."""
    inner = unwrapped(model)
    checked, targets = _placed(inner, tensors, adapter_name, held_tensors(inner), "the state dict")
    modules, paths = dict(plain_modules(model)), {m: path for path, m in model.named_modules()}

    def in_state_dict(key: str) -> str:
        path, _, leaf = key.rpartition(".")
        return without_sharding(f"{paths[modules[path]]}.{leaf}")

    return checked, {key: in_state_dict(at) for key, at in targets.items()}


def _placed(
    model: nn.Module, given: Mapping[str, Tensor], name: str, state: Mapping[str, Tensor], file: str | PathLike[str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors under a file's keys, checked to be those of this adapter; and for each key that of the state dict."""
    expected = adapter_keys(model, name)
    biases = {k: k for k in bias_keys(model, state, name, config_of(model, name).bias)}
    optional = {k: k for k in embedding_keys(model, state)}
    given = from_written(model, name, config_of(model, name), _dropping_ignored(given), file)
    tensors = dict(under_own_names(given, expected))
    _check_keys(tensors, expected, biases, optional, file)
    return tensors, {**optional, **biases, **expected}


def _dropping_ignored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """peft also writes originals of `modules_to_save`, which never run, with bias="all"; and with embeddings, copies twice."""
    twice = {k for k in tensors if ".modules_to_save." in k and k.replace(".modules_to_save.", ".") in tensors}
    return {k: t for k, t in tensors.items() if ".original_module." not in k and k not in twice}


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
        found = {"missing": missing, "not of this adapter": extra}
        raise AdapterFileError(
            file,
            " and ".join(f"{what}: {few(keys)}" for what, keys in found.items() if keys) + ".",
            key=(extra or missing)[0],
            remedy="Use the adapter_config.json of the same adapter, and the base model that it was trained on.",
        )
    absent = [k for k in biases if k not in tensors]
    if absent:
        warn(
            f"{file}: the configuration trains biases, but the file lacks {len(absent)} of them (peft before 0.16 did "
            f"not store those of all methods): {', '.join(absent)}. The base model's own are used, so outputs may differ."
        )


def _fits(key: str, tensor: Tensor, target: Tensor, ignore_shape: bool, file: str | PathLike[str]) -> bool:
    if tensor.shape != (size := whole_size(target)):
        sizes = f"expected {tuple(size)}, found {tuple(tensor.shape)}"
        if ignore_shape:
            warn(f"{file}: {key}: {sizes}; left out, as ignore_mismatched_sizes asks.")
            return False
        raise AdapterFileError(
            file,
            f"{sizes}.",
            key=key,
            remedy="Use the rank in adapter_config.json and the base model that belong to this file.",
        )
    if not target.is_floating_point():  # a counter in a fully fine-tuned module, say
        return True
    if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
        what = f"{tensor.dtype}" if not tensor.is_floating_point() else "values that are not finite"
        raise AdapterFileError(
            file,
            f"expected finite floating-point numbers, found {what}.",
            key=key,
            remedy="Get the file again: it is damaged, or its training diverged.",
        )
    return True


def _without_equal_embeddings(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    embeddings: Set[str],
    state: Mapping[str, Tensor],
    file: str | PathLike[str],
) -> dict[str, Tensor]:
    """The tensors but for embeddings that the base has already; a warning of those that it has otherwise."""
    changed = []
    for key in sorted(embeddings & tensors.keys()):
        own = _at_rest(model, key) if state[key].is_meta else whole(state[key])
        if own.is_meta or not torch.equal(tensors[key].to(own.device, own.dtype), own.detach()):
            changed.append(key)
    for key in changed:
        if state[key].is_meta:
            raise AdapterFileError(
                file,
                "embeddings that differ from the base model's cannot replace them, since those are not in memory.",
                key=key,
                remedy="Load the base's weights first, and keep its embeddings out of accelerate's offloading (device_map).",
            )
    if changed:
        warn(
            f"{file}: holds embeddings that differ from the base model's, which they replace: {', '.join(changed)}; a "
            "module that shares such a weight changes with it."
        )
    return {key: t for key, t in tensors.items() if key not in embeddings or key in changed}


def _at_rest(model: nn.Module, key: str) -> Tensor:
    path, _, leaf = key.rpartition(".")
    return at_rest(dict(plain_modules(model))[path], leaf)


@torch.no_grad()
def _assign(modules: Mapping[str, nn.Module], key: str, tensor: Tensor, *, replace: bool, keep_dtype: bool) -> None:
    path, _, leaf = key.rpartition(".")
    module = modules[path]
    old = getattr(module, leaf)
    ours = ".adapters." in key or ".modules_to_save." in key
    in_place = is_sharded(old) or not (replace and ours)  # a tensor of the base may be shared: it stays the same object
    if in_place and not old.is_meta:
        store(old, tensor)
        return
    device = _device_beside(modules, path) if old.is_meta else old.device
    dtype = tensor.dtype if keep_dtype and ours else old.dtype
    new = divided_like(old, tensor).to(device=device, dtype=dtype, copy=True)
    setattr(module, leaf, nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new)


def _device_beside(modules: Mapping[str, nn.Module], path: str) -> torch.device:
    """Where a parameter of the meta device belongs: where its layer runs, or beside the module that it is a copy of."""
    owner, in_layer, _ = path.partition(".adapters.")
    if in_layer:
        return modules[owner].base.device  # type: ignore[union-attr, return-value]
    owner, _, _ = path.partition(".modules_to_save")
    return next(modules[f"{owner}.original_module"].parameters()).device


def _pass_on_warnings(model: nn.Module, name: str) -> None:
    found: dict[str, list[str]] = {}
    for path, layer in adapted_layers(model).items():
        if name in layer.adapters:
            adapter = layer.adapters[name]
            warning = adapter.loading_warning(*adapter.parameters())  # type: ignore[operator]
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
    write_atomically(file, filled_with(tensors, metadata))


def filled_with(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Callable[[Path], None]:
    """What fills a safetensors file."""
    from safetensors.torch import save_file

    own: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, t in tensors.items():
        t = t.detach().contiguous()
        own[key] = t.clone() if t.data_ptr() in seen else t
        seen.add(t.data_ptr())
    return lambda path: save_file(own, path, metadata={"format": "pt", **(metadata or {})})
