"""Any adapter as a LoRA of one rank, with its scale in B: the form that every runtime reads alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.errors import HalotuneError
from ..core.layer import AdaptedLayer
from .components import Component
from .factors import EXACT, Factors, factors_of, laid_out
from .runtimes import Runtime


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        runtime: the target runtime.
        rank: of the file: that of the largest layer, which the others are filled up to with zeros.
        layers: path of the module -> its own rank, what truncation lost (`‖ΔW − B A‖ / ‖ΔW‖`), and how it was found.
    """

    runtime: str
    rank: int
    layers: dict[str, LayerReport]

    @property
    def exact(self) -> bool:
        return all(layer.how == EXACT for layer in self.layers.values())

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        layers = {path: {"rank": r.rank, "error": r.error, "how": r.how} for path, r in self.layers.items()}
        return {"runtime": self.runtime, "rank": self.rank, "exact": self.exact, "layers": layers}

    def __str__(self) -> str:
        """One line where all is exact; else a table, one line a layer."""
        head = f"LoRA of rank {self.rank} for {self.runtime}: {len(self.layers)} layers"
        if self.exact:
            return f"{head}, exact"
        width = max(map(len, self.layers))
        lines = [f"{path:<{width}}  {r.rank:>4}  {r.error:>8.2e}  {r.how}" for path, r in self.layers.items()]
        return "\n".join([head, f"{'layer':<{width}}  {'rank':>4}  {'error':>8}  found by", *lines])


@dataclass(frozen=True)
class LayerReport:
    """One layer of an `ExportReport`."""

    rank: int
    error: float
    how: str


def as_lora(
    layers: Mapping[str, AdaptedLayer],
    names: Sequence[str],
    runtime: Runtime,
    *,
    component: Component | None = None,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[dict[str, Tensor], ExportReport]:
    """The tensors of a runtime's file, on the CPU.

    Args:
        layers: the path that keys begin with -> a layer that has at least one of these adapters.
        names: the adapters, in the order in which they apply.
        component: which part of a pipeline the model is, for runtimes that read one file.
        rank: truncate to this rank, or fill up to it; None is the smallest exact one.
        dtype: of the tensors; None is that of the adapter.

    Raises:
        HalotuneError: a layer that the runtime cannot represent, a rank that it does not take, values not finite.
    """
    step = math.lcm(*(runtime.blocks(layer) for layer in layers.values()))
    if rank is not None and (rank < 1 or rank % step):
        raise HalotuneError(
            f"rank: expected a positive multiple of {step}{' (the groups of convolutions)' if step > 1 else ''}; got {rank}."
        )
    found: dict[str, list[Factors]] = {}
    for path, layer in layers.items():
        own = [n for n in names if n in layer.adapters]
        most = None if rank is None else rank // runtime.blocks(layer)
        try:
            own_dtype = dtype or next(layer.adapters[own[0]].parameters()).dtype
            found[path] = [_rounded(f, own_dtype) for f in factors_of(layer, own, most)]
        except HalotuneError as e:
            raise HalotuneError(f"{path}: {e}") from None
    ranks = {path: max(f.rank for f in each) * runtime.blocks(layers[path]) for path, each in found.items()}
    common = runtime.fitting_rank(rank or math.ceil(max(ranks.values()) / step) * step)
    if common % step:
        raise HalotuneError(f"rank: {common} is no multiple of {step}, the groups of a convolution. Leave the convolution out.")
    tensors: dict[str, Tensor] = {}
    for path, each in found.items():
        pairs = [laid_out(f, layers[path].base.shape, common, runtime.convolutions == "basic") for f in each]
        A, B = pairs[0] if layers[path].base.weight().dim() == 2 else map(torch.stack, zip(*pairs, strict=True))
        key_A, key_B, key_alpha = runtime.keys(path, component)
        tensors.update({key_A: A, key_B: B})
        if key_alpha:
            tensors[key_alpha] = torch.tensor(float(common))
    worst = {path: max(each, key=lambda f: f.error) for path, each in found.items()}
    report = {path: LayerReport(ranks[path], f.error, f.how) for path, f in worst.items()}
    return tensors, ExportReport(runtime.name, common, report)


def _rounded(factors: Factors, dtype: torch.dtype) -> Factors:
    B, A = (t.to(dtype).cpu() for t in (factors.B, factors.A))
    if not (torch.isfinite(B).all() and torch.isfinite(A).all()):
        raise HalotuneError(f"values that are not finite in {dtype}. Check the adapter for NaN, or export in fp32.")
    return Factors(B, A, factors.error, factors.how)
