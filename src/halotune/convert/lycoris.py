"""The format of LyCORIS and kohya's scripts: keys are `{prefix}_{path with _ for .}.{tensor}`, sorted into modules here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..core.config import AdapterConfig
from ..core.errors import AdapterFileError
from ..methods.lycoris_form import LycorisForm
from ..methods.registry import Method, methods

PEFT_PREFIX = "base_model.model."

# prefix in files -> the model of a pipeline that it means: the first that the pipeline has. T5 is the third text
# encoder of Stable Diffusion 3, and so numbered for FLUX too, where it is the second. The last six come with dots.
PREFIXES: dict[str, tuple[str, ...]] = {
    "lycoris": ("unet", "transformer"),
    "lora_unet": ("unet", "transformer"),
    "lora_transformer": ("transformer",),
    "lora_te": ("text_encoder",),
    "lora_te1": ("text_encoder",),
    "lora_te2": ("text_encoder_2",),
    "lora_te3": ("text_encoder_3", "text_encoder_2"),
    "diffusion_model": ("unet", "transformer"),
    "unet": ("unet",),
    "transformer": ("transformer",),
    "text_encoder": ("text_encoder",),
    "text_encoder_2": ("text_encoder_2",),
    "text_encoder_3": ("text_encoder_3",),
}
Modules = dict[str, dict[str, Tensor]]  # name with `_` -> its tensors


@dataclass(frozen=True)
class LycorisFile:
    """What a file holds, before any base model is looked at.

    Attributes:
        groups: prefix -> its modules; "" holds those without a known one.
    """

    file: Path
    method: Method
    groups: dict[str, Modules]
    metadata: dict[str, str]

    @property
    def prefixes(self) -> str:
        """For messages."""
        return ", ".join(p or "no known prefix" for p in self.groups)

    @property
    def form(self) -> LycorisForm:
        assert self.method.lycoris is not None
        return self.method.lycoris


@dataclass(frozen=True)
class StoredAdapter:
    """A configuration and its tensors, under the keys of PEFT's files."""

    config: AdapterConfig
    tensors: dict[str, Tensor]


def is_lycoris(tensors: Iterable[str]) -> bool:
    """Whether keys are those of LyCORIS or kohya: a method's tensors, without PEFT's prefix."""
    first = tuple(f".{m.lycoris.required[0]}" for m in methods() if m.lycoris)
    return any(key.endswith(first) and not key.startswith(PEFT_PREFIX) for key in tensors)


def parse(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], file: Path, prefix: str | None = None) -> LycorisFile:
    """Sort a file's tensors into modules.

    Args:
        prefix: the file's own, where it is none of the usual ones.

    Raises:
        AdapterFileError: it holds something else, or modules that are not complete.
    """
    names = {n for m in methods() if m.lycoris for n in (*m.lycoris.required, *m.lycoris.optional)}
    modules: Modules = {}
    unknown: list[str] = []
    for key, tensor in tensors.items():
        name = next((n for n in names if key.endswith(f".{n}")), None)
        if name is None:
            unknown.append(key)
        else:
            modules.setdefault(key.removesuffix(f".{name}"), {})[name] = tensor
    used = {name for own in modules.values() for name in own}
    found = [m for m in methods() if m.lycoris and m.lycoris.required[0] in used]
    if unknown or len(found) != 1:
        ends = ", ".join(sorted({key.split(".", 1)[-1] for key in unknown} | used)[:12])
        expected = "; or ".join(f"{m.peft_type}: {', '.join(m.lycoris.required)}" for m in methods() if m.lycoris)
        raise AdapterFileError(
            file,
            f"expected modules of one method ({expected}), found tensors named {ends}.",
            key=(unknown or list(tensors))[0],
            remedy="Give a file without norms, other algorithms and full weights.",
        )
    method = found[0]
    _check_whole(method, modules, file)
    groups: dict[str, Modules] = {}
    for module, own in modules.items():
        flat = module.replace(".", "_")
        known = [p for p in (*PREFIXES, *([prefix] if prefix else [])) if flat.startswith(f"{p}_")]
        start = max(known, key=len, default="")
        groups.setdefault(start, {})[flat.removeprefix(f"{start}_")] = own
    return LycorisFile(file, method, groups, dict(metadata))


def _check_whole(method: Method, modules: Modules, file: Path) -> None:
    assert method.lycoris is not None
    allowed = {*method.lycoris.required, *method.lycoris.optional}
    for module, own in modules.items():
        lacking = [n for n in method.lycoris.required if n not in own]
        if lacking or own.keys() - allowed:
            what = f"lacks {', '.join(lacking)}" if lacking else f"has {', '.join(sorted(own.keys() - allowed))}"
            raise AdapterFileError(
                file,
                f"a module of {method.peft_type} {what}.",
                key=module,
                remedy="Get the file again; other kinds of modules cannot be converted.",
            )
