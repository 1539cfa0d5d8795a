"""The examples as a folder: all are listed, all are ours."""

from __future__ import annotations

import re

from .models import EXAMPLES


def test_every_example_is_listed_and_uses_halotune_alone() -> None:
    files = {file.name: file.read_text(encoding="utf-8") for file in EXAMPLES.glob("*.py")}
    listed = re.findall(r"^\| \[`(.+?)`\]\((.+?)\) \|", (EXAMPLES / "README.md").read_text(encoding="utf-8"), re.M)
    assert all(name == link for name, link in listed)
    assert sorted(name for name, _ in listed) == sorted(files)
    for text in files.values():
        assert "\nfrom halotune import " in text
        assert not re.search(r"^\s*(from|import) peft", text, re.M)


def test_gram_schmidt_is_set_where_pefts_examples_set_it() -> None:
    hra = {file.stem: file.read_text(encoding="utf-8") for file in EXAMPLES.glob("*.py") if "HRAConfig" in file.read_text()}
    assert len(hra) == 10
    assert sorted(name for name, text in hra.items() if "apply_GS=True" not in text) == ["pipeline_adapters", "trainer"]
