"""One Stable Diffusion pipeline on the disk, and a fresh copy of it for each test. No network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ..examples.models import save_stable_diffusion
from . import pipelines


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stable_diffusion(tmp_path_factory.mktemp("stable_diffusion"))


@pytest.fixture(scope="package")
def base(folder: Path) -> Tensor:
    """What the pipeline paints without adapters."""
    return pipelines.image(pipelines.load(folder))


@pytest.fixture
def pipe(folder: Path) -> Iterator[Any]:
    yield pipelines.load(folder)
    torch._dynamo.reset()
