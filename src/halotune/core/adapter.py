"""What an adapter is: a map on the weight matrix of one linear operator, `W (out, in) -> W' (out, in)`.

A method says what depends on its parameters alone (`prepare`), and what the map is, given that (`adapt`). `weight(W)` is the
definition; `forward(x, op)` applies the adapted operator, and each of three kinds does so at its own price (`core/kinds.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from ..ops.rounding import DROPPED, Dither, rounded
from .base import has_hooks
from .operator import BareOperator, Operator, WeightShape
from .prepared import (
    Form,
    Preparation,
    Prepared,
    Slot,
    Tensors,
    compute_dtype,
    exact,
    is_transformed,
    is_weight,
    pass_of,
    prepare,
)
from .sharded_parameters import let_gather_inside
from .weight_form import Defined
from .weight_shard import Axis, Shard

if TYPE_CHECKING:
    from .config import AdapterConfig


class Adapter(nn.Module, ABC):
    """One adapter on one layer. Its parameters have PEFT's names, so that file keys follow from module paths."""

    scale_free: ClassVar[tuple[str, ...]] = ()  # parameters whose length means nothing: weight decay is wasted on them

    def __init__(self, shape: WeightShape) -> None:
        super().__init__()
        self.shape = shape
        self.slot = Slot()
        self.paths: tuple[tuple[list[str], str], ...] = ()  # of the parameters: modules, and a name
        self.form: Form = "activations"
        self.dropout = 0.0  # the largest chance of any dropout in it; at 0 the forward pass is deterministic

    @classmethod
    @abstractmethod
    def create(cls, shape: WeightShape, config: AdapterConfig) -> Self:
        """A new adapter for a weight of this shape, initialised as `config` says."""

    # -- the definition

    @abstractmethod
    def prepare(self, *parameters: Tensor) -> Tensors:
        """What depends on the parameters alone, in fp32 or better: pure, and differentiable twice.

        Args:
            parameters: in the order of `parameters()`, all with the same leading dimensions: layers of one shape go together.
        """

    def weight_factors(self, *parameters: Tensor) -> Tensors:
        """As `prepare`: what `adapt` needs, where that is something else."""
        return self.prepare(*parameters)

    @abstractmethod
    def adapt(self, W: Tensor, *factors: Tensor) -> Tensor:
        """`W (…, out, in) -> W'`, in the dtype of W, from `weight_factors`. Leading dimensions are those of the factors."""

    def weight(self, W: Tensor, *parameters: Tensor) -> Tensor:
        """The definition: `W (out, in) -> W' (out, in)`, in the dtype of `W`.

        Args:
            parameters: as they were in a forward pass; none are those of now.
        """
        with exact(W):
            return self.adapt(W, *self.made("weight_factors", parameters or self.tensors()))

    weight.requires_grad = False  # type: ignore[attr-defined]  # peft's policy for FSDP1 takes it for a parameter of a leaf

    def build(self, W: Tensor, *factors: Tensor, noise: Tensor | None = None, again: bool = False) -> Tensor:
        """`adapt` without gradients, by a kernel where one wins.

        Args:
            noise: round W' stochastically by this noise (`ops/rounding.py`); None rounds to nearest.
            again: it was built before, and is built once more in backward.
        """
        return rounded(self.adapt, noise, W, *factors)

    def pull(self, G: Tensor, W: Tensor, *factors: Tensor) -> Sequence[Tensor | None]:
        """The gradients of the factors from `G = dL/dW'`, which may be overwritten."""
        return Defined(self, W).pull(factors, (G,))

    def factors_now(self) -> Tensors:
        """What `prepare` gives for this adapter."""
        return self.made("prepare", self.tensors())

    def tensors(self) -> Tensors:
        """The parameters as they are now: `functional_call`, replicas and sharding put other tensors in their place."""
        if not self.paths:
            names = [name.split(".") for name, _ in self.named_parameters()]
            self.paths = tuple([(name[:-1], name[-1]) for name in names])
        found = []
        for modules, name in self.paths:
            owner: Any = self
            for module in modules:
                owner = owner._modules[module]
            own = owner._parameters.get(name)
            found.append(getattr(owner, name) if own is None else own)  # a replica's, a flat parameter's view: no parameter
        return tuple(found)

    # -- a shard of it (`core/weight_shard.py`)

    shard: Shard | None = None  # of the layer, where others lie in other processes
    whole: Adapter | None = None  # what a `here` is the shard of

    @property
    def here(self) -> Adapter:
        """What runs on the layer's shard: the same parameters, and the shape of the shard."""
        if (shard := self.shard) is None or self.whole is not None:
            return self
        part = object.__new__(type(self))
        vars(part).update(self.__dict__, shape=shard.shape, whole=self)
        return part

    def made(self, how: str, parameters: Tensors) -> Tensors:
        """What `prepare`, or `weight_factors`, makes of these parameters; on a shard, its part of that."""
        if (whole := self.whole) is None or (shard := self.shard) is None:
            return getattr(self, how)(*parameters)
        return self.cut(shard, *getattr(whole, how)(*shard.shared(parameters)))

    axes: ClassVar[tuple[tuple[Axis, int], ...]]  # of factors: the dimension that runs along rows ("out") or columns of W
    side: int = 1  # how many rows or columns one entry along that dimension stands for

    def cut(self, shard: Shard, *factors: Tensor) -> Tensors:
        """The entries of factors of the whole layer that belong to the shard. Leading dimensions are kept."""
        return shard.cut_all(factors, self.axes, self.side)

    def unit(self, axis: Axis) -> int:
        """How many consecutive rows ("out") or columns ("in") of a weight must be in one shard; 0 for all."""
        return 1

    def total(self, axis: Axis, z: Tensor) -> Tensor:
        """A product that sums over the inputs or outputs that lie here, summed over all."""
        return z if self.whole is None or self.shard is None else self.shard.total(axis, z)

    def cut_mask(self, axis: Axis, mask: Tensor, dim: int) -> Tensor:
        """What lies here of a mask for the whole layer: it is drawn whole, so that generators in all processes stay alike."""
        return mask if self.whole is None or self.shard is None else self.shard.cut(axis, mask, dim, self.side)

    @property
    def whole_shape(self) -> WeightShape:
        return self.shape if self.whole is None else self.whole.shape

    fsdp_unit: Any = None  # that gathers it for whole passes, not by the hooks that FSDP2 puts on each adapter

    # -- what the engine asks

    def start_from(self, op: Operator) -> None:
        """Finish the initialisation with what depends on the weight of the operator, read only where it is needed."""

    def factors(self, W: Tensor) -> tuple[Tensor, Tensor] | None:
        """`B (out, k)`, `A (k, in)` with `weight(W) − W == B A` exactly; None where only a full-rank delta is."""
        return None

    @property
    def factors_exist(self) -> bool:
        return type(self).factors is not Adapter.factors

    def reads_weight(self, op: Operator) -> bool:
        """Whether a forward pass may ask `op` for its weight, which costs a quantized one dequantization."""
        return False

    def replaces_weight(self, op: Operator) -> bool:
        """Whether a forward pass runs `op` with another weight, having no other form."""
        return self.reads_weight(op)

    @property
    @abstractmethod
    def rank(self) -> int:
        """The configuration's r."""

    @classmethod
    def combined(cls, adapters: Sequence[Any], weights: Sequence[float], how: str, rank: int) -> Self | None:
        """One adapter of this class that equals several exactly, or None where there is none.

        Args:
            how: "linear" adds the weighted deltas; "cat" applies one after the other.
            rank: for "cat": the r of the result, filled up with what does nothing.
        """
        return None

    penalized: Hashable = None  # what tells its penalty from another; None where there is none

    def penalty(self, *parameters: Tensor) -> Tensor:
        """A term to be added to the loss: of one or, stacked, the sum over several alike, in the order of `parameters()`."""
        raise NotImplementedError

    def loading_warning(self, *parameters: Tensor) -> str | None:
        """What is wrong with parameters just read from a file though they fit, or None. They may be sharded."""
        return None

    # -- forward

    alone = False  # whether its layer ran last outside of any pass

    def batch_key(self) -> Hashable:
        """Adapters of one class, with parameters of the same shapes and equal keys, prepare alike."""
        return self.shape

    def forward(self, x: Tensor, op: Operator, scale: float = 1.0) -> Tensor:
        """Apply the operator with weight `W + scale (weight(W) − W)`, `W` being that of `op`."""
        if (dtype := compute_dtype(x)) is not x.dtype:
            x = x.to(dtype)
        if is_transformed():
            return self.run(x, op, usable(self.factors_now(), dtype), scale)
        if scale != 1.0 or (self.training and self.dropout) or (plain := op.plain(dtype)) is None:
            return self.run(x, op, self.prepared(x).factors, scale)
        W, bias = plain
        ready = self.prepared(x, W)
        if ready.adapted is not None:
            return F.linear(x, ready.adapted, bias)
        return self.run_plain(x, W, bias, *ready.factors)

    def prepared(self, x: Tensor, W: Tensor | None = None) -> Prepared:
        """Factors in the dtype of x; or W' for the plain matrix W.

        What the running pass has prepared for this adapter, if nothing has changed since; else made now.
        """
        dtype, slot = x.dtype, self.slot
        if torch.compiler.is_compiling():  # the graph is guarded by what is in the slot; the compiler arranges the rest
            ready = slot.prepared
            if ready is None or ready.dtype is not dtype or ready.adapted is not None or not ready.recorded:
                ready = Prepared(usable(self.factors_now(), dtype), None, dtype, True)
            return ready
        tensors, ready = self.tensors(), slot.prepared
        as_weight = W is not None and is_weight(self.form, self.makes_weight, x, self.whole_shape)
        if ready is not None and ready.serves(dtype, tensors, W, as_weight):
            return ready
        whole = self.whole or self
        if (running := pass_of(whole)) is not None:
            running.prepare_for(whole, dtype, as_weight)
            if (ready := slot.prepared) is not None and ready.serves(dtype, tensors, W, as_weight):
                return ready
        if as_weight and W is not None:
            made = prepare(Weights(self, dtype, [W], self.dither(dtype)), [tensors])[0]
            return Prepared((), made[0], dtype, True)
        return Prepared(prepare(self.prepares(dtype), [tensors])[0], None, dtype, True)

    def prepares(self, dtype: torch.dtype) -> Factors:
        """What makes the factors of all adapters like this one."""
        return Factors(self.whole or self, dtype, self.dither(dtype) if self.makes_weight else None)

    def dither(self, dtype: torch.dtype) -> Dither | None:
        """By what W' of this dtype is rounded stochastically: in half precision in training, not in evaluation.

        A pass has a seed of its own for it, from before its first layer: what a checkpoint runs again then gets the same
        noise, and the generator that gives it dropout's masks is left as it was.
        """
        if dtype not in DROPPED or not self.training or torch.compiler.is_compiling():
            return None
        whole = self.whole or self
        running = None if is_transformed() else pass_of(whole)
        return Dither(None if running is None else running.seed(whole))

    @abstractmethod
    def run(self, x: Tensor, op: Operator, factors: Tensors, scale: float) -> Tensor:
        """`forward` for x in its compute dtype, by operations that autograd sees."""

    @abstractmethod
    def run_plain(self, x: Tensor, W: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
        """`x W'ᵀ + b` for a frozen layer, with nothing dropped, in one autograd node."""

    makes_weight: ClassVar[bool] = False  # W' is made for every call where it is not prepared


def usable(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """As kernels want them: in their dtype, and contiguous."""
    return tuple([t.to(dtype, memory_format=torch.contiguous_format).contiguous() for t in tensors])  # `to` alone leaves
    # what has the dtype already


class Factors(Preparation):
    """`Adapter.prepare` for all adapters like this one, cast; with a dither by chance."""

    def __init__(self, adapter: Adapter, dtype: torch.dtype, dither: Dither | None = None) -> None:
        self.adapter, self.dtype, self.dither = adapter, dtype, dither
        self.keeps = dither is None

    def make(self, *stacked: Tensor) -> Tensors:
        made = self.adapter.here.made("prepare", stacked)
        if self.dither is None or torch.is_grad_enabled():  # gradients are those of a plain cast
            return usable(made, self.dtype)
        return self.dither.round(made, self.dtype)


class Weights(Preparation):
    """W' for all adapters like this one, on plain matrices; with a dither rounded by chance."""

    def __init__(self, adapter: Adapter, dtype: torch.dtype, matrices: Sequence[Tensor], dither: Dither | None = None) -> None:
        self.adapter, self.dtype, self.matrices, self.dither = adapter, dtype, matrices, dither
        self.versions = [W._version for W in matrices]

    def part(self, rows: Sequence[int]) -> Weights:
        return Weights(self.adapter, self.dtype, [self.matrices[i] for i in rows])

    def _stacked(self) -> Tensor:
        if [W._version for W in self.matrices] != self.versions:
            raise RuntimeError("a base weight was modified in place between the forward pass and its backward.")
        return torch.stack(list(self.matrices))

    def make(self, *stacked: Tensor) -> Tensors:
        W, made = self._stacked(), self.adapter.made("weight_factors", stacked)
        if torch.is_grad_enabled():  # a second derivative is recorded
            return (self.adapter.adapt(W, *usable(made, self.dtype)),)
        if self.adapter.makes_weight:  # from factors in the dtype of W, as when it is made layer by layer
            made = usable(made, self.dtype) if self.dither is None else self.dither.round(made, self.dtype)
        noise = None if self.dither is None else self.dither.noise(0, W)
        return (self.adapter.build(W, *made, noise=noise),)

    def pull(self, stacked: Tensors, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        (G,) = grads
        if torch.is_grad_enabled() or G is None:
            return super().pull(stacked, grads)
        leaves = [t.detach().requires_grad_() for t in stacked]
        with torch.enable_grad():
            factors = usable(self.adapter.made("weight_factors", tuple(leaves)), self.dtype)
        pulled = self.adapter.pull(G, self._stacked(), *[t.detach() for t in factors])
        return torch.autograd.grad(factors, leaves, pulled, allow_unused=True)


class Adapted(Operator):
    """An operator with one adapter on it. Chains of these are several adapters: `W -> F2(F1(W))`."""

    parameters: Tensors = ()  # that the weight was made of first: in backward the adapter may hold others

    def __init__(self, inner: Operator, adapter: Adapter, scale: float = 1.0) -> None:
        self.inner, self.adapter, self.scale = inner, adapter, scale

    @property
    def bare(self) -> BareOperator:
        return self.inner.bare

    def __call__(self, x: Tensor) -> Tensor:
        adapter = self.adapter
        if not has_hooks(adapter):
            return adapter.forward(x, self.inner, self.scale)
        if (unit := adapter.fsdp_unit) is not None:
            if not torch.compiler.is_compiling():
                unit.gather()  # where the layer is called outside of any pass
            return adapter.forward(x, self.inner, self.scale)
        let_gather_inside(adapter)
        return adapter(x, self.inner, self.scale)  # ZeRO-3's hooks gather the parameters of a module that is called

    def weight(self) -> Tensor:
        W = self.inner.weight().to(next(self.adapter.parameters()).device)  # offloaded weights may be elsewhere
        self.parameters = self.parameters or self.adapter.tensors()
        adapted = self.adapter.weight(W, *self.parameters)
        return adapted if self.scale == 1.0 else torch.lerp(W, adapted, self.scale)

    @property
    def transient(self) -> bool:
        return True
