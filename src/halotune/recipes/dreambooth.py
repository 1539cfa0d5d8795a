"""DreamBooth's data set: 30 subjects and 25 prompts each; `halotune data dreambooth`, and a training for every subject.

DIR/SUBJECT/00.jpg, DIR/prompts_and_classes.txt, as its repository has them, with or without its folder dataset/ around.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import HalotuneError
from .common.download import Remote, fetch, put, unpack
from .common.run import is_finished, said

if TYPE_CHECKING:
    from .subject import SubjectConfig

TABLE = "prompts_and_classes.txt"
LIVE = ("cat", "dog")  # classes of living subjects, which have prompts of their own
PARTS = ("all",)
SOURCE = "https://github.com/google/dreambooth"
COMMIT = "e9b8c013ef2e30ab3d5d9018808513e9093e3bc4"
ARCHIVE = Remote(f"{SOURCE}/archive/{COMMIT}.zip", None)  # GitHub packs it anew, so its bytes may differ
SUBJECTS = 30


@dataclass(frozen=True)
class Subject:
    """A subject of the data set.

    Attributes:
        prompts: with {0} for the identifier and {1} for the class.
    """

    name: str
    class_word: str
    folder: Path
    prompts: tuple[str, ...]

    @property
    def live(self) -> bool:
        return self.class_word in LIVE

    def prompts_with(self, identifier: str) -> list[str]:
        return [p.format(identifier, self.class_word) for p in self.prompts]


def read_suite(folder: Path) -> list[Subject]:
    """The subjects, in the order of the table.

    Raises:
        HalotuneError: the table is missing or not as expected, a subject is there twice, or its folder is not there.
    """
    table = next((f for f in (folder / TABLE, folder / "dataset" / TABLE) if f.is_file()), None)
    if table is None:
        raise HalotuneError(f"{folder}: holds no {TABLE}. Lay the data set out with: halotune data dreambooth {folder}")
    text = table.read_text(encoding="utf-8")
    classes = re.findall(r"^([\w-]+),([\w -]+?)\s*$", text.partition("subject_name,class")[2].partition("Prompts")[0], re.M)
    objects, _, live = text.partition("Live Subject Prompts")
    lists = [tuple(re.findall(r"'([^'\n]*\{0\} \{1\}[^'\n]*)'", part)) for part in (objects, live)]
    if not classes or not all(lists):
        found = f"{len(classes)} subjects, {len(lists[0])} prompts of objects and {len(lists[1])} of live ones"
        raise HalotuneError(f"{table}: {found} were found in it. Get it again from {SOURCE}.")
    names = [name.lower() for name, _ in classes]
    for name in names:
        if names.count(name) > 1:
            raise HalotuneError(f"{table}: has two subjects named {name!r}, whose runs would share a folder. Rename one.")
    out = []
    for name, class_word in classes:
        place = table.parent / name
        if not place.is_dir():
            raise HalotuneError(f"{place}: there is no such folder, but {TABLE} names it. Add it, or take out its line.")
        out.append(Subject(name, class_word, place, lists[class_word in LIVE]))
    return out


def train_suite(
    config: SubjectConfig, train: Callable[..., dict[str, Any]], *, dry_run: bool = False, command: str | None = None
) -> dict[str, Any]:
    """A run for every subject, or for every subject and prompt, in folders below `config.output`; what they found.

    The same command again goes on with what is not finished. With `config.shard` i/n it does every n-th run from the i-th.
    """
    runs = suite_runs(config)
    number, shares = map(int, config.shard.split("/"))
    mine = runs[number::shares]
    done = [r for r in mine if is_finished(Path(str(r.output)))]
    said(f"{config.output}: {len(mine)} of {len(runs)} runs are this process's, {len(done)} of them finished already")
    results = {}
    for run in mine:
        record = train(run, dry_run=dry_run, command=command)
        results[Path(str(run.output)).name] = record.get("results", {})
        if dry_run:
            break
    return {"recipe": config.RECIPE, "results": results}


def suite_runs(config: SubjectConfig) -> list[SubjectConfig]:
    subjects = read_suite(Path(config.subject))
    chosen = subjects
    if config.class_index is not None:
        there = 0 <= config.class_index < len(subjects)
        config.require("class_index", there, f"must be from 0 to {len(subjects) - 1}", "Choose one.")
        chosen = [subjects[config.class_index]]
    runs = []
    for subject in chosen:
        prompts = list(enumerate(subject.prompts_with(config.identifier)))
        if config.prompt_index is not None:
            there = 0 <= config.prompt_index < len(prompts)
            config.require("prompt_index", there, f"must be from 0 to {len(prompts) - 1}", "Choose one.")
            prompts = [prompts[config.prompt_index]]
        groups = [[p] for p in prompts] if config.paper_code else [prompts]
        for group in groups:
            name = f"{subject.name}-{group[0][0]}" if config.paper_code else subject.name
            runs.append(
                replace(
                    config,
                    suite=None,
                    class_index=None,
                    prompt_index=None,
                    paper_code=False,
                    shard="0/1",
                    subject=str(subject.folder),
                    class_word=subject.class_word,
                    class_folder=config.class_folder and f"{config.class_folder}/{subject.class_word}",
                    validation_prompts=[text for _, text in group],
                    output=f"{config.output}/{name}",
                )
            )
    return runs


def get(folder: Path, parts: Iterable[str], given: Path | None) -> list[Path]:
    """Lay the data set out in `folder`: fetched, or from a clone or an archive of its repository.

    Raises:
        HalotuneError: it cannot be had, or is damaged; or what is given holds no such data.
    """
    if given is not None:
        return _lay_out(given, folder, f"--from {given}")
    downloads = folder.with_name(f".{folder.name}.downloads")
    archive = fetch(ARCHIVE, downloads)
    try:
        _check(archive)
        made = _lay_out(archive, folder, ARCHIVE.url)
    except HalotuneError:
        archive.unlink()
        raise
    shutil.rmtree(downloads)
    return made


def _check(archive: Path) -> None:
    """Every file's checksum, as the archive has them, and the commit that it was packed from."""
    try:
        with zipfile.ZipFile(archive) as z:
            damaged, commit = z.testzip(), z.comment.decode("ascii", "replace")
    except (zipfile.BadZipFile, zlib.error, EOFError) as e:
        raise HalotuneError(f"{ARCHIVE.url}: is damaged ({e}), and was not kept. Try again.") from e
    if damaged or commit != COMMIT:
        found = f"its {damaged} is damaged" if damaged else f"it is of commit {commit or 'unknown'}, not {COMMIT}"
        raise HalotuneError(f"{ARCHIVE.url}: not kept, as {found}. Try again, or give a clone that you trust with --from.")


def _lay_out(given: Path, folder: Path, name: str) -> list[Path]:
    if not given.exists():
        raise HalotuneError(f"{name}: there is no such file or folder. Give a clone of {SOURCE}, or an archive of it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        root = given
        if given.is_file():
            unpack(given, root := Path(scratch))
        table = next(iter(sorted(root.rglob(TABLE))), None)
        if table is None:
            raise HalotuneError(f"{name}: holds no {TABLE}. Give a clone of {SOURCE}, or an archive of it.")
        subjects = read_suite(table.parent)

        def fill(target: Path) -> None:
            shutil.copyfile(table, target / TABLE)
            for subject in subjects:
                shutil.copytree(subject.folder, target / subject.name)
            for note in table.parent.glob("*icense*"):
                shutil.copyfile(note, target / note.name)

        put(folder, fill)
    if len(subjects) != SUBJECTS:
        said(f"{folder}: {len(subjects)} subjects; the published data set has {SUBJECTS}")
    return [folder / subject.name for subject in subjects]
