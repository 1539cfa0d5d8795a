"""Layers that the original model stacks into one, such as FLUX's query, key and value: split, and joined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..core.errors import AdapterFileError, HalotuneError
from ..methods.lycoris_form import LycorisForm
from .originals import Part


def cut(
    form: LycorisForm, theirs: dict[str, Tensor], part: Part, parts: Sequence[Part], file: Path, key: str
) -> dict[str, Tensor]:
    """The tensors of one of the layers that a module consists of."""
    if part.rows is None:
        return theirs
    total = sum(map(_count, parts))
    out = dict(theirs)
    for name in form.by_row:
        if name in theirs:
            t = theirs[name]
            if t.shape[0] != total:
                raise AdapterFileError(
                    file,
                    f"{name} of shape {tuple(t.shape)} cannot be split into {len(parts)} layers, of {total} outputs together.",
                    key=key,
                    remedy="Train with lengths of outputs (wd_on_output=True): those of inputs tie such layers to each other.",
                )
            out[name] = torch.cat([t[a:b] for a, b in part.rows])
    return out


def stack(form: LycorisForm, name: str, parts: Sequence[Part], modules: Mapping[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of the module that several layers are in the original, from theirs.

    Raises:
        HalotuneError: the layers have no such module: one has no adapter, or they differ in what they would share.
    """
    if parts[0].rows is None:
        return modules[parts[0].path]
    hint = 'Write the model\'s own names instead: names="model".'
    lacking = [p.path for p in parts if p.path not in modules]
    if lacking:
        raise HalotuneError(f"{name} stacks {len(parts)} layers, of which {', '.join(lacking)} have no adapter. {hint}")
    out: dict[str, Tensor] = {}
    for key, t in modules[parts[0].path].items():
        pieces = [modules[p.path].get(key, t.new_empty(0)) for p in parts]
        if key in form.by_row and all(len(piece) == _count(p) for piece, p in zip(pieces, parts, strict=True)):
            rows = torch.cat([torch.arange(a, b, device=t.device) for p in parts for a, b in p.rows or ()])
            out[key] = torch.cat(pieces)[rows.argsort()]
        elif key not in form.by_row and all(torch.equal(piece, t) for piece in pieces):
            out[key] = t
        else:
            raise HalotuneError(f"{name} stacks {len(parts)} layers, which differ in {key}, of which it has one. {hint}")
    return out


def _count(part: Part) -> int:
    return sum(b - a for a, b in part.rows or ())
