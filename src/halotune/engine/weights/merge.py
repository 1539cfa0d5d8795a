"""Merging adapters into the stored weights: checked first, reported, and undone bit for bit."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from ...core.errors import HalotuneError, warn
from ...core.kinds import LowRank
from ...core.layer import AdaptedLayer
from ...core.merge_record import MergeRecord
from ...core.sharded_parameters import is_sharded
from ..injection.first_pass import is_uncalled
from ..injection.modules import adapted_layers, modules_to_save_wrappers, tied_parameters, unwrapped

T = TypeVar("T")

Requantize = Literal["requantize", "keep_float"]


@dataclass
class MergeReport:
    """What a merge did, layer by layer."""

    layers: dict[str, MergeRecord] = field(default_factory=dict)

    def total(self) -> MergeRecord:
        """All layers together: norms add as squares, shares by the number of weights."""
        return MergeRecord.total(list(self.layers.values()))

    def to_dict(self) -> dict[str, Any]:
        """`{"total": {…}, "layers": {name: {"delta": …, "lost": …, "error": …, "changed": …}}}`, ready for JSON."""
        layers = {name: record.to_dict() for name, record in self.layers.items()}
        return {"total": self.total().to_dict(), "layers": layers}

    def __str__(self) -> str:
        """A table: one line a layer, and the total."""
        width = max([5, *map(len, self.layers)])
        head = f"{'layer':<{width}}  {'|ΔW|/|W|':>9}  {'lost':>8}  {'error':>9}  {'changed':>8}"
        rows = [*self.layers.items(), ("total", self.total())]
        lines = [f"{n:<{width}}  {r.delta:>9.2e}  {r.lost:>8.2%}  {r.error:>9.2e}  {r.changed:>8.2%}" for n, r in rows]
        return "\n".join([head, *lines])


def merge(
    model: nn.Module,
    names: list[str],
    *,
    keep: bool = True,
    safe: bool = True,
    progressbar: bool = False,
    quantized: Requantize = "requantize",
) -> MergeReport:
    """Write adapters into the weights of all layers that have them.

    Every merged weight is computed and checked before the first is written.

    Args:
        names: the adapters, in the order in which they apply.
        keep: hold snapshots, for `unmerge`.
        safe: check for values that are not finite; and where the merge fails later, put everything back, for which copies of
            the weights are held in CPU memory until it is over.
        progressbar: show one on standard error.
        quantized: what becomes of a quantized weight: requantized, or replaced by floats.
    """
    if quantized not in ("requantize", "keep_float"):
        raise HalotuneError(f"quantized: expected 'requantize' or 'keep_float'; got {quantized!r}.")
    as_float = _float_dtype(model) if quantized == "keep_float" else None
    layers = {path: layer for path, layer in adapted_layers(model).items() if layer.pending(names)}
    shared = {n for others in tied_parameters(model) for n in others}
    tied = {path for path in layers if f"{path}.base_layer.weight" in shared}
    for path, layer in layers.items():
        check_order(path, layer, layer.pending(names))
        layer.base.require_mergeable(path, as_float is not None)
        _require_called(path, layer, layer.pending(names))
        if path in tied and layer.shard is None and is_sharded(layer.base.parameter):
            raise HalotuneError(
                f"{path} shares its weight with another module, and the model is sharded, so that no weight of its own can be "
                "put there. Nothing was merged. Merge it into a base that is not sharded (halotune merge)."
            )
    if safe:
        for path, layer in layers.items():
            layer.check_finite(layer.pending(names), path)
    report, untied = MergeReport(), "_halotune_untied" in vars(model)
    done: list[Callable[[], None]] = []
    try:
        for path in tied:
            _untie(model, path)
        for path, layer in _with_progress(layers.items(), progressbar):
            kept = keep or layer.base.quantization is not None  # few bits more, and a failure can be undone
            if kept and not layer.merged:
                done.append(layer.unmerge)
            elif kept or safe:
                done.append(partial(layer.put_back, layer.held()))
            record = layer.merge(layer.pending(names), keep=kept, untie=path in tied, as_float=as_float)
            _check_written(path, layer, record)
            report.layers[path] = record
    except BaseException:
        for undo in done:
            undo()
        if (keep or safe) and not untied:
            _retie(model)
        raise
    _warn_of_loss(list(layers.values()), report.total())
    return report


def _require_called(path: str, layer: AdaptedLayer, names: list[str]) -> None:
    """A layer whose weight is read without calling it runs without its adapters: merged, they would change the output."""
    if is_uncalled(layer) and not torch.equal(layer.merged_weight([]), layer.merged_weight(names)):
        raise HalotuneError(
            f"{path}: the model did not call this layer, so its adapters had no effect, and merged they would have one. "
            "Nothing was merged. Run a pass that calls it, or leave it out with exclude_modules."
        )


def _warn_of_loss(layers: list[AdaptedLayer], total: MergeRecord) -> None:
    quantized = [layer.base.quantization for layer in layers if layer.base.quantization]
    if quantized and total.lost > 0.1:
        warn(
            f"requantizing {len(quantized)} merged weights ({quantized[0]}) left an error of {total.error:.2%} of the "
            f"weights, beside a delta of {total.delta:.2%}. Merge with quantized='keep_float', or into a base in floats, to "
            "avoid that."
        )
    if not quantized and total.lost > 0.5:
        warn(
            f"merging into {layers[0].base.dtype} lost {total.lost:.0%} of the adapter's delta to rounding. Load the base in "
            "fp32 to merge without that loss."
        )


def _check_written(path: str, layer: AdaptedLayer, record: MergeRecord) -> None:
    """Refuse a loss that rounding does not explain: what was written is not what is read."""
    base = layer.base
    if base.quantization or not record.rounding(base.dtype) < record.lost_norm < math.inf:  # what is not finite passes
        return
    raise HalotuneError(
        f"{path}: the weight of this {type(base.module).__name__} was written, but what is read lacks {record.lost:.0%} of the "
        f"adapter's delta, more than rounding to {base.dtype} can lose. Make it a plain parameter first, or keep the adapter "
        "beside it."
    )


def unmerge(model: nn.Module) -> None:
    """Put back every weight that a merge changed."""
    for path, layer in adapted_layers(model).items():
        if layer.merged:
            layer.base.require_stored(path)
    for layer in adapted_layers(model).values():
        layer.unmerge()
    _retie(model)


def check_order(path: str, layer: AdaptedLayer, names: list[str]) -> None:
    """Merged adapters apply before the others: refuse where that would change what active ones compute."""
    waiting = [n for n in layer.active_adapters if n not in layer.merged_adapters]
    inside = [n for n in names if n in waiting]
    if inside == waiting[: len(inside)] or all(isinstance(layer.adapters[n], LowRank) for n in {*waiting, *names}):
        return
    first = waiting[: max(waiting.index(n) for n in inside) + 1]
    raise HalotuneError(
        f"{path}: the active adapters apply in the order {waiting}, so merging {names} would change the result: the "
        f"merged ones come first. Merge {first}, or set another order with set_adapter."
    )


def _float_dtype(model: nn.Module) -> torch.dtype:
    """The dtype in which a model computes: that of most of its own numbers that are plain floats."""
    ours = {id(p) for layer in adapted_layers(model).values() for p in layer.adapters.parameters()}
    count: Counter[torch.dtype] = Counter()
    for p in model.parameters():
        if type(p) is nn.Parameter and p.is_floating_point() and p.dtype.itemsize > 1 and id(p) not in ours:
            count[p.dtype] += p.numel()
    return max(count, key=count.__getitem__, default=torch.get_default_dtype())


def _untie(model: nn.Module, path: str) -> None:
    """Say in the configurations of the model and its parts that nothing is tied: else a reader of the file undoes the merge."""
    message = (
        f"{path} shares its weight with another module; the merge gives it a weight of its own, and the other stays as it is."
    )
    held = [c for m in model.modules() if (c := getattr(m, "config", None)) is not None]
    tying = [c for c in held if getattr(c, "tie_word_embeddings", False)]
    if not all(_may_say_untied(model, c) for c in tying):
        warn(
            f"{message} The configuration of {type(model).__name__} goes on saying that they are tied, since its outputs are "
            "scaled by that entry: transformers 5 reads both weights from a saved file, but tie_weights() would undo the merge."
        )
        return
    warn(message)
    for config in tying:
        config.tie_word_embeddings = False
    if tying:
        model.__dict__["_halotune_untied"] = tying  # not on a configuration, which is written to files


def _may_say_untied(model: nn.Module, config: Any) -> bool:
    """T5 and its kin compute with the entry, or read it back as True."""
    code = getattr(inspect.unwrap(type(unwrapped(model)).forward), "__code__", None)
    if "tie_word_embeddings" in getattr(code, "co_names", ()):
        return False
    read = getattr(type(config), "from_dict", None)
    return read is None or read({**config.to_dict(), "tie_word_embeddings": False}).tie_word_embeddings is False


def untie_copies(model: nn.Module) -> None:
    """Say in the model's configuration that a trained copy, which stays for good, has a weight of its own."""
    shared = {n for others in tied_parameters(model) for n in others}
    for path, wrapper in modules_to_save_wrappers(model).items():
        own = wrapper.original_module
        if wrapper.current is not own and any(f"{path}.original_module.{n}" in shared for n, _ in own.named_parameters()):
            _untie(model, path)


def _retie(model: nn.Module) -> None:
    for config in model.__dict__.pop("_halotune_untied", ()):
        config.tie_word_embeddings = True


def _with_progress(items: Iterable[T], show: bool) -> Iterable[T]:
    if not show:
        return items
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return items
    return tqdm(list(items), desc="Merging", unit="layer")
