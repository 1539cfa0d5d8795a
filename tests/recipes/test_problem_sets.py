"""`halotune data metamath | gsm8k | math`, from a local server and from what the user has; and what rows become."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from halotune.cli.main import main
from halotune.core.errors import HalotuneError
from halotune.recipes.language.problems import as_metamath, read_problems
from halotune.recipes.problem_sets import gsm8k, math, metamath

from .problems import problem, write_problems
from .test_download import Server, server  # noqa: F401

PROBLEM = {"problem": "What is $1+1$?", "level": "Level 2", "type": "Algebra", "solution": "It is $\\boxed{2}$."}


def math_archive() -> bytes:
    """MATH's own layout: a file for every problem."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as t:
        for part, number in (("train", 1), ("train", 10), ("train", 2), ("test", 1)):
            content = json.dumps({**PROBLEM, "problem": f"{part} {number}"}).encode()
            entry = tarfile.TarInfo(f"MATH/{part}/algebra/{number}.json")
            entry.size = len(content)
            t.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def test_gsm8k_is_fetched(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    content = {part: json.dumps(problem(i)).encode() + b"\n" for i, part in enumerate(("train", "test"))}
    monkeypatch.setattr(gsm8k, "FILES", {p: server.remote(f"{p}.jsonl", c) for p, c in content.items()})
    made = gsm8k.get(tmp_path, gsm8k.PARTS, None)
    assert [f.read_bytes() for f in made] == list(content.values())
    [found] = read_problems("gsm8k", str(made[1]))
    assert found.gold.endswith("#### " + problem(1)["answer"].rsplit("#### ")[-1])


def test_math_is_fetched_and_laid_out_in_order(server: Server, tmp_path: Path, monkeypatch) -> None:  # noqa: F811
    """A transfer that was cut off goes on, though the size is the server's secret."""
    from dataclasses import replace

    archive = math_archive()
    remote = replace(server.remote("MATH.tar", archive), size=None)
    monkeypatch.setattr(math, "ARCHIVE", remote)
    server.limit = 5000
    with pytest.raises(HalotuneError, match="the connection ended after 5,000 of"):
        math.get(tmp_path, math.PARTS, None)
    server.limit = None
    train, test = math.get(tmp_path, math.PARTS, None)
    assert server.asked[-1] == ("MATH.tar", "bytes=5000-")
    assert [p.question for p in read_problems("math", str(train))] == ["train 1", "train 2", "train 10"]
    [one] = read_problems("math", str(test))
    assert (one.subject, one.level) == ("Algebra", "2")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["test.jsonl", "train.jsonl"]


def test_metamath_is_fetched(server: Server, tmp_path: Path, monkeypatch) -> None:  # noqa: F811
    content = json.dumps([{"query": "1+1?", "response": "The answer is: 2", "type": "GSM"}]).encode()
    monkeypatch.setattr(metamath, "FILE", server.remote("MetaMathQA-395K.json", content))
    assert metamath.get(tmp_path, metamath.PARTS, None)[0].read_bytes() == content


def test_what_the_user_has(tmp_path: Path) -> None:
    (tmp_path / "MATH.tar").write_bytes(math_archive())
    assert [f.name for f in math.get(tmp_path / "math", ("test",), tmp_path / "MATH.tar")] == ["test.jsonl"]
    (tmp_path / "own").mkdir()
    write_problems(tmp_path / "own" / "train.jsonl", range(3))
    assert len(gsm8k.get(tmp_path / "gsm8k", ("train", "test"), tmp_path / "own")) == 1
    (tmp_path / "mine.jsonl").write_text('{"query": "1+1?", "response": "2"}\n{"query": "1+1?"}\n')
    with pytest.raises(HalotuneError, match=r"mine.jsonl, line 2: has no column 'response'"):
        metamath.get(tmp_path / "metamath", metamath.PARTS, tmp_path / "mine.jsonl")
    assert [f.name for f in gsm8k.get(tmp_path / "one", ("train", "test"), tmp_path / "own" / "train.jsonl")] == ["train.jsonl"]
    with pytest.raises(HalotuneError, match=r"mine\.jsonl: holds neither"):  # nor is what lies beside a file looked through
        gsm8k.get(tmp_path / "none", ("train", "test"), tmp_path / "mine.jsonl")
    (tmp_path / "empty").mkdir()
    for module in (gsm8k, math, metamath):
        with pytest.raises(HalotuneError, match="holds n"):
            module.get(tmp_path / "none", module.PARTS, tmp_path / "empty")
        with pytest.raises(HalotuneError, match="there is no such file or folder"):
            module.get(tmp_path / "none", module.PARTS, tmp_path / "nowhere")


def test_bad_rows_are_left_out_counted_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"query": "1+1?", "response": "2"}\n{"query": "1+1?"}\n')
    command = ["data", "metamath", str(tmp_path / "metamath"), "--from", str(file)]
    assert main(command) == 2
    assert "mine.jsonl, line 2: has no column 'response'" in capsys.readouterr().err
    assert main([*command, "--skip-bad-rows"]) == 0
    said = capsys.readouterr()
    assert "mine.jsonl: 1 rows were left out:\n" in said.err and "line 2: has no column 'response'" in said.err
    assert [json.loads(line)["response"] for line in Path(said.out.strip()).read_text().splitlines()] == ["2"]
    assert main(["data", "vader", str(tmp_path / "vader"), "--skip-bad-rows"]) == 2
    assert "--skip-bad-rows is for rows that are taken with --from, of metamath, gsm8k, math" in capsys.readouterr().err


def test_a_remedy_is_one_that_there_is(tmp_path: Path) -> None:
    """Evaluating leaves no problem out, so its error proposes no such flag."""
    (tmp_path / "test.jsonl").write_text('{"question": "1+1?"}\n')
    with pytest.raises(HalotuneError) as e:
        read_problems("gsm8k", str(tmp_path / "test.jsonl"))
    assert str(e.value).endswith("Correct the row.")


def test_rows_in_metamaths_schema() -> None:
    row = as_metamath({"question": "How many?", "answer": "He has 3*6=<<3*6=18>>18.\nSo 18.\n#### 1,218"})
    response = "He has 3*6=18.\nSo 18.\n#### 1,218\nThe answer is: 1,218"
    assert row == {"query": "How many?", "response": response, "type": "GSM8K"}
    assert as_metamath(PROBLEM)["response"] == "It is $\\boxed{2}$.\nThe answer is: 2"
    own = {"query": "a", "response": "b"}
    assert as_metamath(own) is own


@pytest.mark.parametrize("row", [{"question": "How many?", "answer": "18"}, {**PROBLEM, "solution": "It is 2."}])
def test_a_solution_without_an_answer_is_refused(row: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"'answer' does not end|holds no"):
        as_metamath(row)
