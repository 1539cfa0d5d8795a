"""An adapter as a LyCORIS file's modules."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from torch import Tensor

from ..core.config import AdapterConfig
from ..core.errors import HalotuneError
from ..export.components import Component
from ..methods.lycoris_form import LycorisForm
from ..methods.registry import method_of, methods
from .base import BaseLayers
from .lycoris import PEFT_PREFIX, StoredAdapter
from .rows import stack


def write(adapter: StoredAdapter, prefix: str, base: BaseLayers | None = None, original: bool = False) -> dict[str, Tensor]:
    """An adapter's tensors under LyCORIS' keys.

    Args:
        prefix: as in `PREFIXES`, or any other.
        base: its shapes and original names.
        original: use the names of the model's authors, and their stacked layers.

    Raises:
        HalotuneError: it holds what a LyCORIS file cannot.
    """
    config, method = adapter.config, method_of(adapter.config.peft_type)
    if method.lycoris is None:
        known = ", ".join(m.peft_type for m in methods() if m.lycoris)
        raise HalotuneError(f"LyCORIS has no {method.peft_type} as it is here; its files hold {known}. Keep PEFT's format.")
    if config.target_parameters:
        raise HalotuneError(
            f"target_parameters={sorted(config.target_parameters)}: LyCORIS has no adapters on fused experts. Keep PEFT's "
            "format."
        )
    form = method.lycoris
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in adapter.tensors.items():
        found = re.fullmatch(rf"(?:{re.escape(PEFT_PREFIX)})?(.+)\.({method.prefix}.+)", key)
        if found is None:
            raise HalotuneError(
                f"{key}: LyCORIS files hold adapters alone, no biases and no fully fine-tuned modules. Keep PEFT's format."
            )
        modules.setdefault(found[1].replace(".base_layer.", "."), {})[found[2]] = tensor
    theirs: dict[str, dict[str, Tensor]] = {}
    for path, own in modules.items():
        try:
            theirs[path] = form.write(config.at(path), own, base.shapes.get(path) if base else None)
        except HalotuneError as e:
            raise HalotuneError(f"{path}: {e}") from e
    named = _joined(form, theirs, base) if original and base else theirs
    if prefix.startswith("lora_te"):
        part = Component("text_encoder", base.class_name if base else class_of_base(config))
        if not part.model_class and any(path.startswith("encoder.layers.") for path in named):
            raise HalotuneError(
                "files call CLIP's modules text_model.encoder.layers…, transformers 5 encoder.layers…; whether this adapter is "
                "CLIP's its configuration does not tell. Give base (--base)."
            )
        named = {part.stored(path): own for path, own in named.items()}
    out: dict[str, Tensor] = {}
    for path, own in named.items():
        for name, tensor in own.items():
            key = f"{prefix}_{path.replace('.', '_')}.{name}"
            if key in out:
                raise HalotuneError(f"{key}: two modules get this name, which LyCORIS cannot tell apart. Keep PEFT's format.")
            out[key] = tensor
    return out


def _joined(form: LycorisForm, modules: Mapping[str, dict[str, Tensor]], base: BaseLayers) -> dict[str, dict[str, Tensor]]:
    """Modules under their original names; layers that are stacked there become one."""
    out: dict[str, dict[str, Tensor]] = {}
    left = dict(modules)
    for name, parts in base.originals.items():
        there = [p for p in parts if p.path in left]
        if there:
            out[name] = stack(form, name, parts, left)
            for p in parts:
                left.pop(p.path, None)
    return {**out, **left}


def class_of_base(config: AdapterConfig) -> str:
    """The class of the model that an adapter was made for; "" where the configuration does not tell."""
    return str((config.auto_mapping or {}).get("base_model_class", ""))


def metadata_for(config: AdapterConfig) -> dict[str, str]:
    """What user interfaces show of a file: kohya's names for rank, scale and method."""
    method = method_of(config.peft_type)
    alpha = getattr(config, method.lycoris.alpha) if method.lycoris else config.size[1]
    return {
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": str(config.size[1]),
        "ss_network_alpha": str(alpha),
        "ss_network_args": json.dumps({"algo": method.peft_type.lower()}),
    }
