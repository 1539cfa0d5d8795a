"""The command line answers at once, on one line where the input is bad, and never with a traceback."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest

import halotune
from halotune.cli.main import COMMANDS, main

LIGHT = sorted(COMMANDS.keys() - {"bench", "export"})  # the flags of these list what they know


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from halotune.cli.main import main\n"
        f"for arguments in [['--help'], ['--version'], [], *([name, '--help'] for name in {LIGHT})]:\n"
        "    main(arguments)\n"
        "print({'torch', 'transformers', 'matplotlib', 'numpy'} & sys.modules.keys())"
    )
    assert python(code).endswith("set()\n")


def test_the_public_names_come_with_the_first_of_them() -> None:
    code = (
        "import sys, halotune\n"
        "assert 'torch' not in sys.modules\n"
        "from halotune import *\n"
        "assert HRAConfig is halotune.HRAConfig\n"
        "print(*sorted(n for n in globals() if n in halotune.__all__))"
    )
    assert python(code).split() == sorted(halotune.__all__)


def test_the_registry_fills_itself() -> None:
    assert python("from halotune.methods.registry import method_of; print(method_of('HRA').peft_type)") == "HRA\n"


def test_threads_that_wait_do_not_spin() -> None:
    """torch's OpenMP reads the variable, so it has to be set before torch is there; a user's own value stays."""
    code = (
        "import os, sys\n"
        "from halotune.cli.main import main\n"
        "os.environ.pop('OMP_WAIT_POLICY', None)\n"
        "main(['--version'])\n"
        "print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)\n"
        "os.environ['OMP_WAIT_POLICY'] = 'ACTIVE'\n"
        "main(['--version'])\n"
        "print(os.environ['OMP_WAIT_POLICY'])"
    )
    assert [line for line in python(code).splitlines() if not line.startswith("halotune")] == ["PASSIVE False", "ACTIVE"]


def test_a_name_that_is_not_there() -> None:
    assert isinstance(halotune, types.ModuleType) and "HRAConfig" in dir(halotune)
    with pytest.raises(AttributeError, match="module 'halotune' has no attribute 'HRAConfg'"):
        _ = halotune.HRAConfg  # type: ignore[attr-defined]
    with pytest.raises(ImportError, match="HRAConfg"):
        exec("from halotune import HRAConfg")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert COMMANDS[name] in " ".join(out.split())
    assert main([name, "--help"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: halotune {name}") and not err


@pytest.mark.parametrize("arguments", [["inspekt"], ["--colour"], ["merge", "x"], ["inspect"]], ids=" ".join)
def test_wrong_usage_is_one_line_and_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and "halotune" in err and "--help" in err
