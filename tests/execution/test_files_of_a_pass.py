"""One training pass is read in the files that `engine/forward/README.md` lists, and in no others."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import halotune
from halotune import HRAConfig, get_peft_model

ROOT = Path(halotune.__file__).parent


def test_the_files_of_a_pass_are_those_that_are_listed():
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False)
    model = get_peft_model(base, HRAConfig(r=4, target_modules=["0", "1"]))
    ran: set[str] = set()

    def trace(frame: FrameType, event: str, arg: Any) -> None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(ROOT):
            ran.add(file.relative_to(ROOT).as_posix())

    x = torch.randn(3, 8, requires_grad=True)
    model(x).sum().backward()  # a first pass is no other than the next
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        model(x).sum().backward()
    finally:
        sys.settrace(before)
    readme = (ROOT / "engine" / "forward" / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \d+ \| `(\S+)` \|", readme, re.MULTILINE)
    assert ran == set(listed) and len(listed) == 10
