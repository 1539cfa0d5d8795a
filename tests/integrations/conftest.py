"""No network: hubs are not asked, nothing is reported. One Stable Diffusion pipeline on disk, a copy of it for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ..examples.models import save_stable_diffusion
from . import pipelines


@pytest.fixture(scope="package", autouse=True)
def alone() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        constants = pytest.importorskip("huggingface_hub.constants")
        for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
            patch.setenv(name, "1")
            patch.setattr(constants, name, True)  # it was read at import
        yield


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
