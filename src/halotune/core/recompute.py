"""Functions of parameters that keep nothing for backward but their inputs, and compute once more there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]


class Preparation(ABC):
    """A pure function of the parameters of several adapters, stacked: `(n, …)` each -> tensors `(n, …)`."""

    keeps = False  # whether what `make` computes on its way is kept for backward, where nobody counts it

    @abstractmethod
    def make(self, *stacked: Tensor) -> Tensors: ...

    def part(self, rows: Sequence[int]) -> Preparation:
        """The same function, of these rows alone."""
        return self

    def pull(self, stacked: Tensors, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradients of what was stacked; recorded themselves where gradients are enabled."""
        create = torch.is_grad_enabled()
        if not create:
            stacked = tuple([t.detach().requires_grad_(t.is_floating_point()) for t in stacked])
        with torch.enable_grad():
            made = self.make(*stacked)
        return _gradients(stacked, made, grads, create_graph=create)


def _gradients(
    inputs: Sequence[Tensor], made: Sequence[Tensor], grads: Sequence[Tensor | None], **how: bool
) -> Sequence[Tensor | None]:
    known = [(t, g) for t, g in zip(made, grads, strict=True) if g is not None and t.requires_grad]
    if not known:
        return [None] * len(inputs)
    outputs, grads = zip(*known, strict=True)
    wanted = [t for t in inputs if t.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True, **how))
    return [next(found) if t.requires_grad else None for t in inputs]


def _saved_tensors_are_hooked() -> bool:
    """Whether somebody counts, or moves, what is saved for backward, as a checkpoint does."""
    autograd: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
    top = getattr(autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(False) is not None


class _Prepare(torch.autograd.Function):
    """One node for n layers. What goes in and comes out belongs to single layers, so a layer that did not run gets no gradient.

    Nothing is kept through `save_for_backward`: a checkpoint counts what is kept, and finds as much when it runs a layer again
    alone; and backward may run twice, over some layers at a time. So versions are compared here, as autograd would, and what
    is not kept is computed once more.
    """

    @staticmethod
    def forward(ctx: Any, preparation: Preparation, n: int, *parameters: Tensor) -> Tensors:
        ctx.preparation, ctx.n, ctx.parameters = preparation, n, parameters
        ctx.versions = [t._version for t in parameters]
        ctx.set_materialize_grads(False)
        stacked, ctx.kept = _stacked(parameters, range(n), n), None
        if preparation.keeps and not _saved_tensors_are_hooked():
            leaves = [t.detach().requires_grad_(parameters[k * n].requires_grad) for k, t in enumerate(stacked)]
            with torch.enable_grad():
                made = preparation.make(*leaves)
            ctx.kept = leaves, made
            made = tuple([t.detach() for t in made])
        else:
            made = preparation.make(*stacked)
        return tuple([part for t in made for part in t.unbind()])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        n, parameters = ctx.n, ctx.parameters
        rows = [i for i in range(n) if any([g is not None for g in grads[i::n]])]
        result: list[Tensor | None] = [None] * len(parameters)
        for i in rows:
            for p, version in zip(parameters[i::n], ctx.versions[i::n], strict=True):
                if p._version != version:
                    raise RuntimeError(
                        f"a parameter {tuple(p.shape)} of an adapter was modified in place between the forward pass and its "
                        f"backward (version {p._version}, expected {version}). Call backward before the optimizer's step."
                    )
        if rows:
            stacked_grads = [_stacked_gradients(grads[j : j + n], rows) for j in range(0, len(grads), n)]
            if ctx.kept is not None and len(rows) == n and not torch.is_grad_enabled():
                leaves, made = ctx.kept
                pulled = _gradients(leaves, made, stacked_grads, retain_graph=True)
            else:
                preparation = ctx.preparation if len(rows) == n else ctx.preparation.part(rows)
                pulled = preparation.pull(_stacked(parameters, rows, n), stacked_grads)
            for k, t in enumerate(pulled):
                if t is not None:
                    for i, part in zip(rows, t.contiguous().unbind(), strict=True):  # laid out like the parameters, the
                        result[k * n + i] = part  # pieces become their gradients as they are
        return None, None, *[g if p.requires_grad else None for g, p in zip(result, parameters, strict=True)]


def _stacked(flat: Sequence[Tensor], rows: Sequence[int], n: int) -> Tensors:
    return tuple([_stack([flat[k + i] for i in rows]) for k in range(0, len(flat), n)])


def _stack(tensors: list[Tensor]) -> Tensor:
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def _stacked_gradients(grads: Sequence[Tensor | None], rows: Sequence[int]) -> Tensor | None:
    like = next((g for g in grads if g is not None), None)
    if like is None:
        return None
    return _stack([torch.zeros_like(like) if (g := grads[i]) is None else g for i in rows])


def prepare(preparation: Preparation, adapters: Sequence[Sequence[Tensor]]) -> list[Tensors]:
    """What a preparation makes for each of n adapters.

    Args:
        adapters: the parameters of each; those of all have the same shapes, dtypes and devices.
    """
    n = len(adapters)
    flat = [t for kind in zip(*adapters, strict=True) for t in kind]
    if torch.is_grad_enabled() and any([t.requires_grad for t in flat]):
        made = _Prepare.apply(preparation, n, *flat)
    else:
        made = [part for t in preparation.make(*_stacked(flat, range(n), n)) for part in t.unbind()]
    return [tuple(made[i::n]) for i in range(n)]
