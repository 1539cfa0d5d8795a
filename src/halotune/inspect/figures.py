"""The figures of every layer of a saved adapter, with its base model or without."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..cli.loading import BaseModel, Saved
from ..core.adapter import Adapter
from ..core.errors import AdapterFileError, HalotuneError
from ..core.expert_adapter import ExpertAdapter
from ..core.operator import WeightShape
from ..engine.injection.modules import adapted_layers
from ..engine.model import PeftModel
from ..methods.measures import Measures, effective_rank, singular_values
from ..methods.registry import method_of

MAX_FACTOR_RANK = 1024  # factors of a higher rank are not decomposed: minutes a layer
NOISE = 1e-12  # of ‖W‖: a delta under it is rounding, in the fp64 that all is computed in


@dataclass(frozen=True)
class Figures:
    """What is known of one layer; None is not known (often, without the base)."""

    path: str  # of the module in the base model
    kind: str | None  # the module's class
    shape: tuple[int, int]  # of the weight W as a matrix (out, in), with 0 for what is not known
    rank: int
    parameters: int
    weight_norm: float | None = None  # ‖W‖, Frobenius
    delta_norm: float | None = None  # ‖ΔW‖, Frobenius, of ΔW = W' − W
    spectral_norm: float | None = None  # the largest singular value of ΔW
    effective_rank: float | None = None  # of ΔW
    own: Mapping[str, float | list[float]] = field(default_factory=dict)  # the method's own

    @property
    def relative(self) -> float | None:
        """‖ΔW‖ / ‖W‖."""
        if self.delta_norm is None or not self.weight_norm:
            return None
        return self.delta_norm / self.weight_norm

    def to_dict(self) -> dict[str, Any]:
        entries = {k: v for k, v in vars(self).items() if k not in ("path", "own")}
        sides = [side or None for side in self.shape]
        return {**entries, "shape": sides, "relative_delta": self.relative, **self.own}


def measure(saved: Saved, base: BaseModel | None) -> list[Figures]:
    """The figures of all layers, in the order of the model (or of the file)."""
    measures = method_of(saved.config.peft_type).measures
    if base is None:
        return [_figures(path, adapter, None, None, measures) for path, adapter in _in_file(saved, measures)]
    return measure_model(saved.on(base))


def measure_model(model: PeftModel) -> list[Figures]:
    """The figures of all layers of a model with active adapters."""
    measures = method_of(model.active_peft_config.peft_type).measures
    return [
        _figures(name, own, type(layer.base_layer).__name__, W, measures)
        for path, layer in adapted_layers(model.get_base_model()).items()
        for adapter in layer.running()
        for name, own, W in _each(path, adapter, layer.base.weight())
    ]


def _each(path: str, adapter: Adapter, W: Tensor) -> Iterator[tuple[str, Adapter, Tensor]]:
    """The adapter on its weight; on fused experts, that of each expert."""
    if not isinstance(adapter, ExpertAdapter):
        yield path, adapter, W
        return
    for e, own in enumerate(adapter.each()):
        yield f"{path}[{e}]", own, W[e]


def _in_file(saved: Saved, measures: Measures | None) -> Iterator[tuple[str, Adapter]]:
    """The adapters of a file, each on a weight of the shape that its tensors tell."""
    method = method_of(saved.config.peft_type)
    if saved.config.target_parameters:
        raise HalotuneError("adapters on fused experts are inspected with their base model. Give it with --base.")
    if measures is None:
        raise HalotuneError(f"{method.peft_type} adapters are inspected with their base model. Give it with --base.")
    for path, tensors in _by_layer(saved).items():
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise AdapterFileError(
                    saved.file,
                    "expected finite numbers, found NaN or infinity.",
                    key=f"{path}.{name}",
                    remedy="Get the file again: it is damaged, or its training diverged.",
                )
        try:
            with torch.device("meta"):
                adapter = method.create(measures.shape(tensors, saved.config), saved.config.at(path))
            adapter.load_state_dict(tensors, assign=True)
        except (KeyError, IndexError, ValueError, RuntimeError) as e:  # RuntimeError: load_state_dict's
            raise AdapterFileError(
                saved.file,
                f"its tensors are not those of a {method.peft_type} adapter with this configuration "
                f"({str(e).strip().splitlines()[-1].strip()}).",
                key=path,
                remedy="Use the adapter_config.json of the same adapter.",
            ) from e
        yield path, adapter


def _by_layer(saved: Saved) -> dict[str, dict[str, Tensor]]:
    """Path of a module -> its adapter's tensors, by their names in the adapter."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key in sorted(saved.tensors, key=_natural):
        path, found, name = key.removeprefix("base_model.model.").partition(f".{saved.prefix}")
        if found:
            layers.setdefault(path, {})[saved.prefix + name] = saved.tensors[key]
    if not layers:
        raise AdapterFileError(
            saved.file,
            f"holds no tensor of {method_of(saved.config.peft_type).peft_type}; the first is {next(iter(saved.tensors))}.",
            remedy="Use the adapter_config.json of the same adapter.",
        )
    return layers


def _natural(key: str) -> list[tuple[int, str]]:
    """Sorts layer 10 after layer 9."""
    return [(int(part) if part.isdecimal() else -1, part) for part in key.split(".")]


@torch.no_grad()
def _figures(path: str, adapter: Adapter, kind: str | None, W: Tensor | None, measures: Measures | None) -> Figures:
    parameters = sum(p.numel() for p in adapter.parameters())
    adapter = copy.deepcopy(adapter).double()
    shape: WeightShape = adapter.shape
    norms: dict[str, float | None] = {}
    if W is not None:
        W = W.double()
        norms = {"weight_norm": float(W.norm()), **_delta(adapter, W)}
    elif shape.out_features and shape.in_features:
        unknown = torch.full((1, 1), math.nan, dtype=torch.float64)  # whatever depends on it is NaN, and so found out
        norms = _delta(adapter, unknown.expand(shape.out_features, shape.in_features))
    return Figures(
        path,
        kind,
        (shape.out_features, shape.in_features),
        adapter.rank,
        parameters,
        **norms,
        own=measures.of(adapter) if measures else {},
    )


def _delta(adapter: Adapter, W: Tensor) -> dict[str, float | None]:
    """Norms and effective rank of `weight(W) − W`, from its low-rank factors where it has them."""
    factors = adapter.factors(W)
    if factors is None or factors[1].shape[0] > MAX_FACTOR_RANK:
        norm = float((adapter.weight(W) - W).norm())
        return {"delta_norm": norm if math.isfinite(norm) else None}
    B, A = factors
    if not (torch.isfinite(B).all() and torch.isfinite(A).all()):
        return {}
    values = singular_values(B, A)
    values = torch.where(values > NOISE * W.norm().nan_to_num(), values, 0)
    return {
        "delta_norm": float(values.norm()),
        "spectral_norm": float(values[0]),
        "effective_rank": float(effective_rank(values)),
    }
