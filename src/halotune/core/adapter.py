"""What an adapter is: a map on the weight matrix of one linear operator, `W (out, in) -> W' (out, in)`.

`weight(W)` is the definition. `forward(x, op)` applies the adapted operator, and each of the three families below
does so at its own price; all must agree with `weight`.

| family | map | price of a forward pass |
|---|---|---|
| `InputSide` | `W' = W Q` | one thin product on x, base untouched |
| `Additive` | `W' = W + ΔW`, `ΔW = B A` | two thin products, base untouched |
| `WeightSide` | any `W' = f(W, θ)` | W' is built, used and dropped; built again in backward |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from .operator import Operator, WeightShape
from .precision import compute_dtype, exact

if TYPE_CHECKING:
    from .config import AdapterConfig


class Adapter(nn.Module, ABC):
    """One adapter on one layer. Its parameters bear PEFT's names, so that file keys follow from module paths."""

    shape: WeightShape
    scale_free: ClassVar[tuple[str, ...]] = ()  # parameters whose length means nothing: weight decay is wasted on them

    @classmethod
    @abstractmethod
    def create(cls, shape: WeightShape, config: AdapterConfig) -> Self:
        """A new adapter for a weight of this shape, initialised as `config` says."""

    @abstractmethod
    def weight(self, W: Tensor) -> Tensor:
        """The definition: `W (out, in) -> W' (out, in)`, in the dtype of `W`."""

    @abstractmethod
    def forward(self, x: Tensor, op: Operator, scale: float = 1.0) -> Tensor:
        """Apply the operator with weight `W + scale (weight(W) − W)`, `W` being that of `op`."""

    def factors(self, W: Tensor) -> tuple[Tensor, Tensor] | None:
        """`B (out, k)`, `A (k, in)` with `weight(W) − W == B A` exactly; None where only a full-rank delta is."""
        return None

    factors_exist: ClassVar[bool] = True

    @property
    @abstractmethod
    def rank(self) -> int:
        """The configuration's r."""

    @classmethod
    def combined(cls, adapters: Sequence[Self], weights: Sequence[float], how: str, rank: int) -> Self | None:
        """One adapter of this class that equals several exactly, or None where there is none.

        Args:
            how: "linear" adds the weighted deltas; "cat" applies one after the other.
            rank: for "cat": the r of the result, filled up with what does nothing.
        """
        return None

    def penalty(self) -> Tensor | None:
        """A term to be added to the loss, or None."""
        return None

    def complaint(self) -> str | None:
        """What is wrong with parameters just read from a file though they fit, or None."""
        return None

    @property
    def dropout(self) -> float:
        """The largest chance of any dropout in it; 0 where the forward pass is deterministic."""
        return 0.0

    @classmethod
    def prepare(cls, adapters: Sequence[Self]) -> None:
        """Before a forward pass: compute what depends on parameters alone, for adapters of one shape together."""


class InputSide(Adapter):
    """`W' = W Q`: the input is rotated, then meets the base as it is."""

    @abstractmethod
    def rotate(self, x: Tensor, transpose: bool = False) -> Tensor:
        """`x Qᵀ` over the last dimension (`x Q` if `transpose`), in the dtype of `x`."""

    def weight(self, W: Tensor) -> Tensor:
        with exact(W):
            return self.rotate(W, transpose=True)

    def forward(self, x: Tensor, op: Operator, scale: float = 1.0) -> Tensor:
        if not op.shape.is_linear:  # patches of an image cannot be rotated before they are cut
            factors = self.factors(op.weight())
            assert factors is not None
            return add_low_rank(x, x, op, factors, scale)
        x = x.to(compute_dtype(x))
        rotated = self.rotate(x)
        return op(rotated if scale == 1.0 else torch.lerp(x, rotated, scale))


class Additive(Adapter):
    """`W' = W + B A` with thin factors that do not depend on `W`."""

    input_dropout: float = 0.0

    @abstractmethod
    def low_rank(self) -> tuple[Tensor, Tensor]:
        """`B (out, k)`, `A (k, in)`, in the dtype of the parameters or better."""

    def factors(self, W: Tensor) -> tuple[Tensor, Tensor] | None:
        return self.low_rank()

    def weight(self, W: Tensor) -> Tensor:
        B, A = self.low_rank()
        with exact(W):
            return (W + B @ A).to(W.dtype)

    @property
    def dropout(self) -> float:
        return self.input_dropout

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.input_dropout) if self.training and self.input_dropout else x

    def forward(self, x: Tensor, op: Operator, scale: float = 1.0) -> Tensor:
        return add_low_rank(x, self.drop(x), op, self.low_rank(), scale)


class WeightSide(Adapter):
    """Any other map. `W'` is of full size, so it never outlives the product it is built for."""

    @abstractmethod
    def transform(self) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """`(f, θ)` with `weight(W) == f(W, *θ)`; `f` is a pure function."""

    def weight(self, W: Tensor) -> Tensor:
        f, θ = self.transform()
        return f(W, *θ)

    def forward(self, x: Tensor, op: Operator, scale: float = 1.0) -> Tensor:
        return weight_form(x, op, *self.transform(), scale=scale)


def add_low_rank(
    x: Tensor, dropped: Tensor, op: Operator, factors: tuple[Tensor, Tensor], scale: float = 1.0
) -> Tensor:
    """`op(x) + scale · (B A) dropped`."""
    dtype = compute_dtype(x)
    B, A = factors
    if scale != 1.0:
        B = B * scale
    return op.add_low_rank(op(x), dropped.to(dtype), B.to(dtype), A.to(dtype))


def weight_form(x: Tensor, op: Operator, f: Callable[..., Tensor], θ: tuple[Tensor, ...], scale: float = 1.0) -> Tensor:
    """`op` applied to `x` with `W + scale (f(W, *θ) − W)`: the dense form, with nothing of size `W` kept for backward."""
    dtype = compute_dtype(x)
    scaled = f if scale == 1.0 else _Scaled(f, scale)
    x, W = op.pad(x.to(dtype)), op.weight().to(dtype)
    if torch.compiler.is_compiling():  # the compiler decides itself what to keep
        return op.add_bias(op.contract(x, scaled(W, *θ)))
    if op.transient and not W.requires_grad:  # not kept for backward, but made again
        return op.add_bias(_WeightForm.apply(x, None, (op, W), scaled, *θ))
    return op.add_bias(_WeightForm.apply(x, W, (op, W), scaled, *θ))


class _Scaled:
    """`W + s (f(W, θ) − W)`."""

    def __init__(self, f: Callable[..., Tensor], scale: float) -> None:
        self.f, self.scale = f, scale

    def __call__(self, W: Tensor, *θ: Tensor) -> Tensor:
        return torch.lerp(W, self.f(W, *θ), self.scale)


class _WeightForm(torch.autograd.Function):
    """`y = f(W, θ) x`. Backward builds `f(W, θ)` again, forms `G = dyᵀ x` and pulls it back to θ (and W)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kept: Tensor | None, made: tuple[Operator, Tensor], f: Callable[..., Tensor], *θ: Tensor
    ) -> Tensor:
        op, W = made
        ctx.save_for_backward(x, kept, *θ)
        ctx.op, ctx.f = op, f
        return op.contract(x, f(W, *θ))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, kept, *θ = ctx.saved_tensors
        need_x, need_W, _, _, *need_θ = ctx.needs_input_grad
        W = ctx.op.weight().to(x.dtype) if kept is None else kept
        leaves = [t.detach().requires_grad_(need) for t, need in zip((W, *θ), (need_W, *need_θ), strict=True)]
        with torch.enable_grad():
            adapted = ctx.f(*leaves)
        dx, G = ctx.op.contract_backward(x, adapted.detach(), grad_outputs[0], need_x)
        wanted = [t for t in leaves if t.requires_grad]
        found = iter(torch.autograd.grad(adapted, wanted, G) if wanted else ())
        dW, *dθ = [next(found) if t.requires_grad else None for t in leaves]
        return dx, dW, None, None, *dθ
