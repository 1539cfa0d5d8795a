"""What the demo shows and keeps: the table, the plot, `metrics.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from rich import box
from rich.table import Table

from ..core.files import write_atomically
from ..report.record import read_record

METRICS, PLOT = "metrics.json", "learning_curves.png"
FORMAT = 1
# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = {"hra": "#D55E00", "loha": "#0072B2", "bone": "#009E73", "bat": "#CC79A7", "lora": "#555555"}

Record = dict[str, Any]


def read_metrics(file: Path) -> dict[str, Record]:
    """The records of earlier runs, by method; none where there is no such file, or not one of this format."""
    methods = (read_record(file, FORMAT) or {}).get("methods")
    return methods if isinstance(methods, dict) else {}


def as_document(records: dict[str, Record]) -> dict[str, Any]:
    return {"format": FORMAT, "methods": records}


def table(records: dict[str, Record]) -> Table:
    """One row a method; 80 columns are enough."""
    out = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    out.add_column("\nmethod", no_wrap=True)
    for header in (
        *("trained\nparams", "of\nall", "adapter\nfile", "training\ntime", "peak\nRSS*"),
        *("Spearman,\nheld out", "right sign,\nheld out"),
    ):
        out.add_column(header, justify="right", no_wrap=True)
    for r in records.values():
        before, after, memory = r["before"], r["after"], r["peak_memory_bytes"]
        out.add_row(
            r["title"],
            f"{r['trainable_parameters']:,}",
            f"{100 * r['trainable_parameters'] / r['total_parameters']:.2f}%",
            f"{r['adapter_bytes'] / 1e6:.2f} MB",
            f"{r['training_seconds']:.1f} s",
            "–" if memory is None else f"{memory / 1e6:,.0f} MB",
            f"{before['spearman']:.2f} → [bold]{after['spearman']:.3f}[/]",
            f"{100 * before['sign_accuracy']:.0f} → [bold]{100 * after['sign_accuracy']:.1f}%[/]",
        )
    out.caption = "* of the whole process while it trained, libraries and base model included"
    out.caption_justify = "left"
    return out


def proof_line(record: Record) -> str:
    proof = record["proof"]
    reload = _verdict("reloaded into a fresh model", proof["reloads"], proof["reload_difference"])
    merge = _verdict("merged into the weights", proof["merges"], proof["merge_difference"])
    return f"{record['title']:<5} {reload:<48} {merge}"


def _verdict(what: str, passed: bool, difference: float) -> str:
    if not passed:
        return f"[bold red]✗ {what}: off by {difference:.0e}[/]"
    return f"[green]✓[/] {what}: {f'to {difference:.0e}' if difference else 'exactly'}"


def plot(file: Path, records: dict[str, Record]) -> None:
    """Training loss, smoothed, and the held-out Spearman correlation, over the words trained on."""
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 4.4), dpi=150, layout="constrained")
        left, right = figure.subplots(1, 2)
        for name, r in records.items():
            curve, style = r["curve"], {"color": COLOURS.get(name), "linewidth": 1.8}
            left.plot(curve["words"], smoothed(curve["loss"]), label=r["title"], **style)
            words, spearman = zip(*((s["words"], s["spearman"]) for s in curve["scores"]), strict=True)
            label = f"{r['title']}  {r['after']['spearman']:.3f}"
            right.plot(words, spearman, label=label, marker="o", markersize=4, **style)
        untrained = next(iter(records.values()))["before"]["spearman"]
        left.set(title="Training loss, smoothed", ylabel="mean squared error")
        left.set_ylim(0, None)
        # Untrained scores are no part of the axis: beside them, all methods would look the same.
        right.set(title=f"Agreement on held-out words (untrained: {untrained:.2f})", ylabel="Spearman correlation")
        for axes in (left, right):
            axes.set_xlabel("words trained on")
            axes.set_xlim(0, None)
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.grid(alpha=0.25)
            axes.legend(loc="upper right" if axes is left else "lower right", frameon=False)
        write_atomically(file, lambda temporary: figure.savefig(temporary, format="png"))


def smoothed(losses: list[float], keep: float = 0.9) -> list[float]:
    """The exponential moving average, unbiased at its start."""
    out, mean, weight = [], 0.0, 0.0
    for loss in losses:
        mean, weight = keep * mean + (1 - keep) * loss, keep * weight + (1 - keep)
        out.append(mean / weight)
    return out
