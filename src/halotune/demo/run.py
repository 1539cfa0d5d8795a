"""`halotune demo`, from the flags to the exit status."""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from torch import Tensor

from .. import PeftModel, get_peft_model
from ..core.errors import HalotuneError
from ..report.record import json_text, write_record
from . import report
from .data import RatedWords, read_ratings, split
from .memory import PeakMemory
from .methods import METHODS
from .model import HEAD, Pretrained, package_folder
from .report import Record
from .train import BATCH, Run, Score, predict, score, steps_in, train

OK, UNPROVED, INTERRUPTED = 0, 1, 130
RELOAD_TOLERANCE = 1e-5
MERGE_TOLERANCE = 1e-4  # merging rounds the sum of weight and adapter to fp32 once more


@dataclass(frozen=True)
class Task:
    """What all methods share: the pretrained model, the words, and how well it does untrained."""

    pretrained: Pretrained
    words: RatedWords
    held_out: RatedWords
    before: Score
    epochs: float
    seed: int

    @classmethod
    def prepare(cls, model: str | None, epochs: float, seed: int) -> Task:
        pretrained = Pretrained.find(model)
        tokenizer = pretrained.tokenizer()
        lexicon = package_folder("vaderSentiment", "vaderSentiment") / "vader_lexicon.txt"
        words, held_out = (RatedWords.of(part, tokenizer) for part in split(read_ratings(lexicon)))
        before = score(predict(pretrained.rater(seed), held_out), held_out, 0)
        return cls(pretrained, words, held_out, before, epochs, seed)

    @property
    def settings(self) -> Record:
        """Records that agree in these can be compared."""
        return {"model": self.pretrained.name, "epochs": self.epochs, "seed": self.seed, "batch": BATCH}


def fit(task: Task, name: str, folder: Path, on_step: Callable[[float], object]) -> tuple[Run, Record]:
    """Train one method and save its adapter."""
    method = METHODS[name]
    base = task.pretrained.rater(task.seed)
    try:
        model = get_peft_model(base, method.configure(task.pretrained.targets, [HEAD]))
        with PeakMemory() as memory:
            run = train(model, task.words, task.held_out, method.learning_rate, task.epochs, task.seed, on_step)
    except HalotuneError as e:
        raise HalotuneError(f"{method.title}: {e}") from e
    model.save_pretrained(folder)
    trainable, total = model.get_nb_trainable_parameters()
    return run, {
        "title": method.title,
        "settings": task.settings,
        "config": method.options,
        "learning_rate": method.learning_rate,
        "training_words": len(task.words),
        "held_out_words": len(task.held_out),
        "trainable_parameters": trainable,
        "total_parameters": total,
        "adapter_bytes": (folder / "adapter_model.safetensors").stat().st_size,
        "training_seconds": round(run.seconds, 2),
        "threads": torch.get_num_threads(),
        "peak_memory_bytes": memory.peak,
        "before": asdict(task.before),
        "after": asdict(run.scores[-1]),
        "curve": {"words": run.words, "loss": run.losses, "scores": [asdict(s) for s in run.scores]},
    }


def prove(pretrained: Pretrained, folder: Path, trained: Tensor, words: RatedWords, seed: int) -> Record:
    """Load the adapter into a fresh base, whose random head is another one, then merge it into the weights.

    The largest differences from the trained model's predictions, as shares of the largest prediction, and whether they are
    small enough.
    """
    model = PeftModel.from_pretrained(pretrained.rater(seed + 1), folder)
    reloaded = difference(predict(model, words), trained)
    merged = difference(predict(model.merge_and_unload(), words), trained)
    passed = {"reloads": reloaded <= RELOAD_TOLERANCE, "merges": merged <= MERGE_TOLERANCE}  # False for NaN
    return {"reload_difference": reloaded, "merge_difference": merged, **passed}


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def run_method(bars: Progress, task: Task, name: str, output_dir: Path) -> Record:
    """Train, save, prove; the adapter of an earlier run is replaced only then."""
    bar = bars.add_task(METHODS[name].title, total=steps_in(task.epochs, task.words) + 1, doing="")  # the last is the proof
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=output_dir) as staging:
        run, record = fit(task, name, Path(staging), lambda loss: bars.update(bar, advance=1, doing=f"loss {loss:.2f}"))
        gc.collect()  # the trained model, so that the next one's memory is its own
        bars.update(bar, doing="reloading and merging")
        record["proof"] = prove(task.pretrained, Path(staging), run.predictions, task.held_out, task.seed)
        (output_dir / name).mkdir(exist_ok=True)
        for file in Path(staging).iterdir():
            os.replace(file, output_dir / name / file.name)
    bars.update(bar, advance=1, doing=f"Spearman {record['after']['spearman']:.3f}")
    return record


def demo(methods: list[str], model: str | None, epochs: float, seed: int, output_dir: Path, *, as_json: bool = False) -> int:
    """Run the methods in turn and report; what was finished is kept, whatever stops the run.

    Returns:
        0; 1 where an adapter did not give the same predictions again; 130 after Ctrl-C.
    """
    started = time.perf_counter()
    console = Console(stderr=as_json, highlight=False)
    check_writable(output_dir)
    results: dict[str, Record] = {}
    status = OK
    try:
        with console.status("Loading the pretrained model and the ratings"):
            task = Task.prepare(model, epochs, seed)
        console.print(
            f"[bold]{escape(task.pretrained.name)}[/] learns how good or bad words are:\n"
            f"{len(task.words):,} human ratings from VADER to train on, {len(task.held_out):,} held out; "
            f"epochs {task.epochs:g}, seed {task.seed}\n"
        )
        columns = TextColumn("{task.description:<5}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
        with Progress(*columns, TextColumn("{task.fields[doing]}"), console=console) as bars:
            for name in methods:
                results[name] = run_method(bars, task, name, output_dir)
                keep(output_dir, results)
    except KeyboardInterrupt:
        status = INTERRUPTED
        console.print(f"\n[bold]Interrupted:[/] {'what was finished is kept.' if results else 'nothing was finished.'}")
    finally:
        if results:
            conclude(console, output_dir, results, time.perf_counter() - started)
    if as_json and results:
        print(json_text(report.as_document(keep(output_dir, results))))
    failed = not all(r["proof"]["reloads"] and r["proof"]["merges"] for r in results.values())
    return status or (UNPROVED if failed else OK)


def check_writable(folder: Path) -> None:
    """Found out now, not after minutes of training."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise HalotuneError(f"--output-dir {folder}: cannot be written: {e.strerror}. Choose another folder.") from e


def keep(output_dir: Path, results: dict[str, Record]) -> dict[str, Record]:
    """Write the results into `metrics.json`; other methods of earlier runs stay there, as their adapters do."""
    file = output_dir / report.METRICS
    merged = {**report.read_metrics(file), **results}
    merged = {name: merged[name] for name in [*METHODS, *merged] if name in merged}  # in one order, always
    write_record(file, report.as_document(merged))
    return merged


def conclude(console: Console, output_dir: Path, results: dict[str, Record], seconds: float) -> None:
    """Table and plot, of this run and of what earlier runs with the same settings left; proofs, of this run."""
    first = next(iter(results.values()))
    settings, held_out = first["settings"], first["held_out_words"]
    comparable = {name: r for name, r in keep(output_dir, results).items() if r["settings"] == settings}
    console.print()
    console.print(report.table(comparable))
    console.print()
    console.print(f"The same predictions again, on the {held_out:,} held-out words:")
    for name in filter(results.__contains__, comparable):
        console.print(report.proof_line(results[name]))
    report.plot(output_dir / report.PLOT, comparable)
    console.print(f"\n{seconds:.0f} s. Adapters, {report.METRICS} and {report.PLOT} are in [bold]{escape(str(output_dir))}[/]")
