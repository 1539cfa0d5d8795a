"""Graders: the strict one, the paper's with its defects, and the processes around both."""

from __future__ import annotations

import time

import pytest

pytest.importorskip("math_verify")
pytest.importorskip("pebble")

from halotune.recipes.grading import paper, strict
from halotune.recipes.grading.scores import accuracy, by, vote
from halotune.recipes.grading.workers import Grade, Task, grade_all

GSM = "He pays 3*6=18 dollars.\n#### 18"
BOX = "So the answer is $\\boxed{%s}$."


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("The answer is: 18", True),
        ("He pays $18.", True),
        ("**18** dollars", True),
        ("It costs 18.00", True),
        ("Between 18 and 20", False),
        ("180", False),
        ("no idea", False),
        ("", False),
        ("18...", True),
        ("18 ...", False),  # as lm-eval: the last match is the dots
    ],
)
def test_strict_takes_the_last_number(answer, right):
    assert strict.right("gsm8k", answer, GSM) is right


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("The answer is: $\\frac{1}{2}$", "\\frac12", True),
        ("Thus $x = 0.5$.", "\\frac12", True),
        ("\\boxed{(1, 2)}", "(1,2)", True),
        ("\\boxed{(2, 1)}", "(1,2)", False),
        ("\\boxed{50}", "5000", False),
        ("\\boxed{x/2}", "7", False),
        ("\\boxed{1+\\sqrt{3}}", "\\sqrt3 + 1", True),
    ],
)
def test_strict_compares_expressions(answer, gold, right):
    assert strict.right("math", answer, BOX % gold) is right


@pytest.mark.parametrize(
    ("answer", "gold", "right", "why"),
    [
        ("The answer is: 18", "18", True, "plain"),
        ("18", "18", False, "defect 5: no marker"),
        ("The answer is: 18. The answer is: 19", "18", False, "the last marker counts"),
        ("The answer is: $18 in all", "18", True, "the first number after it"),
        ("The answer is: 7/2", "4", True, "a fraction, rounded"),
        ("The answer is: 17.6", "18", True, "defect 3: rounded"),
        ("The answer is: 50", "5000", True, "defect 2: a hundredth"),
        ("The answer is: 5000", "50", True, "defect 2: a hundred times"),
        ("The answer is: 1,234", "1,234", True, "one separator"),
        ("The answer is: 1,234,567", "1,234,567", False, "defect 4: two separators"),
        ("The answer is: 1,234,567", "1,234", True, "defect 4, too"),
        ("The answer is: 8/0", "8", True, "nothing is divided by zero"),
        ("The answer is: /5", "5", False, "no fraction"),
        ("The answer is: " + "9" * 5000, "9", False, "no float"),
        ("The answer is: none", "18", False, "no number"),
    ],
)
def test_the_papers_rules_for_gsm8k(answer, gold, right, why):
    assert paper.right("gsm8k", answer, f"work\n#### {gold}") is right, why


@pytest.mark.parametrize(
    ("said", "gold", "right", "why"),
    [
        ("\\frac12", "\\dfrac{1}{2}", True, "braces"),
        ("0.5", "\\frac{1}{2}", True, "a half"),
        ("3/4.", "\\frac{3}{4}", True, "a slash; the last full stop goes"),
        ("x=5", "5", True, "a short left side"),
        ("\\$5\\%", "5", True, "signs"),
        ("90^\\circ", "90", True, "degrees"),
        ("5\\text{ cm}", "5", True, "a unit"),
        (".5", "0.5", True, "a leading zero"),
        ("\\left( 1, \\frac12 \\right)", "(1,\\frac{1}{2})", True, "spaces"),
        ("(0.333333333,2)", "(0.33333333,2)", True, "pairs, by parts"),
        ("2x+x", "3x", True, "sympy"),
        ("50", "5000", True, "defect 2"),
        ("x/2", "7", True, "defect 1: 'x' is no whole number"),
        ("a/b", "123", True, "defect 1"),
        ("\\sqrt", "2", True, "defect 1: nothing under the root"),
        ("\\frac", "2", True, "defect 1"),
        ("1\\text{ a}\\text{ b}", "7", True, "defect 1: two units"),
        ("8", "7", False, "wrong"),
        ("y", "x", False, "wrong"),
        ("\\sqrt{2}", "\\sqrt3", False, "wrong"),
        ("", "7", False, "nothing"),
    ],
)
def test_the_papers_rules_for_math(said, gold, right, why):
    assert paper.right("math", f"work.\nThe answer is: {said}", BOX % gold) is right, why
    if "defect" in why:
        assert not strict.right("math", f"The answer is: ${said}$", BOX % gold)


def test_the_papers_answer_ends_with_the_line():
    assert paper.right("math", "The answer is: 7.\nFor 8 it is another.", BOX % "7")
    assert not paper.right("math", "The answer is: 7 \nfor 8", BOX % "7")


@pytest.mark.parametrize(
    ("solution", "found"),
    [
        ("\\boxed{1} then \\boxed{\\frac{a}{b}}.", "\\frac{a}{b}"),
        ("\\fbox{3}", "3"),
        ("$\\boxed 5$ it is", "5"),
        ("\\boxed{open", None),
        ("none", None),
    ],
)
def test_boxed(solution, found):
    assert paper.boxed(solution) == found


NASTY = [
    "The answer is: \\boxed{9^{9^{9^9}}}",
    "The answer is: 10!!!!!!!!",
    "\\boxed{2^{10000000000}}",
    "\\boxed{" * 2000 + "}" * 2000,
    "(" * 20000,
    "\x00\ud800\u202e",
    "The answer is: " + "9" * 50000,
    "",
    "\\boxed{" + "x+" * 5000 + "x}",
]


@pytest.mark.parametrize("suite", ["gsm8k", "math"])
def test_nothing_that_a_model_writes_stops_the_grader(suite):
    gold = GSM if suite == "gsm8k" else BOX % "18"
    answers = [*NASTY, "The answer is: 18"]
    start = time.perf_counter()
    grades = list(grade_all([Task(suite, a, gold) for a in answers], workers=2, seconds=3))
    assert time.perf_counter() - start < 60
    assert grades[-1] == Grade({"strict": True, "paper": True}, "18")
    assert len(grades) == len(answers) and not any(g.right["strict"] for g in grades[:-1])
    failed = " ".join(g.failed for g in grades if g.failed)
    assert ("took more than 3 s" in failed) == (suite == "math")


def test_a_rule_that_hangs_takes_no_other_with_it(monkeypatch):
    """Simplifying what the paper's rule makes of an answer may take hours; what math-verify says of it stands."""
    answer = "\\boxed{18}\nThe answer is: \\prod_{k=1}^{10^9} \\sin(k)"
    [grade] = grade_all([Task("math", answer, BOX % "18")], workers=1, seconds=2)
    assert grade.right == {"strict": True, "paper": False} and grade.final == "18"
    assert grade.failed == "paper: took more than 2 s"


def test_a_process_that_dies_is_an_answer_that_fails(monkeypatch):
    """The next answers are graded all the same: memory that is not there ends one of them only."""
    answers = ["\\boxed{" + "1" * 200 + "}", "\\boxed{18}"]
    grades = list(grade_all([Task("math", a, BOX % "18") for a in answers], workers=1, seconds=20, gib=0.5))
    assert (len(grades) == 2 and grades[1].right["strict"]) or grades[1].failed


def test_accuracy_and_its_interval():
    """Wilson's: 5 of 10 is 0.2366 to 0.7634, and none of 10 is not certainly none."""
    half = accuracy([True] * 5 + [False] * 5)
    assert half["accuracy"] == 0.5
    assert half["low"] == pytest.approx(0.2366, abs=1e-4) and half["high"] == pytest.approx(0.7634, abs=1e-4)
    none = accuracy([False] * 10)
    assert none["low"] == 0 and none["high"] == pytest.approx(0.2775, abs=1e-4)
    assert accuracy([])["accuracy"] is None


def test_the_majority_is_what_most_answers_say():
    def said(final, right=False):
        return Grade({"strict": right}, final)

    assert vote([said("3"), said("5", True), said("5", True), said(None), said(None), said(None)]) == 1
    assert vote([said("3"), said("5")]) == 0  # the first of equals
    assert vote([said(None), said(None)]) == 0


def test_accuracy_by_group():
    rows = [{"level": "1", "right": {"strict": True}}, {"level": "2", "right": {"strict": False}}, {"level": None, "right": {}}]
    found = by(rows, lambda r: r["level"], "strict")
    assert {k: v["right"] for k, v in found.items()} == {"1": 1, "2": 0}
