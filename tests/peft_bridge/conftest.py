"""Every test hears what is said once in a process."""

from __future__ import annotations

import pytest

from halotune.integrations.peft_bridge import layer


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "_said", set())
