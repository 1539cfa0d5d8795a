from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halotune import PeftModel

from .models import METHODS, MLP, adapted, config


@pytest.fixture(scope="module")
def plain() -> MLP:
    """A model without adapters; no test changes it."""
    torch.manual_seed(0)
    return MLP().double().eval().requires_grad_(False)  # torch picks kernels by that too


@pytest.fixture(scope="module")
def crowd(plain: MLP) -> PeftModel:
    """The same with an adapter of every method, each named after it."""
    torch.manual_seed(1)
    return adapted(plain, **{name: config(name) for name in METHODS})


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 3, 7, dtype=torch.float64)
