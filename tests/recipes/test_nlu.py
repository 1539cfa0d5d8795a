"""`train nlu`: classes, pairs, regressions, several evaluation sets; the head; presets; what a finished run can be asked."""

from __future__ import annotations

import csv
import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from halotune import HalotuneError
from halotune.cli.main import main
from halotune.recipes import NLUConfig, NLUEvaluation, Prediction, evaluate_nlu, predict_nlu, train_nlu
from halotune.recipes.common.run import read_run
from halotune.recipes.glue.tasks import TASKS

from .conftest import BAD, GOOD, NOUNS, sentence, write_table


def configure(encoder: Path, output: Path, **kwargs: Any) -> NLUConfig:
    given = {"epochs": 1, "batch_size": 8, "log_every": 1, "tracker": "none", "device": "cpu", **kwargs}
    return NLUConfig(model=str(encoder), output=str(output), **given)


def write_glue(folder: Path, task: str, rows: int = 16) -> Path:
    """A small folder of a task's files, of sentences made by rule."""
    rng = random.Random(0)
    folder = folder / TASKS[task].folder
    folder.mkdir(parents=True)

    def lines(labelled: bool) -> str:
        out = ["index\tsentence1\tsentence2" + "\tgold_label" * labelled] if task == "mnli" else []
        out += ["index\tgenre\tsentence1\tsentence2" + "\tscore" * labelled] if task == "stsb" else []
        for i in range(rows):
            (a, x), (b, y) = sentence(rng), sentence(rng)
            if task == "cola":
                out.append(f"gj\t{int(x == 'positive')}\t\t{a}")
            elif task == "stsb":
                out.append(f"{i}\tg\t{a}\t{b}" + f"\t{5.0 if x == y else 1.0}" * labelled)
            else:
                out.append(f"{i}\t{a}\t{b}" + f"\t{'entailment' if x == y else 'contradiction'}" * labelled)
        return "\n".join(out) + "\n"

    kinds = ("_matched", "_mismatched") if task == "mnli" else ("",)
    (folder / "train.tsv").write_text(lines(True))
    for kind in kinds:
        (folder / f"dev{kind}.tsv").write_text(lines(True))
        test = lines(False) if task != "cola" else f"index\tsentence\n0\t{sentence(rng)[0]}\n1\t{sentence(rng)[0]}\n"
        (folder / f"test{kind}.tsv").write_text(test)
    return folder.parent


def test_mnli_is_measured_on_both_of_its_sets(encoder, tmp_path):
    record = train_nlu(configure(encoder, tmp_path / "run", task="mnli", data=str(write_glue(tmp_path, "mnli"))))
    last = record["results"]["last"]
    assert {"matched_accuracy", "mismatched_accuracy"} <= last.keys()
    assert {f.name for f in (tmp_path / "run" / "predictions").iterdir()} == {"matched.jsonl", "mismatched.jsonl"}
    found = evaluate_nlu(NLUEvaluation(str(tmp_path / "run"), device="cpu"))
    assert found == {k: v for k, v in last.items() if k.endswith("accuracy")}
    for name in ("MNLI-m.tsv", "MNLI-mm.tsv"):
        lines = (tmp_path / "run" / "predictions" / name).read_text().splitlines()
        assert lines[0] == "index\tprediction" and len(lines) == 17
        assert all(line.split("\t")[1] in TASKS["mnli"].labels for line in lines[1:])


def test_a_regression_of_pairs(encoder, tmp_path):
    record = train_nlu(configure(encoder, tmp_path / "run", task="stsb", data=str(write_glue(tmp_path, "stsb")), epochs=2))
    assert record["labels"] is None and "pearson_spearman_mean" in record["results"]["best"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "predictions" / "validation.jsonl").read_text().splitlines()]
    assert {line["label"] for line in lines} <= {1.0, 5.0} and all(isinstance(line["prediction"], float) for line in lines)
    evaluate_nlu(NLUEvaluation(str(tmp_path / "run"), output=str(tmp_path / "sub"), device="cpu"))
    answers = [float(line.split("\t")[1]) for line in (tmp_path / "sub" / "STS-B.tsv").read_text().splitlines()[1:]]
    assert len(answers) == 16 and all(0 <= a <= 5 for a in answers)


def test_a_frozen_head_is_stored_as_it_was_drawn(encoder, tmp_path):
    data = str(write_glue(tmp_path, "cola"))
    for name, freeze in (("frozen", True), ("trained", False)):
        train_nlu(configure(encoder, tmp_path / name, task="cola", data=data, freeze_head=freeze))
    frozen, trained = (load_file(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in ("frozen", "trained"))
    head = [k for k in frozen if "classifier" in k]
    assert head and frozen.keys() == trained.keys()
    torch.manual_seed(0)
    assert any((frozen[k] != trained[k]).any() for k in head)
    counts = [read_run(tmp_path / n)["parameters"]["trainable"] for n in ("frozen", "trained")]
    assert counts[1] - counts[0] == sum(frozen[k].numel() for k in head)
    again = evaluate_nlu(NLUEvaluation(str(tmp_path / "frozen"), device="cpu"))
    assert again["matthews_correlation"] == read_run(tmp_path / "frozen")["results"]["last"]["matthews_correlation"]


def test_a_preset_says_what_still_differs(encoder, tmp_path):
    data = str(write_glue(tmp_path, "cola"))
    config = configure(encoder, tmp_path / "run", task="cola", data=data, preset="paper-code", epochs=1)
    record = train_nlu(config)
    said = " ".join(record["substitutes"])
    assert "Adam" in said and "halves the whole model" in said and "not DeBERTaV3-base" in said
    assert record["config"]["learning_rate"] == 8e-4 and record["config"]["freeze_head"] is True


def test_a_table_of_pairs_and_its_broken_rows(encoder, tmp_path, capsys):
    rng = random.Random(0)
    file = tmp_path / "pairs.jsonl"
    rows = [{"one": sentence(rng)[0], "two": sentence(rng)[0], "same": rng.choice([1, 10, 2])} for _ in range(24)]
    rows[5]["two"] = None
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n{broken\n")
    own = {"task": "csv", "data": str(file), "text": "one", "pair": "two", "target": "same", "evaluation": 0.25}
    with pytest.raises(HalotuneError, match=r"pairs.jsonl, line 6: expected text in 'two'; found None. Correct the row"):
        train_nlu(configure(encoder, tmp_path / "run", **own))
    assert not (tmp_path / "run").exists()
    record = train_nlu(configure(encoder, tmp_path / "run", **own, skip_bad_rows=True))
    assert record["labels"] == ["1", "2", "10"]
    assert record["skipped"]["count"] == 2 and "line 25: is no JSON" in record["skipped"]["rows"][1]
    assert "2 rows were left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, own, said",
    [
        ("text,mark\na,1\n", {}, "line 2: has no column 'label'; it has 'text', 'mark'"),
        ("text,label\na,x,y\n", {}, "line 2: has 1 fields more than the header"),
        ("text,label\na,x\nb,x\n", {"evaluation": 0.5}, "column 'label' has 1 classes in 1 rows"),
        ("text,label\na,many\n", {"regression": True}, "column 'label': could not convert string to float: 'many'"),
        ("text,label\na,nan\n", {"regression": True}, "expected a finite number; found 'nan'"),
        ("text,label\n", {}, "no row can be used"),
        ("text,label\na,x\n", {"evaluation": 2.0}, "evaluation: 2 of 1 rows leaves nothing"),
        ("text,label\na,x\nb,y\n", {"evaluation": "other.csv"}, "other.csv: class 'z' is none of rows.csv's (x, y)"),
        ("text,label\na,x\n", {"evaluation": "none.csv"}, "none.csv: there is no such file"),
    ],
)
def test_tables_that_cannot_be_used(encoder, tmp_path, monkeypatch, text, own, said):
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text(text)
    Path("other.csv").write_text("text,label\na,z\n")
    with pytest.raises(HalotuneError) as e:
        train_nlu(configure(encoder, tmp_path / "run", task="csv", data="rows.csv", **own))
    assert said in str(e.value)


def test_what_a_base_lacks_is_said_and_that_its_head_is_new_is_not(encoder, table, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    train_nlu(configure(encoder, tmp_path / "usual", task="csv", data=str(table), evaluation=0.2, max_steps=1))
    assert "MISSING" not in (said := capsys.readouterr().err) and " lacks " not in said
    shutil.copytree(encoder, base := tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    train_nlu(configure(base, tmp_path / "run", task="csv", data=str(table), evaluation=0.2, max_steps=1))
    assert "lacks 1 weights such as bert.encoder.layer.1.output.dense.weight" in capsys.readouterr().err


def test_a_class_of_few_rows_may_be_held_out(tmp_path):
    """All of the one row's class is held out: it is a class of the table all the same."""
    from halotune.recipes.nlu_data import Columns, load_table

    file = tmp_path / "rows.csv"
    for rare in range(16):
        file.write_text("text,label\n" + "".join(f"a,{'z' if i == rare else 'xy'[i % 2]}\n" for i in range(16)))
        data = load_table(Columns("text", None, "label"), str(file), 0.5, False, False)
        assert data.task.labels == ("x", "y", "z")


def test_a_sample_is_the_same_for_all_seeds(table):
    from halotune.recipes.nlu import load_data

    def texts(seed: int) -> list[str]:
        config = NLUConfig(model="m", task="csv", data=str(table), train_rows=10, seed=seed)
        return [row["a"] for row in load_data(config).train]

    assert len(texts(0)) == 10 and texts(0) == texts(1)


def test_predictions_keep_the_users_columns(encoder, table, tmp_path, capsys):
    train_nlu(configure(encoder, tmp_path / "run", task="csv", data=str(table)))
    file = tmp_path / "new.csv"
    file.write_text(f"id,text\n7,the {NOUNS[0]} is {GOOD[0]}\n8,a {NOUNS[1]} was {BAD[0]}\n")
    assert main(["predict", str(tmp_path / "run"), "--data", str(file), "--device", "cpu"]) == 0
    output = tmp_path / "run" / "predictions" / "new.csv"
    assert capsys.readouterr().out.strip() == str(output)
    rows = list(csv.DictReader(output.read_text().splitlines()))
    assert [row["id"] for row in rows] == ["7", "8"] and rows[0].keys() == {"id", "text", "prediction", "probability"}
    assert all(row["prediction"] in ("negative", "positive") and 0.5 <= float(row["probability"]) <= 1 for row in rows)
    file.write_text("id,sentence\n7,x\n")
    assert main(["predict", str(tmp_path / "run"), "--data", str(file), "--device", "cpu"]) == 2
    assert "has no column 'text'; it has 'id', 'sentence'" in capsys.readouterr().err
    file.write_text("prediction,text\nmine,x\n")
    with pytest.raises(HalotuneError, match=r"has a column 'prediction' already, which would be written over. Rename it"):
        predict_nlu(Prediction(str(tmp_path / "run"), data=str(file), device="cpu"))
    (tmp_path / "new.jsonl").write_text('{"text": "x"}\n{"text": "y", "id": 8}\n')  # a column that comes later
    output = predict_nlu(Prediction(str(tmp_path / "run"), data=str(tmp_path / "new.jsonl"), device="cpu"))
    assert [row["id"] for row in csv.DictReader(output.read_text().splitlines())] == ["", "8"]
    with pytest.raises(HalotuneError, match="is no finished run of `halotune train nlu`"):
        predict_nlu(Prediction(str(tmp_path), data=str(file)))


@pytest.mark.parametrize("quant", [None, "nf4", "int8"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_how_the_base_is_held(encoder, table, tmp_path, quant, precision):
    """The trained weights are fp32, and memory is saved by checkpointing too."""
    own = {"quant": quant, "precision": precision, "gradient_checkpointing": True, "max_steps": 2}
    record = train_nlu(configure(encoder, tmp_path / "run", task="csv", data=str(table), **own))
    assert record["status"] == "finished"
    stored = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float32}


def test_a_deberta_has_its_pooler_trained_with_the_head(tmp_path, encoder, table):
    """Both are drawn anew."""
    from transformers import AutoTokenizer, DebertaV2Config, DebertaV2Model

    tokenizer = AutoTokenizer.from_pretrained(encoder)
    tokenizer.save_pretrained(tmp_path / "deberta")
    config = DebertaV2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        pad_token_id=0,
    )
    DebertaV2Model(config).save_pretrained(tmp_path / "deberta")
    train_nlu(configure(tmp_path / "deberta", tmp_path / "run", task="csv", data=str(table), max_steps=2))
    stored = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert any(k.endswith("pooler.dense.weight") for k in stored) and any(k.endswith("classifier.weight") for k in stored)


def test_the_commands_explain_themselves(capsys):
    assert main(["train", "nul"]) == 2
    assert "there is no recipe 'nul'. Did you mean nlu?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as e:
        main(["train", "nlu", "--help"])
    out = capsys.readouterr().out
    assert (
        e.value.code == 0
        and "--dry-run" in out
        and "--adapter.r" in out
        and "--freeze-head" in out
        and not re.search(r"--[\w.-]+_", out)
    )


def test_a_file_of_its_own_to_evaluate_on(encoder, table, tmp_path):
    other = write_table(tmp_path / "other.csv", 9, seed=1)
    record = train_nlu(configure(encoder, tmp_path / "run", task="csv", data=str(table), evaluation=str(other), max_steps=1))
    assert record["rows"] == {"train": 60, "evaluation": {"validation": 9}}
