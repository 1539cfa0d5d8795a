"""Which dtype the arithmetic runs in."""

from __future__ import annotations

import pytest
import torch

from halotune.core.prepared import compute_dtype, exact, exact_dtype

F64, F32, F16, B16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize("dtype", [F64, F32, F16, B16], ids=str)
def test_products_run_in_the_dtype_of_the_input_or_in_autocasts(dtype):
    x = torch.ones(1, dtype=dtype)
    assert compute_dtype(x) == dtype
    with torch.autocast("cpu", B16):
        assert compute_dtype(x) == (x @ x[:, None]).dtype == (F64 if dtype == F64 else B16)
        with exact(x):
            assert compute_dtype(x) == (x @ x[:, None]).dtype == dtype


def test_what_depends_on_parameters_runs_in_fp32_or_better():
    assert exact_dtype(F16) == exact_dtype(B16, F16) == exact_dtype(F32) == F32
    assert exact_dtype(F16, F64) == F64
