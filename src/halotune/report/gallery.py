"""Pictures of a run, laid in the page itself."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from .runs import GALLERY, Run

# First bytes of a file -> its type. An SVG is none of them: it is a document, and may refer to others.
TYPES = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}


@dataclass(frozen=True)
class Gallery:
    """Rows of pictures under the heads of columns; a picture that is missing is None.

    Attributes:
        shared: how many of the first columns show what the run did not make: its subject, its base.
    """

    columns: list[str]
    rows: list[tuple[str, list[str | None]]]
    shared: int = 0


def gallery_of(run: Run) -> Gallery | None:
    """The pictures that `gallery.json` lists, as data URIs: `{"columns": […], "rows": [{"label": …, "images": [path …]}],
    "shared": number}`."""
    columns, rows = run.gallery.get("columns"), run.gallery.get("rows")
    if not isinstance(rows, list) or not rows:
        return None
    heads = [str(name) for name in columns] if isinstance(columns, list) else []
    lines: list[tuple[str, list[str | None]]] = []
    for row in rows:
        row = row if isinstance(row, dict) else {}
        images = row.get("images")
        pictures = [_picture(run, path) for path in images] if isinstance(images, list) else []
        lines.append((str(row.get("label", "")), pictures))
    widest = max(len(heads), *(len(pictures) for _, pictures in lines))
    lines = [(label, pictures + [None] * (widest - len(pictures))) for label, pictures in lines]
    shared = run.gallery.get("shared")
    return Gallery(
        heads + [""] * (widest - len(heads)), lines, shared if isinstance(shared, int) and 0 < shared < widest else 0
    )


def side_by_side(galleries: Sequence[tuple[str, Gallery]]) -> list[Gallery]:
    """What several runs made of the same: their shared columns once, then the last column of each, under its name."""
    groups: dict[tuple[str | None, ...], list[tuple[str, Gallery]]] = {}
    for name, gallery in galleries:
        if gallery.shared:
            same = tuple(gallery.columns[: gallery.shared] + gallery.rows[0][1][: gallery.shared])
            groups.setdefault(same, []).append((name, gallery))
    return [_joined(group) for group in groups.values() if len(group) > 1]


def _joined(group: Sequence[tuple[str, Gallery]]) -> Gallery:
    first = group[0][1]
    shared = {label: pictures[: first.shared] for _, gallery in reversed(group) for label, pictures in gallery.rows}
    last = [{label: pictures[-1] for label, pictures in gallery.rows} for _, gallery in group]
    labels = dict.fromkeys(label for _, gallery in group for label, _ in gallery.rows)
    rows = [(label, shared[label] + [made.get(label) for made in last]) for label in labels]
    return Gallery(first.columns[: first.shared] + [name for name, _ in group], rows, first.shared)


def _picture(run: Run, path: object) -> str | None:
    """A picture inside the run's folder; nothing outside of it is read."""
    if path is None:
        return None
    try:
        file = (run.folder / str(path)).resolve()
        inside = file.is_relative_to(run.folder.resolve())
        content = file.read_bytes() if inside else b""
    except (OSError, ValueError) as e:
        run.problems.append(f"{GALLERY}: {path}: {getattr(e, 'strerror', None) or e}")
        return None
    kind = next((kind for start, kind in TYPES.items() if content.startswith(start)), None)
    if kind is None:
        what = "is no PNG, JPEG, GIF or WebP" if inside else "lies outside of the run's folder"
        run.problems.append(f"{GALLERY}: {path} {what}")
        return None
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
