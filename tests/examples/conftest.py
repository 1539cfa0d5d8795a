"""The models that the examples load: made once, on the disk. No network, and no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from .models import save_language_model


@pytest.fixture(scope="package", autouse=True)
def alone() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        constants = pytest.importorskip("huggingface_hub.constants")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(constants, "HF_HUB_OFFLINE", True)  # it was read at import
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="package")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small OPT, the class of PEFT's examples."""
    pytest.importorskip("transformers")
    return save_language_model(tmp_path_factory.mktemp("opt"), "opt")


@pytest.fixture(scope="package")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small Llama."""
    pytest.importorskip("transformers")
    return save_language_model(tmp_path_factory.mktemp("llama"), "llama")
