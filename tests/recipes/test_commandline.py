"""Flags, files and Python give one configuration; what is wrong is an error that says how to put it right."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from halotune import BoneConfig, HalotuneError, HRAConfig, LoraConfig
from halotune.recipes import MathConfig, NLUConfig, NLUEvaluation, SFTConfig
from halotune.recipes.common.commandline import parse
from halotune.recipes.common.config import as_yaml, plain

NEEDED = ["--model", "m", "--task", "cola"]


def test_flags_are_the_fields():
    config = parse(NLUConfig, [*NEEDED, "--method", "loha", "--adapter.r", "4", "--learning-rate", "1e-3", "--seed=7"])
    assert (config.method, config.adapter.r, config.learning_rate, config.seed) == ("loha", 4, 1e-3, 7)
    assert plain(config) == plain(
        NLUConfig(model="m", task="cola", adapter={"r": 4}, method="loha", learning_rate=1e-3, seed=7)
    )


def test_a_field_of_the_method_may_be_written_short_and_a_switch_alone():
    config = parse(NLUConfig, [*NEEDED, "--r", "6", "--apply-GS", "--freeze-head", "--target-modules", "[query, key]"])
    assert config.adapter == HRAConfig(r=6, apply_GS=True, target_modules=["query", "key"])
    assert config.freeze_head is True


@pytest.mark.parametrize("method", ["hra", "loha", "bone", "bat", "miss", "oft", "lora"])
def test_every_method_has_its_own_defaults(method):
    from halotune import DEFAULT_LEARNING_RATES

    config = parse(NLUConfig, [*NEEDED, "--method", method])
    assert config.learning_rate == DEFAULT_LEARNING_RATES[method.upper()]
    assert config.adapter.target_modules == "all-linear"
    assert NLUConfig(model="m", task="cola", adapter=config.adapter).method == method


def test_what_is_printed_is_read_back(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(NLUConfig, [*NEEDED, "--method", "bat", "--r", "4", "--print-config"])
    file = tmp_path / "run.yaml"
    file.write_text(capsys.readouterr().out)
    assert yaml.safe_load(file.read_text())["adapter"]["init_weights"] == "bat"
    config = parse(NLUConfig, ["--config", str(file)])
    assert config.adapter == BoneConfig(r=4, init_weights="bat", target_modules="all-linear")
    file.write_text(as_yaml(config))
    assert parse(NLUConfig, ["--config", str(file)]) == config


def test_flags_win_over_files_wherever_they_stand_and_later_files_over_earlier_ones(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("model: m\ntask: cola\nmethod: lora\nseed: 1\nadapter: {lora_alpha: 4}\n")
    second.write_text("seed: 2\n")
    config = parse(NLUConfig, ["--epochs", "2", "--config", str(first), "--config", str(second)])
    assert (config.seed, config.epochs, config.adapter.lora_alpha) == (2, 2, 4)
    assert parse(NLUConfig, ["--seed", "3", "--config", str(first)]).seed == 3


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--tsk", "cola"], "there is no option --tsk. Did you mean --task?"),
        ([*NEEDED, "--lr", "1e-3"], "there is no option --lr. Did you mean --learning-rate?"),
        ([*NEEDED, "--rate", "1e-3"], "there is no option --rate. Did you mean --learning-rate?"),
        ([*NEEDED, "--batch_siz", "8"], "there is no option --batch-siz. Did you mean --batch-size?"),
        (["--task", "cola"], "needed, and not given: --model"),
        ([*NEEDED, "--apply-GS", "--method", "lora"], "--apply-GS is an option of hra"),
        ([*NEEDED, "--adapter.rr", "4"], "there is no option --adapter.rr. Did you mean --adapter.r?"),
        ([*NEEDED, "--seed", "u"], "--seed: expected int; got u"),
        ([*NEEDED, "--seed", "-1"], "seed: must be from 0 to below 2³²; got -1"),
        ([*NEEDED, "--quant", "nf5"], "--quant: expected one of 'nf4', 'int8'; got nf5"),
        ([*NEEDED, "--method", "hrra"], "there is no method 'hrra'. Did you mean hra?"),
        ([*NEEDED, "--epochs", "0"], "epochs: must be above 0"),
        ([*NEEDED, "--learning-rate", "1e400"], "learning_rate: must be above 0, and finite; got inf"),
        ([*NEEDED, "--schedule", "linaer"], "there is no schedule 'linaer'. Did you mean linear?"),
        ([*NEEDED, "--train-rows", "0"], "train_rows: must be at least 1; got 0"),
        ([*NEEDED, "--max-length", "0"], "max_length: must be at least 4; got 0"),
        ([*NEEDED, "--regression"], "regression: is of your own tables; cola has its own; got True"),
        ([*NEEDED, "--evaluation", "dev.csv"], "evaluation: is of your own tables"),
        ([*NEEDED, "--adapter", "eight"], "--adapter: expected a YAML file with fields of the method's configuration"),
        (["--model", "m", "--task", "csv"], "csv needs a file"),
        ([*NEEDED, "--preset", "paper", "--method", "lora"], "preset: lora has none"),
        ([*NEEDED, "--config", "no-such.yaml"], "--config no-such.yaml: cannot be read as YAML"),
        ([*NEEDED, "stray"], "unrecognized arguments: stray"),
    ],
)
def test_errors_say_the_remedy(flags, said):
    with pytest.raises(HalotuneError) as e:
        parse(NLUConfig, flags)
    assert said in str(e.value)


def test_a_key_of_a_file_is_checked_like_a_flag(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("adapter: {apply_GS: true}\n")
    with pytest.raises(HalotuneError, match=r"run.yaml: adapter.apply_GS is an option of hra. Choose it with --method hra"):
        parse(NLUConfig, ["--config", str(file), *NEEDED, "--method", "lora"])
    file.write_text("model: m\ntask: cola\nmethod: lora\nadapter: {lora_alfa: 4}\n")
    with pytest.raises(HalotuneError, match=r"run.yaml: there is no option adapter.lora_alfa. Did you mean adapter.lora_alpha"):
        parse(NLUConfig, ["--config", str(file)])


def test_what_stands_without_a_flag_is_missed_by_its_name():
    with pytest.raises(HalotuneError, match=r"needed, and not given: RUN\."):
        parse(NLUEvaluation, [])


@pytest.mark.parametrize("value", ["query,key", "query, key", "[query,key]"])
def test_names_of_modules_are_a_list_and_patterns_stay_patterns(value):
    """A text that is no list is a regular expression, which `query,key` is never meant to be."""
    assert parse(NLUConfig, [*NEEDED, "--target-modules", value]).adapter.target_modules == {"query", "key"}
    assert parse(NLUConfig, [*NEEDED, f"--adapter.target_modules={value}"]).adapter.target_modules == {"query", "key"}
    assert parse(NLUConfig, [*NEEDED, "--target-modules", "query"]).adapter.target_modules == {"query"}
    for kept in ("all-linear", r".*(query|key)"):
        assert parse(NLUConfig, [*NEEDED, "--target-modules", kept]).adapter.target_modules == kept


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", "8"), ("epochs", "3"), ("seed", 1.5), ("schedule", None), ("adapter", 8), ("model", None)],
)
def test_values_of_other_types_are_refused_in_python(name, value):
    with pytest.raises(HalotuneError, match=rf"^{name}: expected .*; got {value!r} \({type(value).__name__}\)"):
        NLUConfig(**{"model": "m", "task": "cola", name: value})


def test_paths_are_as_good_as_texts():
    config = NLUConfig(model=Path("m"), task="csv", data=Path("d.csv"), output=Path("out"))
    assert (config.model, config.data, config.output) == ("m", "d.csv", "out")


def test_python_says_the_same():
    with pytest.raises(HalotuneError, match=r"adapter.rank: HRAConfig has no such field"):
        NLUConfig(model="m", task="cola", adapter={"rank": 8})
    for field, value, near in (
        ("precision", "fp61", "fp16"),
        ("quant", "nf5", "nf4"),
        ("task", "colla", "cola"),
        ("preset", "papr", "paper"),
    ):
        with pytest.raises(HalotuneError, match=rf"^{field}: there is no '{value}'\. Did you mean {near}\?"):
            NLUConfig(**{"model": "m", "task": "cola", field: value})
    with pytest.raises(HalotuneError, match=r"which: there is no 'lest'"):
        NLUEvaluation("run", which="lest")
    with pytest.raises(HalotuneError, match=r"method: got 'hra', but adapter is a LoraConfig"):
        NLUConfig(model="m", task="cola", method="hra", adapter=LoraConfig())


def test_presets_are_the_papers_and_flags_win():
    paper = NLUConfig(model="m", task="cola", preset="paper")
    assert (paper.learning_rate, paper.epochs, paper.warmup, paper.max_length, paper.freeze_head) == (9e-3, 34, 100, 64, False)
    weighted = NLUConfig(model="m", task="cola", preset="paper", adapter={"orthogonality_weight": 1e-6})
    assert (weighted.learning_rate, weighted.epochs) == (2e-3, 12)
    code = NLUConfig(model="m", task="stsb", preset="paper-code", epochs=1.0)
    assert (code.learning_rate, code.epochs, code.freeze_head, code.evaluate_every) == (3e-3, 1.0, True, 100)


def test_what_is_given_wins_over_a_preset_even_where_it_is_the_usual_value(tmp_path, capsys):
    flags = ["--model", "m", "--data", "d.jsonl", "--preset", "paper"]
    given = ["--r", "8", "--batch-size", "16", "--precision", "fp32", "--packing", "true", "--schedule", "linear"]
    paper, own = parse(MathConfig, flags), parse(MathConfig, [*flags, *given])
    assert (paper.adapter.r, paper.batch_size, paper.precision, paper.packing, paper.schedule) == (
        (32, 32, "bf16", False, "cosine")
    )
    assert (own.adapter.r, own.batch_size, own.precision, own.packing, own.schedule) == (8, 16, "fp32", True, "linear")
    assert own.adapter.orthogonality_weight == 1e-4 and own.learning_rate == 3e-5
    python = {"model": "m", "data": "d.jsonl", "preset": "paper"}
    assert MathConfig(**python, adapter={"r": 8}).adapter == own.adapter
    assert MathConfig(**python, adapter=HRAConfig(r=8)).adapter == HRAConfig(r=8)  # a whole configuration
    with pytest.raises(SystemExit):
        parse(MathConfig, [*flags, "--r", "8", "--print-config"])
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    assert parse(MathConfig, ["--config", str(tmp_path / "run.yaml")]) == parse(MathConfig, [*flags, "--r", "8"])


@pytest.mark.parametrize(
    ("method", "label"), [("lora", "LoRA r=8"), ("loha", "LoHa r=8"), ("miss", "MiSS r=64"), ("bat", "BAT r=64")]
)
def test_a_run_is_named_as_people_write_its_method(method: str, label: str) -> None:
    assert SFTConfig(model="m", data="d", method=method).label == label
