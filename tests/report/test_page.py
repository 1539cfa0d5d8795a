"""What a report says, without a browser: figures, names, what is missing; and that it stays one small file."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

from halotune.cli.main import main
from halotune.core.errors import HalotuneError
from halotune.report.gallery import gallery_of, side_by_side
from halotune.report.page import ASSETS, write_page
from halotune.report.rows import Value, better, columns, curve, rows, written
from halotune.report.runs import Run, find_runs, read_run
from tests.report.samples import METHODS, png, write_run, write_sweep

EVIL = "</script><img src=x onerror=alert(1)>\"'&{{ 1 + 1 }}\ud800"


class Page(HTMLParser):
    """A page's elements with their attributes, the texts of its tables' cells, what it says, and the data of the charts."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.source = file.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.in_cell = False
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        words = " ".join(data.split())
        if not words:
            return
        tag, attributes = self.elements[-1]
        if attributes.get("id") == "data":
            self.data = json.loads(data)
        elif tag not in ("script", "style"):
            self.text += f" {words}"
            if self.in_cell:
                self.rows[-1][-1] = f"{self.rows[-1][-1]} {words}".strip()


def page_of(*folders: Path, output: Path | None = None) -> Page:
    output = output or folders[0].parent / "page.html"
    write_page(list(folders), output)
    return Page(output)


def edit(folder: Path, **entries: Any) -> Path:
    file = folder / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | entries), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("sweep") / "runs", steps=40, layers=4)


def test_seeds_are_one_row_with_mean_and_deviation(sweep: Path) -> None:
    page = page_of(sweep)
    assert {row["name"] for row in page.data["rows"]} == METHODS.keys()
    assert sum(row[0].startswith("seed") for row in page.rows) == 3 * len(METHODS)
    records = [json.loads(file.read_text(encoding="utf-8")) for file in sweep.glob("*/run.json")]
    for method in METHODS:
        accuracies = [record["results"]["best"]["accuracy"] for record in records if record["label"] == method]
        [line] = [row for row in page.rows if row[0] == f"{method} 3 runs"]
        number, deviation = map(float, line[2].split(" ± "))
        assert len(accuracies) == 3 and line[1] == "finished"
        assert number == pytest.approx(mean(accuracies), abs=1e-4)
        assert deviation == pytest.approx(stdev(accuracies), rel=0.05)


def test_the_head_says_which_way_is_better(sweep: Path) -> None:
    words = page_of(sweep).rows[0]
    assert words[:5] == ["configuration", "status", "best accuracy ↑", "best loss ↓", "last accuracy ↑"]
    assert words[5:8] == ["trained parameters ↓", "peak memory (GiB) ↓", "time (min) ↓"]
    assert words[8:] == ["method", "r", "orthogonality weight", "learning rate"]  # what differs, and nothing else


def test_what_all_runs_share_is_said_once(sweep: Path) -> None:
    page = page_of(sweep)
    assert page.source.count("NVIDIA H100") == 1 and page.source.count("all-linear") == 1
    assert page.text.count("MiniLM's weights in DeBERTa-v2's shape") == 1  # the substitute


def test_runs_of_other_labels_are_other_rows(tmp_path: Path) -> None:
    """As of another library, whose configuration is the same."""
    for label in "LoHa seed 1", "LoHa seed 2", "peft LoHa seed 1", None:
        for seed in 1, 2:
            config = {"seed": seed, "label": label, "adapter": {"r": 8}}
            write_run(tmp_path / f"{label}-{seed}", seed=seed, steps=10, label=label or "r8", config=config)
    found = rows([read_run(folder) for folder in sorted(tmp_path.iterdir())])
    assert sorted((row.label, len(row.runs)) for row in found) == [("LoHa", 4), ("peft LoHa", 2), ("r8", 2)]


def test_a_setting_that_one_version_does_not_have_names_no_row(tmp_path: Path) -> None:
    for i, own in enumerate(({"rate": 1}, {"rate": 2, "newer": False})):
        write_run(tmp_path / str(i), steps=10, label="HRA", config=own)
    assert [row["name"] for row in page_of(tmp_path).data["rows"]] == ["HRA, rate 1", "HRA, rate 2"]


def test_another_rate_is_another_row_named_apart(tmp_path: Path) -> None:
    for i, rate in enumerate((1e-3, 1e-3, 3e-3)):
        config = {"learning_rate": rate, "seed": i, "output": f"runs/{i}", "adapter": {"r": 8}}
        write_run(tmp_path / str(i), seed=i, steps=10, config=config)
    page = page_of(tmp_path, output=tmp_path / "page.html")
    assert [row["name"] for row in page.data["rows"]] == ["HRA r8, learning rate 0.001", "HRA r8, learning rate 0.003"]


def test_unfinished_runs_do_not_enter_the_means(tmp_path: Path) -> None:
    for seed in range(3):
        write_run(tmp_path / f"{seed}", seed=seed, steps=10, results={"accuracy": 0.5 + seed / 10})
    edit(tmp_path / "2", status="interrupted")
    [row] = page_of(tmp_path).data["rows"]
    assert row["values"]["results.accuracy"][0] == pytest.approx(0.55)
    [summed] = rows([read_run(tmp_path / f"{seed}") for seed in range(3)])
    assert summed.status == "2 finished, 1 interrupted"
    for seed in range(2):
        edit(tmp_path / f"{seed}", status="running")
    assert page_of(tmp_path).data["rows"][0]["values"]["results.accuracy"][0] == pytest.approx(0.6)


def test_values_are_escaped(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run", label=EVIL, status=EVIL, command=EVIL, substitutes=[EVIL], config={EVIL: EVIL}, results={EVIL: 1}
    )
    write_run(tmp_path / "other", label=EVIL, config={EVIL: "another"})
    (run / "changes.json").write_text(json.dumps({"layers": {EVIL: {"relative_change": 1}}}))
    (run / "gallery.json").write_text(json.dumps({"columns": [EVIL], "rows": [{"label": EVIL, "images": [EVIL]}]}))
    page = page_of(tmp_path)
    assert [tag for tag, _ in page.elements].count("script") == 4
    assert not [attributes for _, attributes in page.elements if "onerror" in attributes]
    assert page.data["rows"][1]["name"].startswith(EVIL[:-1])  # as it was, but for half a character
    assert "{{ 1 + 1 }}" in page.text


def test_it_asks_no_other_place_for_anything(sweep: Path) -> None:
    page = page_of(sweep)
    places = [
        v
        for _, a in page.elements
        for k, v in a.items()
        if k in ("src", "href", "srcset", "action", "data", "poster", "xlink:href")
    ]
    assert len(places) > 20 and all(place and place.startswith(("#row-", "data:")) for place in places)
    assert not re.search(r"url\(|@import", (ASSETS / "page.css").read_text())
    [policy] = [a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy and policy.startswith("default-src 'none';") and "http" not in policy


def test_many_long_runs_make_less_than_three_megabytes(tmp_path: Path) -> None:
    first = write_run(tmp_path / "0", steps=1500, layers=48)
    for i in range(1, 120):
        shutil.copytree(first, tmp_path / f"{i}")
        edit(tmp_path / f"{i}", config={"learning_rate": i, "seed": 0, "notes": "a long setting " * 10})
    page = page_of(tmp_path)
    assert len(page.data["rows"]) == 120
    assert all(len(curves) == 120 and all(map(len, curves.values())) for curves in page.data["curves"].values())
    assert len(page.source.encode()) < 3e6


def remove(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).unlink()


def write(name: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda run: (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def cut(name: str) -> Callable[[Path], object]:
    return lambda run: (run / name).write_bytes((run / name).read_bytes()[:-40])


@pytest.mark.parametrize(
    ("damage", "problem"),
    {
        "no record": (remove("run.json"), "run.json is missing"),
        "half a record": (cut("run.json"), "run.json cannot be read as JSON"),
        "another encoding": (write("run.json", b"\xff\xfe{"), "run.json cannot be read as JSON"),
        "nested without end": (write("run.json", "[" * 100_000), "run.json cannot be read as JSON"),
        "a list": (write("run.json", "[1]"), "run.json: expected a JSON object, found a list"),
        "another version": (
            write("run.json", '{"label": [1], "config": "no", "results": [{}], "memory": 3, "seed": "s", "substitutes": 1}'),
            None,
        ),
        "numbers out of range": (
            write("run.json", '{"seed": NaN, "seconds": 1e999, "results": {"a": NaN, "b": 1' + "0" * 400 + "}}"),
            None,
        ),
        "no metrics": (remove("metrics.jsonl"), "metrics.jsonl is missing"),
        "half a line": (cut("metrics.jsonl"), "metrics.jsonl: 1 of 50 lines cannot be read"),
        "lines of nothing": (write("metrics.jsonl", "\n[]\n{}\n\0\n"), "metrics.jsonl: 3 of 4 lines cannot be read"),
        "a loss that is lost": (write("metrics.jsonl", '{"step": 1, "loss": NaN}'), "metrics.jsonl: 1 values are not finite"),
        "no changes": (remove("changes.json"), "changes.json is missing"),
        "half of the changes": (cut("changes.json"), "changes.json cannot be read as JSON"),
        "changes of another kind": (write("changes.json", '{"layers": {"a": 1, "b": {"relative_change": "much"}}}'), None),
        "half a gallery": (write("gallery.json", '{"columns": ['), "gallery.json cannot be read as JSON"),
        "another gallery": (
            write("gallery.json", '{"columns": 3, "rows": [1, {"images": 2}, {"images": [null, 3]}]}'),
            "gallery.json: 3: No such file",
        ),
    }.values(),
)
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside another"])
def test_what_cannot_be_read_is_shown_as_missing(tmp_path: Path, damage: Any, problem: str | None, alone: bool) -> None:
    run = write_run(tmp_path / "damaged", steps=40, layers=2)
    damage(run)
    if not alone:
        write_run(tmp_path / "sound", "LoRA r8", steps=40, layers=2)
    page = page_of(tmp_path)
    assert len(page.data["rows"]) == (1 if alone else 2)
    if problem:
        assert problem in page.text and "incomplete" in page.text


def test_a_folder_with_nothing_but_metrics_is_a_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    write("metrics.jsonl", '{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n{"step": 2, "loss": 1.5}\n')(tmp_path / "run")
    page = page_of(tmp_path)
    assert page.data["rows"][0]["name"] == "run"
    assert page.data["curves"] == {"loss": {"row-0": [[1, 2], [2, 1.5]]}}  # of a step done twice, the later


def test_the_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, output = write_run(tmp_path / "run"), tmp_path / "pages" / "page.html"
    page_of(run, output=output)
    before = output.read_bytes()

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:1000])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_page([run], output)
    assert output.read_bytes() == before and list(output.parent.iterdir()) == [output]


def test_runs_are_found_once_and_in_order(tmp_path: Path) -> None:
    for name in ("b/seed-10", "b/seed-9", "a"):
        write_run(tmp_path / name, steps=1)
    write_run(tmp_path / "a" / "checkpoints" / "last", steps=1)  # a part of a
    names = [p.relative_to(tmp_path).as_posix() for p in find_runs([tmp_path / "b" / "seed-10", tmp_path, tmp_path / "a"])]
    assert names == ["b/seed-10", "a", "b/seed-9"]


def test_pictures_lie_in_the_page_and_none_from_outside(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", pictures=True)
    (tmp_path / "outside.png").write_bytes(png(0, 0))
    (run / "drawing.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    row = {
        "label": "a dog",
        "images": ["picture-0.png", "../outside.png", str(tmp_path / "outside.png"), "drawing.svg", "none.png"],
    }
    (run / "gallery.json").write_text(
        json.dumps({"columns": ["made", "b", "c"], "rows": [row, {"label": "a cat", "images": []}]})
    )
    page = page_of(run)
    pictures = [attributes for tag, attributes in page.elements if tag == "img" and attributes.get("src")]
    assert [p["alt"] for p in pictures] == ["HRA r8, seed 0, a dog, made"]
    assert (pictures[0]["src"] or "").startswith("data:image/png;base64,iVBOR")
    assert page.rows[-3:] == [["", "made", "b", "c", "", ""], ["a dog", "", *["missing"] * 4], ["a cat", *["missing"] * 5]]
    for problem in ("../outside.png lies outside", "drawing.svg is no PNG", "none.png: No such file"):
        assert problem in page.text


def test_curves_of_many_steps_are_averaged() -> None:
    runs = [{float(step): float(step) for step in range(1000)}, {float(step): 3.0 * step for step in range(500)}]
    points = curve(runs, 100)
    assert len(points) == 100
    assert points[0] == [4.5, 9, 4.5, 13.5] and points[-1] == [994.5, 994.5, 994.5, 994.5]
    assert curve(runs[1:], 100)[1] == [7, 21]


@pytest.mark.parametrize(
    ("number", "deviation", "text"),
    [
        (0.84327, 0.00614, "0.8433 ± 0.0061"),
        (0.84327, 0, "0.8433"),
        (12, 0, "12"),
        (663552, 0, "663,552"),
        (1234.5, 12, "1,234 ± 12"),
        (3e-9, 0, "3e-09"),
        (float("nan"), 0, "nan"),
    ],
)
def test_numbers_have_the_digits_that_mean_something(number: float, deviation: float, text: str) -> None:
    assert written(number, deviation) == text


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("best.accuracy", "up"),
        ("matthews_correlation", "up"),
        ("eval_loss", "down"),
        ("test.perplexity", "down"),
        ("lpips_diversity", "up"),
        ("best.step", ""),
    ],
)
def test_which_way_is_better(name: str, way: str) -> None:
    assert better(name) == way


def test_a_number_that_some_seeds_lack_says_so() -> None:
    runs = [Run(Path(str(i)), {"config": {"seed": i}, "results": {"accuracy": 0.5} if i else {}}) for i in range(3)]
    [row] = rows(runs)
    [column] = columns([row])
    assert column.write(row.value(column.key), len(row.counted)) == "0.5000 (2 of 3)"
    assert column.write(None) == "" and Value(1, 0, 1) == Value(1, 0, 1)


def test_the_command_writes_into_the_folder(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(sweep)]) == 0
    assert capsys.readouterr().out.startswith(f"Wrote {sweep / 'index.html'}: 21 runs, 0.")
    assert (sweep / "index.html").is_file()


@pytest.mark.parametrize(
    ("name", "message"),
    [("none", "there is no such folder. Give run folders"), ("file", "is a file. Give run folders"), ("empty", "no run in it")],
)
def test_errors_say_what_was_found(tmp_path: Path, name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert main(["report", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / name) in error and message in error and error.count("\n") == 1


def test_the_output_must_be_a_file(tmp_path: Path) -> None:
    with pytest.raises(HalotuneError, match=r"is a folder\. Give the name of a file"):
        write_page([write_run(tmp_path / "run")], tmp_path)


def test_the_libraries_are_as_they_were_published() -> None:
    named = dict(re.findall(r"^\| `(\S+\.js)` .*`([0-9a-f]{64})` \|$", (ASSETS.parent / "README.md").read_text(), re.M))
    assert named == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in ASSETS.glob("*.min.js")}
    assert len(named) == 2


def test_runs_that_share_a_subject_are_shown_side_by_side(tmp_path: Path) -> None:
    """Of three runs two have the same subject and base; a row that one of them lacks is missing there."""
    for name, subject, count in (("HRA", 1, 2), ("LoRA", 1, 1), ("other", 2, 1)):
        run = write_run(tmp_path / name, "HRA r8", 0, label=name, steps=2, layers=2, config={"adapter": {"r": len(name)}})
        pictures = {
            "subject": png(subject, 0, 4),
            "base": png(9, 9, 4),
            "early": png(7, len(name), 4),
            "late": png(8, len(name), 4),
        }
        for picture, content in pictures.items():
            (run / f"{picture}.png").write_bytes(content)
        lines = [{"label": f"a dog · seed {i}", "images": [f"{p}.png" for p in pictures]} for i in range(count)]
        (run / "gallery.json").write_text(json.dumps({"columns": [*pictures], "rows": lines, "shared": 2}))
    found = [(name, gallery) for name in ("HRA", "LoRA", "other") if (gallery := gallery_of(read_run(tmp_path / name)))]
    (joined,) = side_by_side(found)
    assert joined.columns == ["subject", "base", "HRA", "LoRA"]
    hra, lora = found[0][1], found[1][1]
    shared = hra.rows[0][1][:2]
    assert joined.rows == [
        ("a dog · seed 0", [*shared, hra.rows[0][1][3], lora.rows[0][1][3]]),
        ("a dog · seed 1", [*shared, hra.rows[1][1][3], None]),
    ]
    write_page([tmp_path], tmp_path / "index.html")
    text = (tmp_path / "index.html").read_text()
    assert text.count("Pictures: side by side") == 1
    assert text.count('alt="side by side, a dog · seed 0, subject"') == 1
