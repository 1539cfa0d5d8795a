"""What depends on an adapter's parameters alone: its precision, its form, how it is made, and when it may be used.

Normalised columns, triangular solves, casts, whole weights W': a *pass* of a model in a thread prepares them for all layers of
one shape together (`engine/forward`) and leaves them in each adapter's `Slot`. A layer looks at its slot at every call, and
uses what is there only if nothing that it was made from has changed; else it prepares for itself. So a layer that is called
alone, twice, in another order or not at all is right by construction.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack  # pyright: ignore[reportMissingImports]
from torch.autograd import forward_ad

from ..ops.product import apply

if TYPE_CHECKING:
    from .operator import WeightShape

Tensors = tuple[Tensor, ...]

# -- precision: products with activations run in the model's dtype, what depends on parameters alone in fp32 or better


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype a matrix product of `x` runs in: autocast's where it is on, else `x`'s own."""
    if not torch._C._is_any_autocast_enabled():
        return x.dtype
    kind = x.device.type
    if kind == "meta" or not x.is_floating_point() or x.dtype == torch.float64:  # autocast knows no meta device
        return x.dtype
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def exact_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """fp32, or fp64 where one of the dtypes is."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def exact(t: Tensor) -> torch.autocast:
    """A context in which autocast leaves products on the device of `t` alone."""
    return torch.autocast("cpu" if t.is_meta else t.device.type, enabled=False)


# -- forms

# "auto": as activations an adapter costs a few passes over x and a few launches for each layer; as a weight one more product in
# backward, `dyᵀ x`, and its share in building W' of all layers together and in pulling the gradients back. The choice depends
# on sizes alone, so that a checkpoint makes the same one when it runs a layer again.
Form = Literal["auto", "activations", "weights"]

# Of an H100, bf16, in seconds: an operation of a large product, a byte of its memory, a launch from Python.
OPERATION, BYTE, LAUNCH = 1 / 500e12, 1 / 3e12, 6e-6
PASSES_OVER_X = 8  # read, written rotated; in backward d and x read, dx written …
PASSES_OVER_W = 12  # W stacked, W' written, its gradients stacked, W and they read twice each
LAUNCHES = 4  # of an adapter as activations, over one as a weight


def is_weight(form: Form, makes_weight: bool, x: Tensor, shape: WeightShape) -> bool:
    """Whether W' of a plain matrix is prepared together with those of other layers.

    Args:
        form: what the user asks for; "activations" where there is no room for W' either.
        makes_weight: the adapter has no other form than W', made layer by layer where it is not prepared.
        shape: of the layer, in all its shards: all processes choose alike.
    """
    if form == "activations" or not torch.is_grad_enabled():
        return False
    if form == "weights":
        return True
    if not x.is_cuda:
        return False
    return makes_weight or weights_are_cheaper(x.shape[:-1].numel(), shape.out_features, shape.in_features, x.itemsize)


def weights_are_cheaper(tokens: int, n_out: int, n_in: int, itemsize: int) -> bool:
    activations = PASSES_OVER_X * tokens * n_in * itemsize * BYTE + LAUNCHES * LAUNCH
    weights = 2 * tokens * n_out * n_in * OPERATION + PASSES_OVER_W * n_out * n_in * itemsize * BYTE
    return weights < activations


# -- making it: functions of parameters that keep nothing for backward but their inputs, and compute once more there


KEPT = 2**22  # numbers in fp32, about three times: 48 MiB


class Preparation(ABC):
    """A pure function of the parameters of several adapters, stacked: `(n, …)` each -> tensors `(n, …)`."""

    keeps = False  # whether what `make` computes on its way is kept for backward, where it is small and nobody counts it

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
        small = sum([t.numel() for t in stacked]) <= KEPT
        if preparation.keeps and small and not _saved_tensors_are_hooked():
            needed = ctx.needs_input_grad[2:]
            leaves = [t.detach().requires_grad_(any(needed[k * n : k * n + n])) for k, t in enumerate(stacked)]
            with torch.enable_grad():
                made = preparation.make(*leaves)
            ctx.kept = leaves, made
            made = [t.detach() for t in made]
        else:
            made = preparation.make(*stacked)
        return tuple([part for t in made for part in t.unbind()])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        n, parameters = ctx.n, ctx.parameters
        known = [[g is not None for g in grads[j : j + n]] for j in range(0, len(grads), n)]
        rows = [i for i, ran in enumerate(map(any, zip(*known, strict=True))) if ran]
        result: list[Tensor | None] = [None] * len(parameters)
        for k, (p, version) in enumerate(zip(parameters, ctx.versions, strict=True)):
            if p._version != version and k % n in rows:
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
        made = apply(_Prepare, preparation, n, *flat)
    else:
        made = [part for t in preparation.make(*_stacked(flat, range(n), n)) for part in t.unbind()]
    return [tuple(made[i::n]) for i in range(n)]


# -- using it

Seen = tuple[Tensor, int, int, bool]


def seen(tensors: Sequence[Tensor]) -> list[Seen]:
    """Identity, address, version, `requires_grad` of each. Writes that torch does not record (`.data`, numpy) are not seen."""
    return [(t, t.data_ptr(), t._version, t.requires_grad) for t in tensors]


def unchanged(before: Sequence[Seen], tensors: Sequence[Tensor]) -> bool:
    """Whether these are the tensors that were seen, as they were."""
    for (tensor, address, version, grad), t in zip(before, tensors, strict=True):
        if t is not tensor or t._version != version or t.data_ptr() != address or t.requires_grad is not grad:
            return False
    return True


def stream_of(t: Tensor) -> int:
    """The CUDA stream on which work is queued now; 0 on a CPU."""
    return torch._C._cuda_getCurrentRawStream(t.get_device()) if t.is_cuda else 0


@dataclass(slots=True)
class Prepared:
    """What was prepared for one adapter.

    Attributes:
        factors: what `Adapter.prepare` gives, in `dtype`, contiguous; empty where W' was made instead.
        adapted: W' `(out, in)`, or None.
        dtype: that of the products.
        recorded: made with gradients enabled, so that it may be part of a graph.
        stream: where its numbers are computed.
        made_from: the parameters; and W, for W'.
    """

    factors: Tensors
    adapted: Tensor | None
    dtype: torch.dtype | None
    recorded: bool
    stream: int = 0
    made_from: Sequence[Seen] = ()

    def release(self) -> None:
        """It serves no more, in whatever thread."""
        self.factors, self.adapted, self.dtype, self.made_from = (), None, None, ()

    def serves(self, dtype: torch.dtype, parameters: Tensors, W: Tensor | None, as_weight: bool) -> bool:
        """Whether it is what would be made now, for a layer with the plain matrix W, or with none.

        Args:
            as_weight: W' is wanted; where nothing is recorded, either is as good.
        """
        if self.dtype is not dtype:
            return False
        recording, is_weight = torch.is_grad_enabled(), self.adapted is not None
        if (recording and not self.recorded) or (is_weight is not as_weight and (recording or as_weight or W is None)):
            return False
        made_of = (*parameters, W) if is_weight and W is not None else parameters
        return unchanged(self.made_from, made_of) and self.stream == stream_of(parameters[0])


class Slot(threading.local):
    """The place for what is prepared for one adapter, in this thread. Copies and pickles of it are empty."""

    prepared: Prepared | None

    def __init__(self) -> None:  # in each thread; a default of the class is all that torch 2.11's compiler would see
        self.prepared = None

    def __reduce__(self) -> Any:
        return Slot, ()


class Pass(Protocol):
    """One forward pass of a model in one thread, or what a backward pass computes again."""

    def prepare_for(self, adapter: Any, dtype: torch.dtype, as_weight: bool) -> None:
        """Fill the slots of all adapters that prepare together with this one, if that was not tried in this pass yet.

        Args:
            as_weight: with W', else with factors.
        """
        ...

    def seed(self, adapter: Any) -> int | None:
        """Of the noise by which W' of this adapter is rounded; None draws it from torch's generator."""
        ...


class Scope(Protocol):
    """A model whose layers prepare together."""

    def recomputation(self) -> Pass:
        """The pass of the backward that is running in this thread."""
        ...


class _Local(threading.local):
    running: Pass | None = None


LOCAL = _Local()
SCOPES: WeakKeyDictionary[Any, ref[Scope]] = WeakKeyDictionary()  # of each adapter that was found in one


def pass_of(adapter: Any) -> Pass | None:
    """The pass that is running in this thread; None where a layer is called by itself."""
    if LOCAL.running is not None:
        adapter.__dict__["alone"] = False  # past nn.Module's slow way to set it
        return LOCAL.running
    if torch._C._current_graph_task_id() == -1:
        adapter.__dict__["alone"] = True
    if adapter.alone:  # and so it is when a checkpoint runs it again
        return None
    scope = SCOPES.get(adapter)  # a checkpoint runs its layers again, which on CUDA happens in a thread of autograd's
    found = None if scope is None else scope()
    return None if found is None else found.recomputation()


def is_transformed() -> bool:
    """Whether somebody looks at, or replaces, every single operation: functorch's transforms, forward-mode derivatives,
    `torch.jit.trace`, dispatch modes (fake tensors, selective checkpoints). Then a pass is plain torch, and shares nothing."""
    return not torch.compiler.is_compiling() and (
        torch._C._len_torch_dispatch_stack() > 0
        or peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )
