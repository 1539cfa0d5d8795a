"""`benchmarks/glue.py` and `word_problems.py`: methods train equally many parameters, and a sitting goes on from the last."""

from __future__ import annotations

import importlib.util
import json
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
from transformers import DebertaV2Config, DebertaV2Model

import halotune
from halotune.engine.injection.modules import adapted_layers
from halotune.recipes.common.config import resolve_adapter

FOLDER = Path(__file__).parents[2] / "benchmarks"


@contextmanager
def loaded(name: str) -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location(f"benchmark_of_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)  # as where it runs as a script, for its workers as well
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def glue() -> Iterator[ModuleType]:
    with loaded("glue") as module:
        yield module


@pytest.mark.filterwarnings("ignore:HRA. with apply_GS=True")
def test_parameters_are_equal(glue):
    for method, fields, _ in glue.METHODS.values():
        config = DebertaV2Config(
            vocab_size=4,
            hidden_size=384,
            intermediate_size=1536,
            num_hidden_layers=6,
            num_attention_heads=12,
            pos_att_type=["c2p"],
        )
        adapter = {**fields, "target_modules": glue.TARGETS}
        model = halotune.get_peft_model(DebertaV2Model(config), resolve_adapter(method, adapter, "all-linear", "hra")[1])
        assert len(adapted_layers(model)) == 36
        assert model.get_nb_trainable_parameters()[0] == 165_888, method


def test_a_sitting_goes_on_from_the_last(glue, tmp_path):
    args = Namespace(output=tmp_path, tasks=["cola"], methods=["LoRA"])
    score = glue.SCORES["cola"]

    def finish(rate: float, seed: int, value: float) -> None:
        folder = tmp_path / ("runs" if seed else "rates") / glue.name_of("cola", "LoRA", rate, seed)
        folder.mkdir(parents=True)
        record = {"results": {"last": {score: value}}, "seconds": 2.0, "parameters": {"trainable": 7}}
        (folder / "run.json").write_text(json.dumps(record))

    rates = glue.METHODS["LoRA"][2]
    assert list(glue.missing(args)) == [("cola", "LoRA", rate, 0) for rate in rates]
    for rate, value in zip(rates, (0.1, 0.3, 0.2, 0.1), strict=True):
        finish(rate, 0, value)
    assert list(glue.missing(args)) == [("cola", "LoRA", rates[1], seed) for seed in (1, 2, 3)]
    assert glue.table(args).splitlines()[-1] == "| LoRA | missing | missing | missing |"
    for seed, value in ((1, 0.2), (2, 0.4), (3, 0.6)):
        finish(rates[1], seed, value)
    assert list(glue.missing(args)) == []
    assert glue.table(args).splitlines()[-1] == f"| LoRA | 7 | 40.0 ± 20.0 ({rates[1]:g}) | 2 |"


def test_word_problems_try_all_rates_before_they_report(tmp_path):
    with loaded("word_problems") as benchmark:
        args = Namespace(output=tmp_path, methods=["LoRA", "peft LoRA"])
        rates = benchmark.METHODS["LoRA"][2]

        def finish(point, loss: float) -> None:
            folder = benchmark.folder_of(tmp_path, point)
            folder.mkdir(parents=True)
            (folder / "run.json").write_text(json.dumps({"results": {"last": {"loss": loss}}}))

        base = (benchmark.BASE, 0.0, 0)
        assert list(benchmark.missing(args)) == [base, *[("LoRA", rate, 0) for rate in rates]]
        finish(base, 2.0)
        for rate, loss in zip(rates, (1.3, 1.1, 1.2, 1.4), strict=True):
            assert ("LoRA", rate, 0) in benchmark.missing(args)
            finish(("LoRA", rate, 0), loss)
        assert list(benchmark.missing(args)) == [(m, rates[1], s) for s in (1, 2, 3) for m in ("LoRA", "peft LoRA")]


def run(point: str, args: Namespace) -> str:
    if point == "large":
        raise MemoryError("too large")
    (args.output / point).touch()
    return point


def test_a_run_that_fails_leaves_the_others_alone(glue, tmp_path, capsys):
    args = Namespace(output=tmp_path, workers=1, minutes=1, grace=30)
    glue.sitting(lambda: [p for p in ("small", "large", "last") if not (tmp_path / p).exists()], run, args)
    assert {file.name for file in tmp_path.iterdir()} == {"small", "last"}
    assert "large: MemoryError: too large" in capsys.readouterr().out
