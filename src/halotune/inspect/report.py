"""What `halotune inspect` prints and keeps: the heading, the table, the JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from ..cli.loading import BaseModel, Saved
from ..core.config import AdapterConfig
from ..core.errors import few
from ..methods.measures import Column
from ..methods.registry import method_of
from ..report.grid import split
from ..report.table import text_table
from .figures import Figures

FORMAT = 1
UNKNOWN = "–"

# Figures that every method has: the table's columns, as far as they are known.
COMMON = (
    Column("weight_norm", "‖W‖", "norm of the weight, ‖W‖"),
    Column("delta_norm", "‖ΔW‖", "norm of the delta, ‖ΔW‖"),
    Column("relative", "‖ΔW‖/‖W‖", "relative size of the delta, ‖ΔW‖ / ‖W‖", ".2e"),
    Column("spectral_norm", "σ₁(ΔW)", "largest singular value of the delta"),
    Column("effective_rank", "rank(ΔW)", "effective rank of the delta", ".2f"),
)


def value_of(layer: Figures, column: Column) -> float | None:
    found = layer.own.get(column.key, getattr(layer, column.key, None))
    return found if isinstance(found, (int, float)) else None


def known_columns(saved: Saved, layers: Sequence[Figures]) -> list[Column]:
    """The columns in which some layer has a figure."""
    measures = method_of(saved.config.peft_type).measures
    columns = [*COMMON, *(measures.columns if measures else ())]
    return [c for c in columns if any(value_of(layer, c) is not None for layer in layers)]


def heading(saved: Saved, base: BaseModel | None, layers: Sequence[Figures]) -> str:
    config = saved.config
    method = method_of(config.peft_type).peft_type
    rest = {k.removeprefix("base_model.model."): t for k, t in saved.tensors.items() if f".{saved.prefix}" not in k}
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in saved.tensors.values()})
    ranks = sorted({layer.rank for layer in layers})
    targets = config.target_modules
    shown = {
        "rank": ", ".join(map(str, ranks)),
        "targets": targets if isinstance(targets, str) else ", ".join(sorted(targets or [])),
        "options": ", ".join(f"{k}={v!r}" for k, v in options(config).items()),
        "task": str(getattr(config.task_type, "value", config.task_type) or ""),
        "base": _base_line(config.base_model_name_or_path, base),
        "size": f"{len(layers)} layers, {sum(layer.parameters for layer in layers):,} numbers",
        "beside": f"{few(rest)} ({sum(t.numel() for t in rest.values()):,} numbers)" if rest else "",
        "file": f"{saved.file.name}, {_bytes(saved.file.stat().st_size)}, {' and '.join(dtypes)}",
    }
    lines = [f"  {name:<8} {text}" for name, text in shown.items() if text]
    return "\n".join([f"{method} adapter {saved.source}", *lines])


def options(config: AdapterConfig) -> dict[str, Any]:
    """The method's own fields that are set to something else than their default."""
    own = [f.name for f in fields(config) if f.name == "bias" or f.name not in AdapterConfig.__dataclass_fields__]
    default = type(config)()
    return {name: getattr(config, name) for name in own if getattr(config, name) != getattr(default, name)}


def _base_line(named: str | None, base: BaseModel | None) -> str:
    if base is None:
        return f"{named or 'not named'}; not read: give --base to compare with its weights"
    inside = f", {base.component}" if base.component else ""
    dtype = str(next(base.model.parameters()).dtype).removeprefix("torch.")
    return f"{base.name}{inside} ({type(base.model).__name__}, {dtype})"


def _bytes(n: int) -> str:
    size, unit = next((n / 10**k, unit) for k, unit in ((9, "GB"), (6, "MB"), (3, "kB"), (0, "bytes")) if n >= 10**k)
    return f"{size:.{2 if n >= 1000 else 0}f} {unit}"


def table(saved: Saved, layers: Sequence[Figures]) -> str:
    """One line a layer, then the means of each kind of module."""
    columns = known_columns(saved, layers)
    kinds = ["kind"] if any(layer.kind for layer in layers) else []
    body, means = [], []
    for layer in layers:
        about = [layer.kind or "" for _ in kinds] + ["×".join(str(side or "?") for side in layer.shape), str(layer.rank)]
        body.append([layer.path, *about, *(_written(value_of(layer, c), c) for c in columns)])
    for name, group in modules(layers).items():
        if len(group) > 1:
            blank = ["" for _ in (*kinds, "weight", "r")]
            means.append([f"mean of {len(group)} {name}", *blank, *(_written(_mean(group, c), c) for c in columns)])
    head = ["layer", *kinds, "weight", "r", *(c.head for c in columns)]
    return text_table(head, body, means, left={"layer", "kind"})


def _written(value: float | None, column: Column) -> str:
    return UNKNOWN if value is None else format(value, column.form).rstrip(".")


def _mean(layers: Sequence[Figures], column: Column) -> float | None:
    known = [v for layer in layers if (v := value_of(layer, column)) is not None]
    return sum(known) / len(known) if known else None


def total(layers: Sequence[Figures]) -> dict[str, float | None]:
    """The norms of all layers together."""
    out: dict[str, float | None] = {}
    for name in ("weight_norm", "delta_norm"):
        values = [getattr(layer, name) for layer in layers]
        out[name] = None if None in values else math.hypot(*values)
    W, delta = out["weight_norm"], out["delta_norm"]
    return {**out, "relative_delta": delta / W if W and delta is not None else None}


def closing(layers: Sequence[Figures]) -> str:
    together = total(layers)
    written = ", ".join(f"{name} {together[key]:.3g}" for key, name in _TOTALS.items() if together[key] is not None)
    return f"all layers together: {written}" if written else ""


_TOTALS = {"weight_norm": "‖W‖", "delta_norm": "‖ΔW‖", "relative_delta": "‖ΔW‖/‖W‖"}


def as_document(saved: Saved, base: BaseModel | None, layers: Sequence[Figures]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "adapter": saved.source,
        "base": base.name if base else None,
        "config": saved.config.to_dict(),
        "file_bytes": saved.file.stat().st_size,
        "parameters": sum(layer.parameters for layer in layers),
        "total": total(layers),
        "layers": {layer.path: layer.to_dict() for layer in layers},
    }


def modules(layers: Sequence[Figures]) -> dict[str, list[Figures]]:
    """Layers by the name of their module."""
    out: dict[str, list[Figures]] = {}
    where = split([layer.path for layer in layers])
    for layer in layers:
        out.setdefault(where[layer.path][1], []).append(layer)
    return out
