"""ZeRO-3 through accelerate, two processes for each method; what they do is in `zero3.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from .cases import METHODS

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None,
    reason="needs DeepSpeed, which is not installed with the tests: it compiles a part of itself",
)


@pytest.mark.parametrize("method", [*METHODS, "hra-experts", "lora-experts"])
def test_as_in_one_process(method: str) -> None:
    settings = {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.distributed.zero3", method]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=os.environ | settings, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and f"{method} ok" in done.stdout, done.stderr[-4000:]
