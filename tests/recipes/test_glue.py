"""GLUE: the files of all nine tasks as its own download lays them out, its metrics, and its submissions."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from halotune import HalotuneError
from halotune.recipes.glue.files import LAYOUTS
from halotune.recipes.glue.tasks import TASKS, submission
from halotune.recipes.nlu_data import file_split, load_glue

# task -> file -> lines as GLUE's own files have them. A quotation mark is a letter, and so is the line separator U+2028.
MNLI_HEAD = "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse".split()
FILES: dict[str, dict[str, list[list[str]]]] = {
    "cola": {
        "train.tsv": [["gj04", "1", "", 'She said "no.'], ["gj04", "0", "*", "They\u2028goes."]],
        "dev.tsv": [["l-93", "1", "", "He left."]],
        "test.tsv": [["index", "sentence"], ["0", "Bill left."]],
    },
    "sst2": {
        "train.tsv": [["sentence", "label"], ["a fine film ", "1"], ["dull ", "0"]],
        "dev.tsv": [["sentence", "label"], ["good ", "1"]],
        "test.tsv": [["index", "sentence"], ["0", "so so"]],
    },
    "mrpc": {
        "msr_paraphrase_train.txt": [["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"], ["1", "7", "8", "One.", "Eins."]],
        "msr_paraphrase_test.txt": [["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"], ["0", "9", "10", "Two.", "Drei."]],
    },
    "stsb": {
        "train.tsv": [
            "index genre filename year old_index source1 source2 sentence1 sentence2 score".split(),
            ["0", "main-captions", "MSRvid", "2012test", "0001", "none", "none", "A plane.", "An air plane.", "5.000"],
        ],
        "sts-dev.csv": [["main-captions", "MSRvid", "2012test", "0000", "4.750", "A man.", "A child.", "extra"]],
        "test.tsv": [
            "index genre filename year old_index source1 source2 sentence1 sentence2".split(),
            ["0", "main-captions", "MSRvid", "2012test", "0024", "none", "none", "A girl.", "A woman."],
        ],
    },
    "qqp": {
        "train.tsv": [["id", "qid1", "qid2", "question1", "question2", "is_duplicate"], ["1", "2", "3", "Why?", "How?", "0"]],
        "dev.tsv": [["id", "qid1", "qid2", "question1", "question2", "is_duplicate"], ["4", "5", "6", "Who?", "Who is?", "1"]],
        "test.tsv": [["id", "question1", "question2"], ["0", "What?", "Which?"]],
    },
    "mnli": {
        "train.tsv": [
            [*MNLI_HEAD, "sentence1", "sentence2", "label1", "gold_label"],
            [*["x"] * 8, "It rains.", "It is wet.", "neutral", "entailment"],
        ],
        **{
            f"dev_{kind}.tsv": [
                [*MNLI_HEAD, "sentence1", "sentence2", "label1", "label2", "label3", "label4", "label5", "gold_label"],
                [*["x"] * 8, "It rains.", "It is dry.", *["neutral"] * 5, "contradiction"],
            ]
            for kind in ("matched", "mismatched")
        },
        **{
            f"test_{kind}.tsv": [[*MNLI_HEAD, "sentence1", "sentence2"], [*["x"] * 8, "A.", "B."]]
            for kind in ("matched", "mismatched")
        },
        "../diagnostic/diagnostic.tsv": [["index", "sentence1", "sentence2"], ["0", "The cat sat.", "The cat did not sit."]],
    },
    "qnli": {
        "train.tsv": [["index", "question", "sentence", "label"], ["0", "Who?", "He.", "entailment"]],
        "dev.tsv": [["index", "question", "sentence", "label"], ["0", "Who?", "It.", "not_entailment"]],
        "test.tsv": [["index", "question", "sentence"], ["0", "Who?", "She."]],
    },
    "rte": {
        "train.tsv": [["index", "sentence1", "sentence2", "label"], ["0", "A.", "B.", "not_entailment"]],
        "dev.tsv": [["index", "sentence1", "sentence2", "label"], ["0", "A.", "A.", "entailment"]],
        "test.tsv": [["index", "sentence1", "sentence2"], ["0", "A.", "C."]],
    },
    "wnli": {
        "train.tsv": [["index", "sentence1", "sentence2", "label"], ["0", "A.", "B.", "1"]],
        "dev.tsv": [["index", "sentence1", "sentence2", "label"], ["0", "A.", "A.", "0"]],
        "test.tsv": [["index", "sentence1", "sentence2"], ["0", "A.", "C."]],
    },
}
FIRST = {  # what the first training row is
    "cola": {"a": 'She said "no.', "label": 1},
    "sst2": {"a": "a fine film ", "label": 1},
    "mrpc": {"a": "One.", "b": "Eins.", "label": 1},
    "stsb": {"a": "A plane.", "b": "An air plane.", "label": 5.0},
    "qqp": {"a": "Why?", "b": "How?", "label": 0},
    "mnli": {"a": "It rains.", "b": "It is wet.", "label": 0},
    "qnli": {"a": "Who?", "b": "He.", "label": 0},
    "rte": {"a": "A.", "b": "B.", "label": 1},
    "wnli": {"a": "A.", "b": "B.", "label": 1},
}


def write(folder: Path, task: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in FILES[task].items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join("\t".join(fields) + "\n" for fields in lines), encoding="utf-8", newline="\n")
    return folder


@pytest.mark.parametrize("name", TASKS)
def test_the_files_of_every_task(name, tmp_path):
    task = TASKS[name]
    write(tmp_path / task.folder, name)
    data = load_glue(task, str(tmp_path), skip=False)
    assert data.train[0] == FIRST[name]
    assert all(len(rows) == 1 for rows in data.evaluations.values()) and data.evaluations.keys() == task.evaluations.keys()
    assert load_glue(task, str(tmp_path / task.folder), skip=False).train == data.train  # the task's own folder
    for split in task.tests:
        rows, _ = file_split(task, tmp_path, split, False, labelled=False)
        assert rows and "label" not in rows[0]
    assert bool(data.notes) == (name == "mrpc")  # whose dev set is missing here


def test_other_line_ends_and_marks(tmp_path):
    """CoLA's second text has a line separator inside; MRPC's files begin with a byte order mark, and one has no header."""
    write(tmp_path, "cola")
    assert load_glue(TASKS["cola"], str(tmp_path), skip=False).train[1]["a"] == "They\u2028goes."
    write(tmp_path / "MRPC", "mrpc")
    rows = FILES["mrpc"]["msr_paraphrase_train.txt"][1:]
    file = tmp_path / "MRPC" / "msr_paraphrase_train.txt"
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join("\t".join(r) for r in rows).encode() + b"\r\n")
    assert load_glue(TASKS["mrpc"], str(tmp_path), skip=False).train == [FIRST["mrpc"]]


BROKEN = [
    ("cola", "gj04\t2\t\tA sentence.", "expected 0 to 1 in 'label'; found '2'"),
    ("cola", "gj04\t1\tA sentence.", "has 3 fields where 4 were expected (source, label, star, sentence)"),
    ("cola", "gj04\t1\t\t ", "expected text in 'sentence'; found ' '"),
    ("stsb", "\t".join(["0", *["x"] * 6, "A.", "B.", "5.5"]), "expected a score from 0 to 5 in 'score'; found '5.5'"),
    ("rte", "0\tA.\tB.\tmaybe", "expected one of entailment, not_entailment in 'label'; found 'maybe'"),
    ("qqp", "1\t2\t3\tWhy?", "has 4 fields where 6 were expected"),
]


@pytest.mark.parametrize("name, line, said", BROKEN)
def test_a_broken_row_is_named_or_skipped(name, line, said, tmp_path):
    file = write(tmp_path, name) / "train.tsv"
    number = file.read_text(encoding="utf-8").count("\n") + 1
    with file.open("a", encoding="utf-8") as f:
        f.write(line + "\n")
    with pytest.raises(HalotuneError, match=re.escape(f"{file}, line {number}: {said}") + ".*--skip-bad-rows"):
        load_glue(TASKS[name], str(tmp_path), skip=False)
    data = load_glue(TASKS[name], str(tmp_path), skip=True)
    assert data.train[0] == FIRST[name] and len(data.skipped) == 1 and said in data.skipped[0]


def test_texts_may_be_empty_in_pairs_and_in_test_sets(tmp_path):
    """Two rows of QQP's training file have an empty second question; of a test set every row is to be answered."""
    with (write(tmp_path, "qqp") / "train.tsv").open("a") as f:
        f.write("7\t8\t9\tHow can I create an Android app?\t\t0\n")
    assert load_glue(TASKS["qqp"], str(tmp_path), skip=False).train[1]["b"] == ""
    (write(tmp_path / "SST-2", "sst2") / "test.tsv").write_text("index\tsentence\n0\t\n1\tfine\n")
    rows, bad = file_split(TASKS["sst2"], tmp_path, "test", None, labelled=False)
    assert rows == [{"a": ""}, {"a": "fine"}] and not bad


def test_missing_files_are_named(tmp_path):
    with pytest.raises(HalotuneError, match=r"holds no file of SST-2, neither itself nor in SST-2/"):
        load_glue(TASKS["sst2"], str(tmp_path), skip=False)
    (write(tmp_path, "rte") / "dev.tsv").unlink()
    with pytest.raises(HalotuneError, match=r"no file of RTE's split validation"):
        load_glue(TASKS["rte"], str(tmp_path), skip=False)
    (tmp_path / "train.tsv").write_text("0\tA.\tB.\tentailment\n")
    with pytest.raises(HalotuneError, match=r"train.tsv, line 1: expected a header with 'sentence1'"):
        load_glue(TASKS["rte"], str(tmp_path), skip=False)


def test_every_task_has_files_and_a_hub_name():
    assert LAYOUTS.keys() == TASKS.keys() == FILES.keys()


# -- metrics, against their definitions written out


def test_matthews_correlation():
    predicted, true = np.array([1, 1, 0, 1, 0, 0, 1]), np.array([1, 0, 0, 1, 1, 0, 1])
    tp, tn, fp, fn = 3, 2, 1, 1
    expected = (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert TASKS["cola"].metric(predicted, true) == {"matthews_correlation": pytest.approx(expected)}
    assert TASKS["cola"].metric(np.ones(7), true) == {"matthews_correlation": 0.0}


@pytest.mark.parametrize("name", ["mrpc", "qqp"])
def test_accuracy_f1_and_their_mean_are_told_apart(name):
    predicted, true = np.array([1, 1, 0, 1, 0]), np.array([1, 0, 0, 1, 1])
    precision, recall = 2 / 3, 2 / 3
    f1 = 2 * precision * recall / (precision + recall)
    found = TASKS[name].metric(predicted, true)
    assert found == {"accuracy": 0.6, "f1": pytest.approx(f1), "accuracy_f1_mean": pytest.approx((0.6 + f1) / 2)}
    assert TASKS[name].metric(np.zeros(5), true)["f1"] == 0.0


def test_correlations():
    predicted, true = np.array([0.1, 2.0, 2.5, 4.9]), np.array([0.0, 3.0, 2.0, 5.0])
    found = TASKS["stsb"].metric(predicted, true)
    assert found["pearson"] == pytest.approx(np.corrcoef(predicted, true)[0, 1])
    assert found["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15))  # 1 − 6 Σd² / n(n² − 1)
    assert found["pearson_spearman_mean"] == pytest.approx((found["pearson"] + found["spearman"]) / 2)
    assert set(TASKS["stsb"].metric(np.ones(4), true).values()) == {0.0}


@pytest.mark.parametrize("name", ["sst2", "mnli", "qnli", "rte", "wnli"])
def test_accuracy(name):
    assert TASKS[name].metric(np.array([0, 1, 1]), np.array([0, 1, 0])) == {"accuracy": pytest.approx(2 / 3)}


def test_submissions():
    """GLUE's server takes a header, then index and prediction; some tasks by class name, and similarities from 0 to 5."""
    assert submission(TASKS["cola"], np.array([1, 0])) == "index\tprediction\n0\t1\n1\t0\n"
    assert submission(TASKS["qnli"], np.array([1, 0])) == "index\tprediction\n0\tnot_entailment\n1\tentailment\n"
    assert submission(TASKS["mnli"], np.array([2])) == "index\tprediction\n0\tcontradiction\n"
    assert submission(TASKS["wnli"], np.array([1])) == "index\tprediction\n0\t1\n"
    assert submission(TASKS["stsb"], np.array([5.4, 2.3456])) == "index\tprediction\n0\t5.000\n1\t2.346\n"
    assert {n: [*t.tests.values()] for n, t in TASKS.items() if n in ("sst2", "mnli", "stsb")} == {
        "sst2": ["SST-2.tsv"],
        "mnli": ["MNLI-m.tsv", "MNLI-mm.tsv", "AX.tsv"],
        "stsb": ["STS-B.tsv"],
    }
