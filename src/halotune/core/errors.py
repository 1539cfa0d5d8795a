"""The errors a user can cause. Each says what is wrong, what was found, and the remedy."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from os import PathLike
from typing import TypeVar

T = TypeVar("T")


class HalotuneError(ValueError):
    """A mistake in the input: a configuration, a name, a file, or a use of the API."""


class AdapterFileError(HalotuneError):
    """An adapter's file that cannot be read as it stands.

    Attributes:
        file: the file or folder.
        key: the tensor or configuration key, where one is to blame.
    """

    def __init__(self, file: str | PathLike[str], problem: str, *, key: str | None = None, remedy: str) -> None:
        self.file, self.key = str(file), key
        self.problem, self.remedy = problem, remedy
        where = f"{self.file}: {key}" if key else self.file
        super().__init__(f"{where}: {problem} {remedy}")

    def __reduce__(self):  # the default would call __init__ with the finished message
        return partial(AdapterFileError, key=self.key, remedy=self.remedy), (self.file, self.problem)


def warn(message: str) -> None:
    """A warning that points at the user's own line, however deep in the library it arises."""
    level, frame = 1, sys._getframe(0)
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("halotune", "torch", "contextlib"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def closest(name: str, known: Collection[str], n: int = 3) -> list[str]:
    """The known names that a user who wrote `name`, in whatever case, may have meant, best first."""
    import difflib

    folded = {k.casefold(): k for k in known}
    return [folded[k] for k in difflib.get_close_matches(name.casefold(), folded, n=n, cutoff=0.5)]


def did_you_mean(name: str, known: Collection[str]) -> str:
    """A question for the end of an error; empty where no known name is near."""
    near = closest(name, known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def look_up(known: Mapping[str, T], name: str, what: str) -> T:
    """The entry of this name.

    Raises:
        HalotuneError: there is none.
    """
    if name in known:
        return known[name]
    raise HalotuneError(f"{what}: expected one of {', '.join(known)}; got {name!r}.{did_you_mean(name, known)}")


def few(names: Iterable[str]) -> str:
    """The first three, and how many there are."""
    names = list(names)
    return ", ".join(names[:3]) + (f" … ({len(names)} in all)" if len(names) > 3 else "")
