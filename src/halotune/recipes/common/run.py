"""A run is a folder. Everything in it is written whole or not at all.

run.json        the command, the configuration, the versions, the state and the results
config.yaml     the configuration, for --config
metrics.jsonl   a line for every logged step, and for every evaluation
checkpoints/    complete ones only: the state to resume from
adapter/        the trained adapter, in PEFT's format; best/: that of the best evaluation
changes.json    what the adapter changed, layer by layer
predictions/    what the model answered
index.html      all of it as a page
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ...core.errors import HalotuneError
from ...core.files import write_atomically
from ...report.page import write_page
from ...report.record import write_record
from . import processes
from .config import RunConfig, as_yaml, plain

PAGE = "index.html"
FINISHED, RUNNING, INTERRUPTED, FAILED = "finished", "running", "interrupted", "failed"
PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "trl",
    "tokenizers",
    "safetensors",
    "numpy",
    "scikit-learn",
    "scipy",
)
HARMLESS = ("label", "output", "device", "tracker", "keep_checkpoints")  # fields that change no number of a run
PATHS = ("model", "data", "evaluation", "subject")  # fields that may name files


class Run:
    """A run's folder, opened for writing by one process; the other processes of the same training only read it.

    Attributes:
        record: what run.json holds.
        writer: whether this process writes.
        absent: the folders that were not there, the innermost first.
    """

    def __init__(self, config: RunConfig, command: str | None = None) -> None:
        self.folder = Path(str(config.output))
        self.writer = processes.first()
        self.absent = [f for f in (self.checkpoints, self.folder, *self.folder.parents) if not f.exists()]
        self.config, self.as_yaml = plain(config), as_yaml(config)
        found = read_run(self.folder)
        if found is None:
            self._check_free()
        else:
            self._check_same(found)
        self.record: dict[str, Any] = found or {
            "recipe": config.RECIPE,
            "label": config.label,
            "command": command or f"halotune train {config.RECIPE} --config {self.folder / 'config.yaml'}",
            "config": self.config,
            "seed": config.seed,
            "method": config.method,
            "model": config.model,
            "parameters": {},
            "results": {},
            "substitutes": [],
        }

    def left_alone(self) -> bool:
        """Whether the run is finished, which is said then; the page, if a killed process left none, is written."""
        if self.record.get("status") != FINISHED:
            return False
        if self.writer and not self.page.is_file():
            self.write_page()
        said(f"{self.folder}: finished already; nothing was done. Give another --output for a new run.")
        return True

    @property
    def page(self) -> Path:
        return self.folder / PAGE

    def write_page(self) -> None:
        write_page([self.folder], self.page)

    @contextmanager
    def open(self) -> Iterator[Run]:
        """The run, while it is running: its state is kept in run.json, whatever happens inside."""
        if not self.writer:
            yield self
            return
        with locked(self.folder), _terminated_as_interrupted():
            for left in self.folder.glob(".*.tmp"):  # by a killed process
                left.unlink()
            try:
                write_atomically(self.folder / "config.yaml", lambda file: file.write_text(self.as_yaml, encoding="utf-8"))
                self.update(status=RUNNING, config=self.config, label=self.config["label"], error=None)
                self.update(versions=versions(), hardware=hardware(), commit=commit(), directory=os.getcwd())
                yield self
            except KeyboardInterrupt:
                self.update(status=INTERRUPTED)
                said(f"{self.folder}: interrupted; the same command goes on after step {self.last_checkpoint()[1]}")
                raise
            except BaseException as e:
                self.update(status=FAILED, error=f"{type(e).__name__}: {e}")
                raise

    def update(self, **entries: Any) -> None:
        """Entries of run.json."""
        self.record |= entries
        if self.writer:
            write_record(self.folder / "run.json", finite(self.record))

    def same_data(self, *parts: Iterable[Any]) -> None:
        """Remember which rows the run is of, before it is opened.

        Raises:
            HalotuneError: there is a checkpoint already, of other rows.
        """
        found = digest(itertools.chain.from_iterable(parts))
        if self.last_checkpoint()[0] and self.record.get("data") not in (None, found):
            raise HalotuneError(
                f"{self.folder}: the data have changed since the run began. Put them back, or give another --output."
            )
        self.record["data"] = found

    # -- metrics

    def append(self, entries: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl; one call of the system writes it."""
        if self.writer:
            line = json.dumps(finite(entries), ensure_ascii=False, allow_nan=False) + "\n"
            with (self.folder / "metrics.jsonl").open("ab", buffering=0) as f:
                f.write(line.encode())

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return read_lines(self.folder / "metrics.jsonl")

    def rewind(self, step: int) -> None:
        """Forget what was measured after a step: it is going to be repeated."""
        kept = [json.dumps(line, ensure_ascii=False) + "\n" for line in self.metrics() if line["step"] <= step]
        if self.writer:
            write_atomically(self.folder / "metrics.jsonl", lambda file: file.write_text("".join(kept), encoding="utf-8"))

    def write(self, name: str, record: Mapping[str, Any]) -> None:
        if self.writer:
            write_record(self.folder / name, finite(record))

    # -- checkpoints

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def last_checkpoint(self) -> tuple[Path | None, int]:
        """The newest checkpoint and its step; None and 0 where there is none."""
        steps = {
            int(m[1]): f for f in self.checkpoints.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", f.name))
        }
        return (steps[max(steps)], max(steps)) if steps else (None, 0)

    def keep_checkpoints(self, number: int) -> None:
        """Delete all but the newest; each vanishes as a whole, since it is renamed first."""
        found = sorted(self.checkpoints.glob("checkpoint-*"), key=lambda f: int(f.name.rpartition("-")[2]))
        for old in found[:-number]:
            gone = old.rename(old.with_name(f".{old.name}.deleted"))
            shutil.rmtree(gone)

    # -- what is there already

    def _check_free(self) -> None:
        if self.folder.is_file():
            raise HalotuneError(f"{self.folder}: is a file. Give another --output, a folder that is there or not yet.")
        own = ("config.yaml", "log.txt", *(() if self.last_checkpoint()[0] else ("checkpoints",)))  # of a run that never began
        there = [f.name for f in self.folder.glob("[!.]*") if f.name not in own]
        if there and self.writer:
            raise HalotuneError(
                f"{self.folder}: holds {there[0]} and no run.json, so it is no run's folder. Give another --output."
            )

    def _check_same(self, found: Mapping[str, Any]) -> None:
        before, now = _flat(found.get("config", {})), _flat(self.config)
        differ = [k for k in {**before, **now} if before.get(k) != now.get(k) and k not in HARMLESS]
        if differ:
            shown = "; ".join(f"{k}: {before.get(k)!r} there, {now.get(k)!r} here" for k in differ[:4])
            raise HalotuneError(
                f"{self.folder}: holds a run with another configuration ({shown}). Give another --output, or delete the folder."
            )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside, no other job writes into the folder, which is made.

    Raises:
        HalotuneError: another one does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise HalotuneError(f"{folder}: another process writes into it. Wait for it, or give another --output.") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Inside, what a scheduler ends a job with is like Ctrl-C."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield
        return
    usual = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, usual)


def read_run(folder: Path) -> dict[str, Any] | None:
    """What a run's run.json holds; None where there is none."""
    file = folder / "run.json"
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise HalotuneError(f"{file}: cannot be read as JSON: {e}. Delete the run's folder and train again.") from e
    if not isinstance(record, dict):
        raise HalotuneError(f"{file}: holds no JSON object. Delete the run's folder and train again.")
    return record


def is_finished(folder: Path) -> bool:
    """Whether nothing is left to do in a run's folder; its page is written last."""
    return (read_run(folder) or {}).get("status") == FINISHED and (folder / PAGE).is_file()


def configuration(record: Mapping[str, Any]) -> Any:
    """A run's configuration; what it names relative to the folder that the run was started in is found from any other."""
    config, there = record["config"], Path(record.get("directory") or "")
    named = {name: config[name] for name in PATHS if isinstance(config.get(name), str) and not Path(config[name]).exists()}
    return config | {name: str(there / value) for name, value in named.items() if (there / value).exists()}


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a jsonl file; a last one that a killed process did not finish is left out."""
    if not file.is_file():
        return []
    *lines, last = file.read_text(encoding="utf-8", errors="replace").split("\n")  # JSON may hold other line breaks in texts
    if _is_json(last):  # no object's beginning is JSON
        lines.append(last)
    try:
        rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    except ValueError as e:
        raise HalotuneError(f"{file}: a line is no JSON ({e}). Correct it, or delete the file.") from e
    if not all(isinstance(row, dict) for row in rows):
        raise HalotuneError(f"{file}: a line is no JSON object. Correct it, or delete the file.")
    return rows


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def digest(rows: Iterable[Any]) -> str:
    """A number that other rows do not have."""
    found = hashlib.sha256()
    for row in rows:
        found.update(repr(row).encode("utf-8", "surrogatepass"))
    return found.hexdigest()


def finite(value: Any) -> Any:
    """NaN and infinity as None, which JSON has."""
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "halotune": _version("halotune")}
    return found | {p: _version(p) for p in PACKAGES if _version(p)}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def hardware() -> dict[str, Any]:
    """The first accelerator, or the processor; and how many processes share the work."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return {"device": properties.name, "memory_bytes": properties.total_memory, "processes": processes.count()}
    return {"device": platform.processor() or platform.machine(), "cores": os.cpu_count(), "processes": processes.count()}


def commit() -> str | None:
    """The commit of halotune's own sources; None where they are installed without their history."""
    here = Path(__file__).parent
    try:
        git = ["git", "-C", str(here)]
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True)
        found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:  # there is no git
        return None
    return found.stdout.strip() if tracked.returncode == 0 and found.returncode == 0 else None


def said(text: str) -> None:
    """A line to the user, below whatever bar is being drawn; once, not once a process."""
    if processes.first():
        print(text, file=sys.stderr, flush=True)


def _flat(entries: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in entries.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {prefix + key: value}
    return out
