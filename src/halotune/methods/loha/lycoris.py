"""LoHa as LyCORIS writes it.

| theirs | ours |
|---|---|
| `hada_w1_a` …, `hada_t1`, `hada_t2` | the same; a Conv1d's core is `(r, r, k)` there, `(r, r, k, 1)` in PEFT's files |
| `alpha` `()`, of every module; with rs-scaling it holds `alpha √r`, so that `alpha / r` is the scale always | `alpha` |
| `dora_scale` | `hada_dora_scale` |
| `scalar` of old files; later versions multiply it into `hada_w1_a` on saving, and do not read it | `hada_scalar` |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...core.errors import HalotuneError
from ...core.operator import WeightShape
from ...core.prepared import exact_dtype
from ..lycoris_form import LycorisForm, read_alpha, with_alpha
from .config import LoHaConfig

_FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES = ("hada_t1", "hada_t2")


def read(tensors: Mapping[str, Tensor], shape: WeightShape) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields of `LoHaConfig` that one module states, and our tensors."""
    r = tensors["hada_w1_b"].shape[0]
    ours = {name: tensors[name] for name in _FACTORS}
    decomposed = "dora_scale" in tensors
    fields = {"r": r, "alpha": read_alpha(tensors, r), "use_scalar": "scalar" in tensors, "weight_decompose": decomposed}
    if math.prod(shape.kernel) > 1:
        fields["use_effective_conv2d"] = "hada_t1" in tensors
    for name in _CORES:
        if name in tensors:
            ours[name] = tensors[name].unsqueeze(-1) if len(shape.kernel) == 1 else tensors[name]
    if "scalar" in tensors:
        ours["hada_scalar"] = tensors["scalar"].reshape(())
    if decomposed:
        ours["hada_dora_scale"] = m = tensors["dora_scale"]
        fields["wd_on_out"] = m.shape[0] == m.numel() == shape.out_features
    return fields, ours


def write(config: LoHaConfig, tensors: Mapping[str, Tensor], shape: WeightShape | None) -> dict[str, Tensor]:
    """The tensors of one module. `hada_scalar` is multiplied into `hada_w1_a`, as every reader expects."""
    theirs = {name: tensors[name] for name in _FACTORS}
    w = theirs["hada_w1_a"]
    if "hada_scalar" in tensors:
        exact = exact_dtype(w.dtype)
        theirs["hada_w1_a"] = (w.to(exact) * tensors["hada_scalar"].to(exact)).to(w.dtype)
    for name in _CORES:
        if name in tensors:
            theirs[name] = _core(tensors[name], shape)
    if "hada_dora_scale" in tensors:
        theirs["dora_scale"] = tensors["hada_dora_scale"]
    return with_alpha(theirs, config.alpha * (config.r**0.5 if config.use_rslora else 1), "hada_w1_a", config.r)


def _core(core: Tensor, shape: WeightShape | None) -> Tensor:
    if core.dim() != 4 or core.shape[-1] != 1:
        return core
    if shape is None:
        raise HalotuneError(
            f"a core of shape {tuple(core.shape)} may be that of a Conv1d or of a Conv2d, which LyCORIS stores differently. "
            "Give the base model."
        )
    return core.squeeze(-1) if len(shape.kernel) == 1 else core


FORM = LycorisForm(_FACTORS, (*_CORES, "alpha", "scalar", "dora_scale"), ("hada_w1_a", "hada_w2_a", "dora_scale"), read, write)
