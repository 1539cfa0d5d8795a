"""The chart of `halotune inspect`: heat maps over layers × modules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker
import numpy as np

from ..cli.loading import Saved
from ..core.files import write_atomically
from ..methods.measures import Column
from ..methods.registry import method_of
from ..report.grid import short, split
from .figures import Figures
from .report import COMMON, known_columns, value_of


def panels(saved: Saved, layers: Sequence[Figures]) -> list[Column]:
    """What is drawn: the size of the delta, relative if that is known, and the method's own figure, else its rank."""
    known = {c.key: c for c in known_columns(saved, layers)}
    own = [key for key in known if key not in {c.key for c in COMMON}]
    wanted = [next((k for k in ("relative", "delta_norm") if k in known), None), next(iter(own), "effective_rank")]
    return [known[key] for key in wanted if key in known]


COLOURS = ("YlGnBu", "YlOrRd")  # of the panels, light to dark
NUMBERED = 32  # layers: with more, numbers in the cells would not be legible


def plot(file: Path, saved: Saved, layers: Sequence[Figures]) -> None:
    """Write a PNG."""
    from matplotlib.figure import Figure

    where = split([layer.path for layer in layers])
    rows = list(dict.fromkeys(module for _, module in where.values()))
    columns = list(dict.fromkeys(layer for layer, _ in where.values()))
    names = list(short(columns).values())
    shown = panels(saved, layers)
    width = min(max(6.5, 3.2 + 0.45 * len(columns)), 40.0)
    height = min(0.9 + len(shown) * (0.8 + 0.3 * len(rows)), 60.0)
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
        figure.suptitle(_title(saved), x=0.01, ha="left", fontsize=11, fontweight="bold")
        axes = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
        for ax, column, colours in zip(axes, shown, COLOURS, strict=False):
            values = np.full((len(rows), len(columns)), np.nan)
            for layer in layers:
                at, module = where[layer.path]
                value = value_of(layer, column)
                values[rows.index(module), columns.index(at)] = np.nan if value is None else value
            ax.set_title(column.meaning, loc="left", fontsize=10)
            ax.set_yticks(range(len(rows)), rows)
            _heat_map(figure, ax, values, colours)
        axes[-1].set_xticks(range(len(columns)), names, rotation=0 if max(map(len, names)) < 4 else 90)
        axes[-1].set_xlabel("layer")
        write_atomically(file, lambda temporary: figure.savefig(temporary, format="png"))


def _heat_map(figure: Any, ax: Any, values: np.ndarray, colours: str) -> None:
    cmap = matplotlib.colormaps[colours].with_extremes(bad="0.95")  # what is not adapted, or not known
    image = ax.imshow(np.ma.masked_invalid(values), aspect="auto", cmap=cmap)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0, which="both")
    for axis, n in ((ax.xaxis, values.shape[1]), (ax.yaxis, values.shape[0])):  # white lines between the cells
        axis.set_minor_locator(matplotlib.ticker.FixedLocator(np.arange(n - 1) + 0.5))
    ax.grid(which="minor", color="white", linewidth=1.5)
    bar = figure.colorbar(image, ax=ax, pad=0.015, fraction=0.05, aspect=12)
    bar.outline.set_visible(False)
    if values.shape[1] > NUMBERED:
        return
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            dark = image.norm(value) > 0.6
            text = compact(value)
            ax.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if dark else "0.15")


def compact(value: float) -> str:
    """Two digits or three, in at most five characters."""
    if value == 0 or 1e-2 <= abs(value) < 1e4:
        return f"{value:.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2}f}"
    digits, _, exponent = f"{value:.0e}".partition("e")
    return f"{digits}e{int(exponent)}"


def _title(saved: Saved) -> str:
    config = saved.config
    method = method_of(config.peft_type).peft_type
    base = Path(config.base_model_name_or_path).name if config.base_model_name_or_path else ""
    name = Path(saved.source).resolve().name
    field, size = config.size
    return f"{name}: {method}, {field} = {size}" + (f", on {base}" if base else "")
