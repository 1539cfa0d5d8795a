"""Objects of peft's that get a class of ours in front of their own, in place: `isinstance` and names stay true."""

from __future__ import annotations

from functools import cache
from types import MethodType
from typing import Any

# Where accelerate keeps a module's forward: bound to the class that the module had at that time.
_BOUND = ("forward", "_old_forward")


class InFront:
    """To be put in front of a class of peft's by `put_in_front`. Pickling needs both classes alone, not their union."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *state = super().__reduce_ex__(max(protocol, 2))  # type: ignore[misc]
        return _blank, type(self).__bases__, *state


@cache
def _union(front: type[InFront], own: type) -> type:
    """Named as peft's class, since representations show the name."""
    names = {name: getattr(own, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(own)(own.__name__, (front, own), names)


def _blank(front: type[InFront], own: type) -> Any:
    union: Any = _union(front, own)
    return union.__new__(union)


def put_in_front(front: type[InFront], thing: Any) -> None:
    _change_class(thing, _union(front, type(thing)))


def take_away(thing: InFront) -> None:
    _change_class(thing, type(thing).__bases__[1])


def _change_class(thing: Any, new: type) -> None:
    for name in _BOUND:
        bound = thing.__dict__.get(name)
        if isinstance(bound, MethodType) and bound.__func__ is getattr(type(thing), "forward", None):
            thing.__dict__[name] = MethodType(new.forward, thing)  # type: ignore[attr-defined]
    thing.__class__ = new


def runs_own_forward(thing: Any) -> bool:
    """Whether a call ends in its class's `forward`, and in nobody's replacement of it."""
    bound = thing.__dict__.get("_old_forward", thing.__dict__.get("forward"))
    return bound is None or getattr(bound, "__func__", None) is type(thing).forward
