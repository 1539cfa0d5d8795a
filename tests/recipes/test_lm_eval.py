"""Agreement with lm-eval's own verdicts on stored answers."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("math_verify")
pytest.importorskip("pebble")

from halotune.core.errors import HalotuneError
from halotune.recipes import MathEvaluation, evaluate_math

from .lm_eval_samples import write_samples
from .problems import problem

# How a model says a number, right or wrong.
SAID = [
    "So there are {n} in all.\nThe answer is: {n}",
    "#### {n}",
    "They have **{n}** {thing}",
    "It is ${n}$.",
    "= {n},",
    "I think {n}, but 7 of them are lost",
    "{n} of 100",
    "The answer is {n} ...",
    "about {n}%",
    "-{n}",
    "He needs {n}kg and then stops. \\boxed{{{n}}}",
    "9^{{9^{{9^9}}}}",
    "",
    "\u0661\u0662",
    "$.",
]
FORMS = [
    ("\\frac{1}{2}", ["\\boxed{\\frac12}", "the answer is $0.5$", "$1/2$", "\\boxed{50\\%}", "\\boxed{\\frac{2}{3}}", "half"]),
    ("x^2+1", ["$\\boxed{1+x^2}$", "$x^2$", "\\boxed{(x+i)(x-i)}", "Final Answer: The final answer is $x^2+1$."]),
    ("(1,\\infty)", ["\\boxed{(1,\\infty)}", "$x>1$", "\\boxed{[1,\\infty)}", "\\boxed{(1,\\infty"]),
    ("\\sqrt{3}", ["\\boxed{\\sqrt3}", "1.7320508", "\\boxed{3^{1/2}}", "\\boxed{\\sqrt}", "\\boxed{9^{9^{9^9}}}"]),
    ("12", ["12", "\\boxed{12}", "$12.0$", "\\boxed{12\\text{ cm}}", "twelve", "\\boxed{}", "$11$ or $12$", "10!!!!!!"]),
]


def agreement(suite: str, file: Path) -> dict:
    return evaluate_math(MathEvaluation(suite=suite, answers=str(file), workers=2))["lm_eval"]


def test_gsm8k(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [problem(n) for n in range(400)]
    answers = []
    for row in rows:
        gold = row["answer"].rsplit("#### ")[-1]
        said = rng.choice(SAID) if rng.random() < 0.3 else SAID[0]
        answers.append(said.format(n=gold if rng.random() < 0.5 else rng.randint(1, 200), thing="books"))
    answers[0] = f"The answer is: {rows[0]['answer'].rsplit('#### ')[-1]}.00"
    found = agreement("gsm8k", write_samples("gsm8k", rows, answers, tmp_path))
    assert found["of"] == 400 and found["agree"] >= 0.995
    first = next(line for line in found["differ"] if line["id"] == 0)
    assert first["strict"] and not first["lm_eval"] and "same number, written another way" in first["reason"]


def test_minerva_math(tmp_path: Path) -> None:
    rows, answers = [], []
    for gold, forms in FORMS:
        for form in forms:
            rows.append({"problem": "?", "solution": f"Thus $\\boxed{{{gold}}}$.", "level": "Level 2", "type": "Algebra"})
            answers.append(form)
    found = agreement("math", write_samples("math", rows, answers, tmp_path))
    assert found["of"] == len(rows) and found["differ"] == []


def test_what_are_no_samples(tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    file.write_text('{"resps": [["18"]], "doc": {"answer": "#### 18"}, "doc_id": 0, "filter": "flexible-extract"}\n')
    with pytest.raises(HalotuneError, match=r"line 1: is no sample of lm-eval's with 'exact_match'"):
        evaluate_math(MathEvaluation(suite="gsm8k", answers=str(file)))


def test_answers_with_line_breaks_of_other_scripts(tmp_path: Path) -> None:
    """lm-eval writes them as they are, and JSON lets it; a line of the file ends at a line feed alone."""
    row = {"resps": [["18\u2028."]], "doc": {"answer": "#### 18"}, "doc_id": 0, "filter": "flexible-extract", "exact_match": 1}
    (tmp_path / "samples.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    scores = evaluate_math(MathEvaluation(suite="gsm8k", answers=str(tmp_path / "samples.jsonl"), workers=1))
    assert scores["lm_eval"]["agree"] == 1
