"""Flags, files and Python give one configuration; what is wrong is an error that says how to put it right."""

from __future__ import annotations

import pytest
import yaml

from halotune import BoneConfig, HalotuneError, HRAConfig, LoraConfig
from halotune.recipes import NLUConfig
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
        (["--task", "cola"], "needed, and not given: --model"),
        ([*NEEDED, "--apply_GS", "--method", "lora"], "--apply_GS is an option of hra"),
        ([*NEEDED, "--adapter.rr", "4"], "there is no option --adapter.rr. Did you mean --adapter.r?"),
        ([*NEEDED, "--seed", "u"], "--seed: expected int; got u"),
        ([*NEEDED, "--seed", "-1"], "seed: must be from 0 to below 2³²; got -1"),
        ([*NEEDED, "--quant", "nf5"], "--quant: expected one of 'nf4', 'int8'; got nf5"),
        ([*NEEDED, "--method", "hrra"], "there is no method 'hrra'. Did you mean hra?"),
        ([*NEEDED, "--epochs", "0"], "epochs: must be above 0"),
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


def test_python_says_the_same():
    with pytest.raises(HalotuneError, match=r"adapter.rank: HRAConfig has no such field"):
        NLUConfig(model="m", task="cola", adapter={"rank": 8})
    with pytest.raises(HalotuneError, match=r"method: got 'hra', but adapter is a LoraConfig"):
        NLUConfig(model="m", task="cola", method="hra", adapter=LoraConfig())


def test_presets_are_the_papers_and_flags_win():
    paper = NLUConfig(model="m", task="cola", preset="paper")
    assert (paper.learning_rate, paper.epochs, paper.warmup, paper.max_length, paper.freeze_head) == (9e-3, 34, 100, 64, False)
    weighted = NLUConfig(model="m", task="cola", preset="paper", adapter={"orthogonality_weight": 1e-6})
    assert (weighted.learning_rate, weighted.epochs) == (2e-3, 12)
    code = NLUConfig(model="m", task="stsb", preset="paper-code", epochs=1.0)
    assert (code.learning_rate, code.epochs, code.freeze_head, code.evaluate_every) == (3e-3, 1.0, True, 100)
