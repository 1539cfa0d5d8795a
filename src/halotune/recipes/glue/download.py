"""`halotune data glue DIR`: GLUE's own files, as its own script lays them out."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from ...core.errors import HalotuneError
from ..common.download import Remote, fetch, put, unpack
from .files import LAYOUTS
from .tasks import TASKS, Task

_GLUE = "https://dl.fbaipublicfiles.com/glue/data"
_MSR = "https://dl.fbaipublicfiles.com/senteval/senteval_data"

FILES: dict[str, tuple[Remote, ...]] = {
    "cola": (Remote(f"{_GLUE}/CoLA.zip", "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff", 376971),),
    "sst2": (Remote(f"{_GLUE}/SST-2.zip", "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa", 7439277),),
    "mrpc": (
        Remote(f"{_GLUE}/mrpc_dev_ids.tsv", "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7", 6222),
        Remote(f"{_MSR}/msr_paraphrase_train.txt", "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89", 1047044),
        Remote(f"{_MSR}/msr_paraphrase_test.txt", "a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784", 441275),
    ),
    "stsb": (Remote(f"{_GLUE}/STS-B.zip", "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85", 802872),),
    "qqp": (Remote(f"{_GLUE}/QQP-clean.zip", "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0", 41696084),),
    "mnli": (Remote(f"{_GLUE}/MNLI.zip", "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633", 312783507),),
    "qnli": (Remote(f"{_GLUE}/QNLIv2.zip", "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5", 10627589),),
    "rte": (Remote(f"{_GLUE}/RTE.zip", "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee", 697150),),
    "wnli": (Remote(f"{_GLUE}/WNLI.zip", "ae0e8e4d16f4d46d4a0a566ec7ecceccfd3fbfaa4a7a4b4e02848c0f2561ac46", 28999),),
}
PARTS = tuple(FILES)


def get(folder: Path, parts: Iterable[str], given: Path | None) -> list[Path]:
    """The tasks' folders in `folder`, fetched, or taken from an archive or a folder that the user has.

    Raises:
        HalotuneError: a file cannot be had or is not the right one; nothing in `given` is GLUE's.
    """
    if given is not None:
        return _take(folder, list(parts), given)
    made = []
    for name in parts:
        task = TASKS[name]
        files = [fetch(remote, folder / ".downloads") for remote in FILES[name]]
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            if name == "mrpc":
                source = files[0].parent
            else:
                unpack(files[0], Path(scratch))
                source = _found(task, Path(scratch))
                if source is None:
                    raise HalotuneError(f"{files[0]}: holds no file of {task.folder}. Delete it, and try again.")
            _lay_out(task, source, folder)
        made.append(folder / task.folder)
    shutil.rmtree(folder / ".downloads", ignore_errors=True)
    return made


def _take(folder: Path, parts: list[str], given: Path) -> list[Path]:
    if not given.exists():
        raise HalotuneError(f"--from {given}: there is no such file or folder. Give an archive, or a folder of GLUE's files.")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        root = given
        if given.is_file():
            unpack(given, root := Path(scratch))
        found = {name: source for name in parts if (source := _found(TASKS[name], root)) is not None}
        if not found:
            raise HalotuneError(
                f"--from {given}: holds no file of {', '.join(TASKS[n].folder for n in parts)}. Expected files such as "
                "CoLA/train.tsv in it."
            )
        for name, source in found.items():
            _lay_out(TASKS[name], source, folder)
    return [folder / TASKS[name].folder for name in found]


def _found(task: Task, root: Path) -> Path | None:
    """The folder below `root` that holds a task's training file: the one of the task's name, or `root` for a lone task."""
    names = LAYOUTS[task.name].files["train"]
    own = [f for f in sorted(root.rglob("*")) if f.is_dir() and f.name.lower() in (task.folder.lower(), task.name)]
    for folder in own:
        if any((folder / name).is_file() for name in names):
            return folder
    for name in names[1:]:  # names that no other task has
        if file := next(iter(sorted(root.rglob(name))), None):
            return file.parent
    return None


def _lay_out(task: Task, source: Path, folder: Path) -> None:
    """Copy the files that are read; MRPC's training rows are divided as GLUE divides them, where it says how."""

    def fill(target: Path) -> None:
        for name in {name for names in LAYOUTS[task.name].files.values() for name in names}:
            if (source / name).is_file():
                shutil.copyfile(source / name, target / Path(name).name)
        ids = next((source / n for n in ("mrpc_dev_ids.tsv", "dev_ids.tsv") if (source / n).is_file()), None)
        if task.name == "mrpc" and ids is not None and not (target / "dev.tsv").exists():
            _divide(source / "msr_paraphrase_train.txt", ids, target)

    put(folder / task.folder, fill)


def _divide(file: Path, ids: Path, target: Path) -> None:
    held_out = {tuple(line.split("\t")) for line in ids.read_text(encoding="utf-8").splitlines()}
    head, *lines = file.read_text(encoding="utf-8-sig").split("\n")
    parts: dict[str, list[str]] = {"train.tsv": [head], "dev.tsv": [head]}
    for line in lines:
        fields = line.rstrip("\r").split("\t")
        if len(fields) > 2:
            parts["dev.tsv" if (fields[1], fields[2]) in held_out else "train.tsv"].append(line)
    for name, kept in parts.items():
        (target / name).write_text("\n".join(kept) + "\n", encoding="utf-8", newline="\n")
