"""No network: hubs are not asked, and nothing is reported."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package", autouse=True)
def alone() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        constants = pytest.importorskip("huggingface_hub.constants")
        for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
            patch.setenv(name, "1")
            patch.setattr(constants, name, True)  # it was read at import
        yield
