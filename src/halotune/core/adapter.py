"""What an adapter is: a map on the weight matrix of one linear operator, `W (out, in) -> W' (out, in)`.

A method says what depends on its parameters alone (`prepare`), and what the map is, given that (`adapt`). `weight(W)` is the
definition; `forward(x, op)` applies the adapted operator, and each of the three kinds below does so at its own price.

| kind | map | price of a forward pass |
|---|---|---|
| `Rotation` | `W' = W Q` | one low-rank product on x (or one of small blocks), base untouched |
| `LowRank` | `W' = W + B A` | two low-rank products, base untouched |
| `Dense` | any `W' = f(W, θ)` | W' is built, used and dropped; built again in backward |

Any of them may be applied as a weight instead: W' of all layers of one shape is then prepared together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from .frozen_linear import low_rank_linear
from .operator import Operator, WeightShape
from .precision import compute_dtype, exact
from .prepared import Slot, is_transformed, pass_of
from .recompute import Preparation, Tensors, prepare
from .weight_form import Rule, weight_form

if TYPE_CHECKING:
    from .config import AdapterConfig


class Adapter(nn.Module, ABC):
    """One adapter on one layer. Its parameters have PEFT's names, so that file keys follow from module paths."""

    scale_free: ClassVar[tuple[str, ...]] = ()  # parameters whose length means nothing: weight decay is wasted on them

    def __init__(self, shape: WeightShape) -> None:
        super().__init__()
        self.shape = shape
        self.slot = Slot()
        self.names: tuple[str, ...] = ()

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

    @abstractmethod
    def adapt(self, W: Tensor, *factors: Tensor) -> Tensor:
        """`W (…, out, in) -> W'`, in the dtype of W, from what was prepared. Leading dimensions are those of the factors."""

    def weight(self, W: Tensor) -> Tensor:
        """The definition: `W (out, in) -> W' (out, in)`, in the dtype of `W`."""
        with exact(W):
            return self.adapt(W, *self.factors_now())

    def factors_now(self) -> Tensors:
        """What `prepare` gives for this adapter."""
        return self.prepare(*self.tensors())

    def tensors(self) -> Tensors:
        """The parameters as they are now: `functional_call`, replicas and sharding put other tensors in their place."""
        if not self.names:
            self.names = tuple([name for name, _ in self.named_parameters()])
        return tuple([_tensor(self, name) for name in self.names])

    # -- what the engine asks

    def start_from(self, op: Operator) -> None:
        """Finish the initialisation with what depends on the weight of the operator, read only where it is needed."""

    def factors(self, W: Tensor) -> tuple[Tensor, Tensor] | None:
        """`B (out, k)`, `A (k, in)` with `weight(W) − W == B A` exactly; None where only a full-rank delta is."""
        return None

    factors_exist: ClassVar[bool] = True

    def delta_rows(self, W: Tensor) -> Iterator[Tensor]:
        """`weight(W) − W`, some rows at a time, top to bottom, in the dtype of the parameters."""
        W = W.to(next(self.parameters()).dtype)
        yield self.weight(W) - W

    def reads_weight(self, op: Operator) -> bool:
        """Whether a forward pass may ask `op` for its weight, which costs a quantized one dequantization."""
        return False

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

    def penalty(self) -> Tensor | None:
        """A term to be added to the loss, or None."""
        return None

    def loading_warning(self) -> str | None:
        """What is wrong with parameters just read from a file though they fit, or None."""
        return None

    @property
    def dropout(self) -> float:
        """The largest chance of any dropout in it; 0 where the forward pass is deterministic."""
        return 0.0

    # -- forward

    def batch_key(self) -> Hashable:
        """Adapters of one class, with parameters of the same shapes and equal keys, prepare alike."""
        return self.shape

    def forward(self, x: Tensor, op: Operator, scale: float = 1.0) -> Tensor:
        """Apply the operator with weight `W + scale (weight(W) − W)`, `W` being that of `op`."""
        x = x.to(compute_dtype(x))
        plain = None
        if scale == 1.0 and not (self.training and self.dropout) and not is_transformed():
            plain = op.plain(x.dtype)
        factors, adapted = self.prepared(x, None if plain is None else plain[0])
        if plain is None:
            return self.run(x, op, factors, scale)
        if adapted is not None:
            return F.linear(x, adapted, plain[1])
        return self.run_plain(x, *plain, *factors)

    def prepared(self, x: Tensor, W: Tensor | None = None) -> tuple[Tensors, Tensor | None]:
        """Factors in the dtype of x; or W', where it was prepared for the plain matrix W.

        What the running pass has prepared for this adapter, if nothing has changed since; else made now.
        """
        dtype = x.dtype
        if torch.compiler.is_compiling():  # the graph is guarded by what is in the slot; the compiler arranges the rest
            ready = self.slot.prepared
            if ready is not None and ready.dtype is dtype and ready.adapted is None and ready.recorded:
                return ready.factors, None
            return usable(self.factors_now(), dtype), None
        if is_transformed():
            return usable(self.factors_now(), dtype), None
        tensors, slot = self.tensors(), self.slot
        ready = slot.prepared
        if ready is not None and ready.serves(dtype, tensors, W):
            return ready.factors, ready.adapted
        if (running := pass_of(self)) is not None:
            running.prepare_for(self, dtype, x.numel() // max(1, x.shape[-1]))
            ready = slot.prepared
            if ready is not None and ready.serves(dtype, tensors, W):
                return ready.factors, ready.adapted
        return prepare(Factors(self, dtype), [tensors])[0], None

    @abstractmethod
    def run(self, x: Tensor, op: Operator, factors: Tensors, scale: float) -> Tensor:
        """`forward` for x in its compute dtype, by operations that autograd sees."""

    @abstractmethod
    def run_plain(self, x: Tensor, W: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
        """`x W'ᵀ + b` for a frozen layer, with nothing dropped, in one autograd node."""


def _tensor(module: Any, name: str) -> Tensor:
    own = module._parameters.get(name)
    if own is not None:
        return own
    for part in name.split("."):
        module = getattr(module, part)
    return module


def usable(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """As kernels want them: in their dtype, and contiguous."""
    return tuple([t.to(dtype, memory_format=torch.contiguous_format).contiguous() for t in tensors])  # `to` alone leaves
    # what has the dtype already


class Factors(Preparation):
    """`Adapter.prepare` for all adapters like this one, cast."""

    def __init__(self, adapter: Adapter, dtype: torch.dtype) -> None:
        self.adapter, self.dtype = adapter, dtype

    def make(self, *stacked: Tensor) -> Tensors:
        return usable(self.adapter.prepare(*stacked), self.dtype)


class Rotation(Adapter):
    """`W' = W Q`: the input is rotated, then meets the base as it is."""

    @abstractmethod
    def rotate(self, x: Tensor, *factors: Tensor) -> Tensor:
        """`x Qᵀ` over the last dimension, in the dtype of `x`."""

    def run(self, x: Tensor, op: Operator, factors: Tensors, scale: float) -> Tensor:
        if not op.shape.is_linear:  # patches of an image cannot be rotated before they are cut
            return self.run_on_patches(x, op, factors, scale)
        rotated = self.rotate(x, *factors)
        return op(rotated if scale == 1.0 else torch.lerp(x, rotated, scale))

    @abstractmethod
    def run_on_patches(self, x: Tensor, op: Operator, factors: Tensors, scale: float) -> Tensor:
        """`run` for a convolution."""


class LowRank(Adapter):
    """`W' = W + B A` with low-rank factors that do not depend on `W`."""

    input_dropout: float = 0.0

    @abstractmethod
    def prepare(self, *parameters: Tensor) -> Tensors:
        """`Bᵀ (…, k, out)` and `A (…, k, in)`; without A, x is folded to k numbers."""

    def low_rank(self, *factors: Tensor) -> tuple[Tensor, Tensor]:
        """`B (…, out, k)`, `A (…, k, in)` from what was prepared, in its dtype."""
        Bt, A = factors
        return Bt.mT, A

    def factors(self, W: Tensor) -> tuple[Tensor, Tensor] | None:
        return self.low_rank(*self.factors_now())

    def adapt(self, W: Tensor, *factors: Tensor) -> Tensor:
        B, A = self.low_rank(*factors)
        return (W + B @ A).to(W.dtype)

    @property
    def dropout(self) -> float:
        return self.input_dropout

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.input_dropout) if self.training and self.input_dropout else x

    def run(self, x: Tensor, op: Operator, factors: Tensors, scale: float) -> Tensor:
        return add_low_rank(x, self.drop(x), op, self.low_rank(*factors), scale)

    def run_plain(self, x: Tensor, W: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
        Q, *A = factors
        return low_rank_linear(x, W, bias, Q, A[0] if A else None)


class Dense(Adapter):
    """Any other map. `W'` is of full size, so it never outlives the product it is built for."""

    @property
    @abstractmethod
    def rule(self) -> Rule:
        """`adapt`, and its gradients."""

    def adapt(self, W: Tensor, *factors: Tensor) -> Tensor:
        return self.rule.define(W, *factors)

    def reads_weight(self, op: Operator) -> bool:
        return True

    def run(self, x: Tensor, op: Operator, factors: Tensors, scale: float) -> Tensor:
        return weight_form(x, op, self.rule, factors, scale)


def add_low_rank(x: Tensor, dropped: Tensor, op: Operator, factors: tuple[Tensor, Tensor], scale: float = 1.0) -> Tensor:
    """`op(x) + scale · (B A) dropped`, for x in its compute dtype."""
    B, A = (t.to(x.dtype) for t in factors)
    return op.add_low_rank(op(x), dropped, B if scale == 1.0 else B * scale, A)
