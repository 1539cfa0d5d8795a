"""From file to file: an adapter in one format is written in another, without the base model's weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from ..core.config import BOOKKEEPING, AdapterConfig
from ..core.errors import AdapterFileError, HalotuneError
from ..core.files import CONFIG_NAME, WEIGHTS_NAME, locate
from ..engine.files.keys import check_readable, embedding_keys, held_tensors
from ..engine.files.save import write_adapter
from ..engine.files.state_dict import read_metadata, read_tensors, write_tensors
from ..export.components import COMPONENTS, component_of, kohya_prefix
from ..methods.registry import method_of, methods, under_alias
from .base import BaseLayers, load_bases
from .loading import check_names, check_output, left_out, read_lycoris
from .lycoris import PEFT_PREFIX, PREFIXES, LycorisFile, StoredAdapter, is_lycoris
from .reading import Resolved, best_prefixes, check_written, resolve
from .writing import class_of_base, metadata_for, write

FORMATS = ("peft", *sorted(name.lower() for m in methods() for name in m.aliases), "lycoris", "kohya")
Adapters = dict[str, StoredAdapter]  # model of a pipeline, or "" -> its adapter


@dataclass
class Conversion:
    """What was found, and what was written.

    Attributes:
        source: "PEFT", or "LyCORIS" with the prefixes found.
        adapters: model of a pipeline, or "" -> what its adapter is.
        left_out: what of the source is not in the output.
        written: files and folders.
    """

    source: str
    adapters: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    written: list[Path] = field(default_factory=list)

    def __str__(self) -> str:
        found = [f"{component}: {what}" if component else what for component, what in self.adapters.items()]
        lines = [f"found    {self.source}", *(f"         {what}" for what in found)]
        lines += [f"left out {what}" for what in self.left_out]
        return "\n".join(lines + [f"written  {path}" for path in self.written])


def convert_adapter(
    source: str | PathLike[str],
    output: str | PathLike[str],
    to: str,
    *,
    base: str | PathLike[str] | None = None,
    prefix: str | None = None,
    names: str | None = None,
) -> Conversion:
    """Write an adapter in another format. Its own format is recognised; tensors are copied bit for bit.

    Args:
        source: a LyCORIS or kohya file; an adapter's folder in PEFT's format, or one of such folders named as a pipeline's
            models; or a hub id of one.
        output: a folder; of `"lycoris"`, `"kohya"` a file.
        to: the format. `"peft"` keeps the method; `"miss"` and `"bone"` are two names of one adapter, for peft from 0.19 and
            up to 0.18; `"lycoris"` names modules as the model does, under `lycoris_`; `"kohya"` as sd-scripts does.
        base: the base model's folder or hub id, or a diffusers pipeline's; its weights are not read. A LyCORIS source needs
            it, and an output with the original names of SDXL's or FLUX's layers.
        prefix: of the LyCORIS file that is read or written, where it is not the usual one.
        names: of modules in the file written: `"model"` or `"original"`, instead of what the format has.

    Raises:
        HalotuneError: what was found, what was expected, and the remedy. Nothing is written then.
    """
    if to not in FORMATS:
        raise HalotuneError(f"to: expected one of {', '.join(FORMATS)}; got {to!r}.")
    if names is not None:
        check_names(names)
    bases = {} if base is None else load_bases(base)
    lycoris = _lycoris_file(Path(source), prefix)
    if lycoris is not None:
        adapters, done = _from_lycoris(lycoris, bases, prefix)
        metadata = lycoris.metadata
    else:
        adapters, metadata = _from_peft(source)
        done = Conversion("PEFT")
    done.adapters = {component: describe(a) for component, a in adapters.items()}
    if to in ("lycoris", "kohya"):
        _write_lycoris(adapters, check_output(output), to, bases, prefix if lycoris is None else None, names, metadata)
        done.written = [Path(output)]
    else:
        if to != "peft":  # under the method's name that the format asks for
            adapters = {c: StoredAdapter(*under_alias(a.config, a.tensors, to.upper())) for c, a in adapters.items()}
        for component, adapter in adapters.items():
            _check(adapter, bases.get(component))
        for component, adapter in adapters.items():
            write_adapter(Path(output) / component, adapter.config, adapter.tensors, metadata)
            done.written.append(Path(output) / component)
    return done


def _check(adapter: StoredAdapter, base: BaseLayers | None) -> None:
    """Refuse to write what this base could not read; without a base there is nothing to hold an adapter against."""
    if base is not None and base.model is not None:
        keys = embedding_keys(base.model, held_tensors(base.model))
        beside = {f"{PEFT_PREFIX}{k.replace('.weight', infix)}" for k in keys for infix in (".weight", ".base_layer.weight")}
        biases = {k for k in adapter.tensors if adapter.config.bias != "none" and k.endswith(".bias")}
        check_readable(base.model, adapter.config, adapter.tensors, beside | biases)


def describe(adapter: StoredAdapter) -> str:
    """Method, modules, ranks, and whatever else differs from the method's defaults."""
    config, method = adapter.config, method_of(adapter.config.peft_type)
    paths = {key.split(f".{method.prefix}")[0] for key in adapter.tensors if f".{method.prefix}" in key}
    sizes = Counter(config.at(path.removeprefix(PEFT_PREFIX)).size for path in paths)
    shown = ", ".join(f"{k} = {v}" + (f" ({n} modules)" if len(sizes) > 1 else "") for (k, v), n in sizes.most_common())
    default = type(config)().to_dict()
    named = {*BOOKKEEPING, "target_modules", "rank_pattern", "alpha_pattern", "r", config.size[0]}
    own = {k: v for k, v in config.to_dict().items() if k not in named and v != default.get(k)}
    return "; ".join([f"{method.peft_type}, {len(paths)} modules, {shown}", *(f"{k} = {v}" for k, v in sorted(own.items()))])


# -- sources


def _lycoris_file(source: Path, prefix: str | None) -> LycorisFile | None:
    """The source as a LyCORIS file, if it is one: a file itself, or the only one in a folder."""
    if source.is_dir():
        weights = [f for f in sorted(source.glob("*.safetensors")) if f.name == WEIGHTS_NAME] or [*source.glob("*.safetensors")]
        if len(weights) != 1:
            return None
        source = weights[0]
    elif not source.is_file() and source.suffix != ".safetensors":
        return None
    if (source.parent / CONFIG_NAME).is_file() and source.is_file() and not is_lycoris(read_tensors(source)):
        return None
    return read_lycoris(source, prefix)


def _from_lycoris(source: LycorisFile, bases: Mapping[str, BaseLayers], prefix: str | None) -> tuple[Adapters, Conversion]:
    if not bases:
        raise HalotuneError(
            f"{source.file}: its names have '_' where modules' paths have '.', so they are looked up in the base model. Give "
            "base (--base): a model's folder or hub id; its weights are not read."
        )
    adapters: dict[str, Resolved] = {}
    for component, base in bases.items():
        prefixes = _prefixes_of(component, source, bases, prefix)
        if prefixes:
            adapters[component] = resolve(source, base, prefixes)
    if not adapters:
        raise AdapterFileError(
            source.file,
            f"expected modules of {', '.join(c or b.class_name for c, b in bases.items())}; found {source.prefixes}.",
            remedy="Give another base, or prefix (--prefix).",
        )
    return dict(adapters), Conversion(f"LyCORIS ({source.prefixes})", left_out=left_out(source, list(adapters.values())))


def _prefixes_of(component: str, source: LycorisFile, bases: Mapping[str, BaseLayers], prefix: str | None) -> list[str]:
    """Whose modules are those of one of the base models."""
    if prefix is not None:
        return [p for p in source.groups if p == prefix]
    if not component:
        return best_prefixes(source, bases[component])
    return [p for p in source.groups if component == next((c for c in PREFIXES.get(p, ()) if c in bases), None)]


def _from_peft(source: str | PathLike[str]) -> tuple[Adapters, dict[str, str]]:
    folder = Path(source)
    if folder.is_file():  # the weights of an adapter's folder
        folder = folder.parent
    inner = {c: folder / c for c in COMPONENTS if (folder / c / CONFIG_NAME).is_file()}
    if inner and not (folder / CONFIG_NAME).is_file():
        read = {c: _read_peft(f) for c, f in inner.items()}
        return {c: a for c, (a, _) in read.items()}, {k: v for _, m in read.values() for k, v in m.items()}
    adapter, metadata = _read_peft(folder)
    return {"": adapter}, metadata


def _read_peft(folder: Path) -> tuple[StoredAdapter, dict[str, str]]:
    config = AdapterConfig.from_pretrained(folder)
    file = locate(folder, WEIGHTS_NAME)
    return StoredAdapter(config, read_tensors(file)), read_metadata(file)


# -- LyCORIS files


def _write_lycoris(
    adapters: Adapters,
    file: Path,
    to: str,
    bases: Mapping[str, BaseLayers],
    prefix: str | None,
    names: str | None,
    metadata: Mapping[str, str],
) -> None:
    if names == "original" and not bases:
        raise HalotuneError("names='original' needs the base model's own. Give base (--base).")
    numbered = any(c.startswith("text_encoder_") for c in (*bases, *adapters))
    tensors: dict[str, Any] = {}
    parts: list[tuple[str, BaseLayers]] = []
    for component, adapter in adapters.items():
        base = bases.get(component) or (next(iter(bases.values())) if len(bases) == len(adapters) == 1 else None)
        original = names == "original" or (names is None and to == "kohya" and base is not None and base.scripts_use_originals)
        kind = base.class_name if base else class_of_base(adapter.config)
        own = prefix or ("lycoris" if to == "lycoris" else _kohya_prefix(component, kind, original, numbered))
        parts += [] if base is None else [(own, base)]
        for key, t in write(adapter, own, base, original).items():
            if key in tensors:
                raise HalotuneError(f"{key}: two models of the pipeline have this module. Use --to kohya.")
            tensors[key] = t
    metadata = metadata or metadata_for(next(iter(adapters.values())).config)
    if len(parts) == len(adapters):  # without a base there is nothing to hold an adapter against
        check_written(tensors, metadata, file, parts)
    write_tensors(tensors, file, metadata)


def _kohya_prefix(component: str, kind: str, original: bool, numbered: bool) -> str:
    """What sd-scripts begins the names of a model's modules with; diffusers' own names of a transformer have OneTrainer's.

    Args:
        component: the model's name in its pipeline, or "".
        kind: its class; "" where it is not known.
        numbered: the pipeline has several text encoders.
    """
    if kind == "T5EncoderModel" and component != "text_encoder":
        return "lora_te3"  # sd-scripts numbers it so for FLUX too; where it is the only one it is the first
    found = component or component_of(kind)
    if found is None:
        raise HalotuneError(
            f"kohya's files name the part of the pipeline that a module is in, and which one {kind or 'the base'} is cannot be "
            "told. Give the pipeline as base (--base), or prefix (--prefix): lora_unet, lora_te1 …"
        )
    if found == "transformer":
        return "lora_unet" if original else "lora_transformer"
    return "lora_te" if found == "text_encoder" and not numbered else kohya_prefix(found)
