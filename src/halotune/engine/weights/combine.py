"""One adapter made of several: exactly, or refused with the combination that is exact."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...core.adapter import Adapter
from ...core.config import AdapterConfig
from ...core.errors import HalotuneError
from ...core.expert_adapter import ExpertAdapter
from ...core.layer import AdaptedLayer
from ...core.operator import WeightShape
from ...core.prepared import exact_dtype
from ...core.sharded_parameters import is_sharded
from ...methods.registry import low_rank_config, low_rank_method, method_of
from ..injection.experts import create
from ..injection.modules import adapted_layers, public_path, visible_modules
from ..injection.resolve import spelled_out

_EXACT = (
    '"linear" adds deltas that are linear in their parameters, of one kind and r; "cat" applies rotations of weight 1 one '
    'after the other; "lora" adds deltas that have low-rank factors, as a LoRA of the summed ranks.'
)


def combine(
    model: nn.Module, configs: Mapping[str, AdapterConfig], names: Sequence[str], weights: Sequence[float], how: str
) -> tuple[AdapterConfig, dict[str, Adapter]]:
    """A configuration, and for every path an adapter, equal to the combination.

    linear, lora: `W + Σ w_i (F_i(W) − W)`; cat: `F_n(… F_1(W))`, which for LoRA is the same.

    Raises:
        HalotuneError: no such adapter is exact.
    """
    _check(model, configs, names, weights, how)
    layers = {p: layer for p, layer in adapted_layers(model).items() if any(n in layer.adapters for n in names)}
    for path, layer in layers.items():
        if any(is_sharded(p) for a in _parts(layer, names, weights)[0] for p in a.parameters()):
            raise HalotuneError(
                f"{path}: its experts are spread over processes, and so are their adapters. Save these, and combine them in a "
                "model on one process."
            )
    if all(method_of(configs[n].peft_type).low_rank for n in names):
        how = "lora"
    combined = _as_low_rank(layers, names, weights) if how == "lora" else _within(layers, names, weights, how)
    r = max(a.rank for a in combined.values())
    first = configs[names[0]]
    config = low_rank_config(r) if how == "lora" else first.combined(r)
    config.task_type, config.base_model_name_or_path = first.task_type, first.base_model_name_or_path
    visible = {p: public_path(p) for p in layers}
    config.rank_pattern = {f"^{re.escape(visible[p])}": a.rank for p, a in combined.items() if a.rank != r}
    for p, adapter in combined.items():
        _check_described(config, visible[p], layers[p], adapter)
    config = spelled_out(config, list(visible.values()), dict(visible_modules(model)))
    return config, {visible[p]: a for p, a in combined.items()}


def _check(
    model: nn.Module, configs: Mapping[str, AdapterConfig], names: Sequence[str], weights: Sequence[float], how: str
) -> None:
    if how not in ("linear", "cat", "lora"):
        raise HalotuneError(f"combination_type: expected 'linear', 'cat' or 'lora'; got {how!r}. {_EXACT}")
    if not names or len(names) != len(weights) or len(set(names)) < len(names):
        raise HalotuneError(f"adapters and weights: expected different names, a weight each; got {names} and {weights}.")
    for n in names:
        if configs[n].modules_to_save or configs[n].bias != "none":
            raise HalotuneError(
                f"adapter {n!r} also trains biases or fully fine-tuned modules, which have no sum that is exact. Combine "
                "adapters without them, or merge one after the other."
            )
    if any(layer.merged for layer in adapted_layers(model).values()):
        raise HalotuneError("adapters are merged, and combining needs the base's weights. Call unmerge_adapter() first.")


def _parts(layer: AdaptedLayer, names: Sequence[str], weights: Sequence[float]) -> tuple[list[Adapter], list[float]]:
    own = [(layer.adapters[n], w * layer.scales[n]) for n, w in zip(names, weights, strict=True) if n in layer.adapters]
    return [a for a, _ in own], [w for _, w in own]  # type: ignore[misc]


def _check_described(config: AdapterConfig, path: str, layer: AdaptedLayer, adapter: Adapter) -> None:
    """One configuration must describe all layers; adapters of two kinds can meet on none and still differ."""
    try:
        with torch.device("meta"):
            made = create(method_of(config.peft_type), layer.base_layer, layer.base.shape, config.at(path))
    except HalotuneError:  # not even possible here
        made = None
    sizes = {n: p.shape for n, p in adapter.named_parameters()}
    if made is None or type(made) is not type(adapter) or {n: p.shape for n, p in made.named_parameters()} != sizes:
        raise HalotuneError(
            f"{path}: the adapters are of different kinds on different layers, which no single configuration describes. "
            'Use combination_type="lora", or merge one after the other.'
        )


@torch.no_grad()
def _within(layers: Mapping[str, AdaptedLayer], names: Sequence[str], weights: Sequence[float], how: str) -> dict[str, Adapter]:
    out: dict[str, Adapter] = {}
    parts = {path: _parts(layer, names, weights) for path, layer in layers.items()}
    total = max(sum(a.rank for a in adapters) for adapters, _ in parts.values())
    for path, (adapters, own) in parts.items():
        kinds = {type(a) for a in adapters}
        combined = adapters[0].combined(adapters, own, how, total) if len(kinds) == 1 else None
        if combined is None:
            shown = ", ".join(f"{type(a).__name__} (r={a.rank}, weight {w:g})" for a, w in zip(adapters, own, strict=True))
            exact = '"lora"' if all(a.factors_exist for a in adapters) else "none: merge one after the other"
            raise HalotuneError(
                f"{path}: combination_type={how!r} is not exact for {shown}; exact is {exact}. In general {_EXACT}"
            )
        out[path] = combined
    return out


@torch.no_grad()
def _as_low_rank(layers: Mapping[str, AdaptedLayer], names: Sequence[str], weights: Sequence[float]) -> dict[str, Adapter]:
    factors = {}
    for path, layer in layers.items():
        adapters, own = _parts(layer, names, weights)
        full = [type(a).__name__ for a in adapters if not a.factors_exist]
        if full:
            raise HalotuneError(
                f"{path}: the delta of {full[0]} has full rank, so it is no part of a LoRA. Combine adapters of this kind and "
                'one r with combination_type="linear", or merge one after the other.'
            )
        layer.base.require_known(path, adapters)
        W = layer.base.weight()
        W = W.to(exact_dtype(W.dtype))
        pairs = [a.factors(W) for a in adapters]
        B = torch.cat([w * p[0] for p, w in zip(pairs, own, strict=True) if p], dim=-1)
        factors[path] = B, torch.cat([p[1] for p in pairs if p], dim=-2)
    rank = max(A.shape[-2] for _, A in factors.values())
    out: dict[str, Adapter] = {}
    for path, (B, A) in factors.items():
        shape = layers[path].base.shape
        if A.dim() == 2:
            out[path] = _low_rank(shape, rank, B, A)
        else:
            each = [_low_rank(shape, rank, *pair) for pair in zip(B, A, strict=True)]
            out[path] = ExpertAdapter.stacked(each, len(each), shared=False)
    return out


def _low_rank(shape: WeightShape, rank: int, B: Tensor, A: Tensor) -> Adapter:
    adapter = low_rank_method().create(shape, low_rank_config(rank))
    adapter.to(A.device, A.dtype).set_factors(B, A)  # type: ignore[operator]
    return adapter
