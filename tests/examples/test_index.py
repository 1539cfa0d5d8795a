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


def test_gram_schmidt_is_set_in_every_hra_example_of_pefts_pages_but_the_one_that_loads() -> None:
    files = [file for file in EXAMPLES.glob("*.py") if file.stem != "pipeline_adapters"]
    hra = {file.stem: file.read_text(encoding="utf-8") for file in files if "HRAConfig" in file.read_text()}
    assert len(hra) == 8
    assert all("apply_GS=True" in text for text in hra.values())
