"""Uploading adapters to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import HalotuneError
from .card import CARD_NAME

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


def upload(
    folder: Path, repo_id: str, private: bool | None, token: str | bool | None, revision: str | None, **commit: Any
) -> CommitInfo:
    """Make the repository, and the branch `revision`, where they are missing; upload the folder in one commit.

    A card that is there already stays as it is.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise HalotuneError(
            f'push_to_hub({repo_id!r}) needs huggingface-hub. Install it with: pip install "halotune[hub]"'
        ) from None
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    written = [CARD_NAME] if api.file_exists(repo_id, CARD_NAME, revision=revision) else None  # it may be its author's
    return api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, ignore_patterns=written, **commit)
