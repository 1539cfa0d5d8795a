"""The Trainer's tests a second time, in a process where peft cannot be imported."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")
ROOT = Path(__file__).parents[2]


def test_the_trainer_without_peft():
    chosen = ["tests/integrations/test_trainer.py", "tests/integrations/test_penalty.py", "-k", "not two_processes"]
    plugins = ["-p", "tests.integrations.no_peft", "-p", "no:cacheprovider", "-n", "0"]
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", *plugins, *chosen], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) > 25
