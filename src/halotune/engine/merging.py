"""Merging adapters into the stored weights: checked first, reported, and undone bit for bit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from ..core.adapter import Additive
from ..core.errors import HalotuneError, warn
from ..core.layer import AdaptedLayer, MergeRecord
from .inject import adapted_layers, tied_parameters

T = TypeVar("T")


@dataclass
class MergeReport:
    """What a merge did, layer by layer."""

    layers: dict[str, MergeRecord] = field(default_factory=dict)

    def total(self) -> MergeRecord:
        """All layers together: norms add as squares, shares by the number of weights."""
        return MergeRecord.total(list(self.layers.values()))

    def to_dict(self) -> dict[str, Any]:
        """`{"total": {…}, "layers": {name: {"delta": …, "lost": …, "changed": …}}}`, ready for JSON."""
        layers = {name: record.to_dict() for name, record in self.layers.items()}
        return {"total": self.total().to_dict(), "layers": layers}

    def __str__(self) -> str:
        """A table: one line a layer, and the total."""
        width = max([5, *map(len, self.layers)])
        head = f"{'layer':<{width}}  {'|ΔW|/|W|':>9}  {'lost':>8}  {'changed':>8}"
        rows = [*self.layers.items(), ("total", self.total())]
        lines = [f"{n:<{width}}  {r.delta:>9.2e}  {r.lost:>8.2%}  {r.changed:>8.2%}" for n, r in rows]
        return "\n".join([head, *lines])


def merge(
    model: nn.Module, names: list[str], *, keep: bool = True, safe: bool = True, progressbar: bool = False
) -> MergeReport:
    """Write adapters into the weights of all layers that have them.

    Every merged weight is computed and checked before the first is written.

    Args:
        names: the adapters, in the order in which they apply.
        keep: hold snapshots, for `unmerge`.
        safe: check for values that are not finite.
        progressbar: show one on standard error.
    """
    layers = {path: layer for path, layer in adapted_layers(model).items() if _pending(layer, names)}
    for path, layer in layers.items():
        _check_order(path, layer, _pending(layer, names))
    if safe:
        for path, layer in layers.items():
            layer.check_finite(_pending(layer, names), path)
    shared = {n for others in tied_parameters(model).values() for n in others}
    tied = {path for path in layers if f"{path}.base_layer.weight" in shared}
    report, done = MergeReport(), []
    try:
        for path in tied:
            _untie(model, path, keep)
        for path, layer in _with_progress(layers.items(), progressbar):
            done.append(layer)
            report.layers[path] = layer.merge(_pending(layer, names), keep=keep, untie=path in tied)
    except BaseException:
        for layer in done if keep else ():
            layer.unmerge()
        _tie_again(model)
        raise
    if report.total().lost > 0.5:
        warn(
            f"merging into {next(iter(layers.values())).base.dtype} lost {report.total().lost:.0%} of the adapter's delta to "
            "rounding. Load the base in fp32 to merge without that loss."
        )
    return report


def unmerge(model: nn.Module) -> None:
    """Put back every weight that a merge changed."""
    for layer in adapted_layers(model).values():
        layer.unmerge()
    _tie_again(model)


def _pending(layer: AdaptedLayer, names: list[str]) -> list[str]:
    return [n for n in names if n in layer.adapters and n not in layer.merged_adapters]


def _check_order(path: str, layer: AdaptedLayer, names: list[str]) -> None:
    """Merged adapters apply before the others: refuse where that would change what active ones compute."""
    waiting = [n for n in layer.active_adapters if n not in layer.merged_adapters]
    inside = [n for n in names if n in waiting]
    if inside == waiting[: len(inside)] or all(isinstance(layer.adapters[n], Additive) for n in {*waiting, *names}):
        return
    first = waiting[: max(waiting.index(n) for n in inside) + 1]
    raise HalotuneError(
        f"{path}: the active adapters apply in the order {waiting}, so merging {names} would change the result: the "
        f"merged ones come first. Merge {first}, or set another order with set_adapter."
    )


def _untie(model: nn.Module, path: str, keep: bool) -> None:
    warn(f"{path} shares its weight with another module; the merge gives it a weight of its own, and the other stays as it is.")
    config = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False  # type: ignore[union-attr]  # else the next tie_weights() undoes the merge
        model.__dict__["_halotune_untied"] = keep  # not on the configuration, which is written to files


def _tie_again(model: nn.Module) -> None:
    if model.__dict__.pop("_halotune_untied", False):
        model.config.tie_word_embeddings = True  # type: ignore[union-attr]


def _with_progress(items: Iterable[T], show: bool) -> Iterable[T]:
    if not show:
        return items
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return items
    return tqdm(list(items), desc="Merging", unit="layer")
