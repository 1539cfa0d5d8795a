"""The cases of FSDP2 over NCCL, one GPU for each process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .cases import METHODS, failures
from .launch import spawn
from .test_fsdp2 import CHECKS, case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices, for NCCL"),
]
CASES = [
    (method, way, check, "cuda") for way in ("block", "adapters-block", "offload") for method in METHODS for check in CHECKS
]


@pytest.fixture(scope="module")
def found() -> list[dict[tuple[Any, ...], str]]:
    return spawn(2, failures, CASES, case, backend="cpu:gloo,cuda:nccl", timeout=600)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_as_in_one_process(case: tuple[Any, ...], found: list[dict[tuple[Any, ...], str]]) -> None:
    for rank, failed in enumerate(found):
        if case in failed:
            pytest.fail(f"process {rank}: {failed[case]}")
