"""LoRA as kohya's scripts and LyCORIS write it: `lora_down.weight` A, `lora_up.weight` B, and `alpha` `()`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...core.operator import WeightShape
from ..lycoris_form import LycorisForm, read_alpha, with_alpha
from .config import LoraConfig

_NAMES = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}


def read(tensors: Mapping[str, Tensor], shape: WeightShape) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields of `LoraConfig` that one module states, and our tensors."""
    ours = {name: tensors[key] for key, name in _NAMES.items()}
    if shape.is_linear:  # some files hold a linear layer as a convolution of size 1
        ours = {name: t.flatten(1) for name, t in ours.items()}
    r = ours["lora_A.weight"].shape[0]
    return {"r": r, "lora_alpha": read_alpha(tensors, r)}, ours


def write(config: LoraConfig, tensors: Mapping[str, Tensor], shape: WeightShape | None) -> dict[str, Tensor]:
    """The tensors of one module."""
    theirs = {key: tensors[name] for key, name in _NAMES.items()}
    return with_alpha(theirs, config.scaling * config.r, "lora_up.weight", config.r)


FORM = LycorisForm(tuple(_NAMES), ("alpha",), ("lora_up.weight",), read, write, alpha="lora_alpha")
