"""What an adapter is: a map on the weight matrix of one linear operator, `W (out, in) -> W' (out, in)`.

`weight(W)` is the definition. `forward(x, op)` applies the adapted operator, and each of the three families below
does so at its own price; all must agree with `weight`.

| family | map | price of a forward pass |
|---|---|---|
| `InputSide` | `W' = W Q` | one small product on x, base untouched |
| `Additive` | `W' = W + ΔW`, `ΔW = B A` | two thin products, base untouched |
| `WeightSide` | any `W' = f(W, θ)` | W' is built, used and dropped; built again in backward |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from .derived import Loan, usable
from .fused import Site, thin_linears
from .operator import Operator, WeightShape
from .precision import compute_dtype, exact

if TYPE_CHECKING:
    from .config import AdapterConfig


class Adapter(nn.Module, ABC):
    """One adapter on one layer. Its parameters bear PEFT's names, so that file keys follow from module paths."""

    scale_free: ClassVar[tuple[str, ...]] = ()  # parameters whose length means nothing: weight decay is wasted on them

    def __init__(self, shape: WeightShape) -> None:
        super().__init__()
        self.shape = shape
        self.loan = Loan()

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

    def complaint(self) -> str | None:
        """What is wrong with parameters just read from a file though they fit, or None."""
        return None

    @property
    def dropout(self) -> float:
        """The largest chance of any dropout in it; 0 where the forward pass is deterministic."""
        return 0.0

    # -- what forward needs of the parameters

    @abstractmethod
    def derive(self, *θ: Tensor) -> tuple[Tensor, ...]:
        """What depends on the parameters alone, in fp32 or better.

        Args:
            θ: in the order of `parameters()`, all with the same leading dimensions: layers of one shape go together.
        """

    def kin(self) -> Hashable:
        """Adapters of one class, with parameters of the same shapes and equal `kin`, derive alike."""
        return self.shape

    def derived(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """What `derive` gives for this adapter, in `dtype`: as lent for this forward pass, or computed now."""
        lent = self.loan.take(dtype)
        return tuple(usable(t, dtype) for t in self.exact()) if lent is None else lent

    def family(self) -> Hashable:
        """Adapters with equal families, on layers that are given the same input, may be siblings; None: never."""
        return None

    stacked: ClassVar[bool] = False  # what is derived for siblings is wanted as one tensor (s, …)

    def on_plain(
        self, sites: Sequence[Site], stack: tuple[Tensor, ...] | None = None
    ) -> Callable[[Tensor], tuple[Tensor, ...]] | None:
        """The forward passes over frozen layers with this adapter and its siblings, as one call on the x of all; or None.

        Args:
            stack: if `stacked`: what was derived for all of them. One site may come without, and with its own instead.
        """
        return None

    def may_be_plain(self) -> bool:
        """Whether nothing is dropped, so that `on_plain` is the whole of the forward pass."""
        return not (self.training and self.dropout)

    def quick(self, plain: tuple[Tensor, Tensor | None] | None, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
        """The forward pass over one frozen layer as one call on x in the dtype of W, or None."""
        if plain is None or not self.may_be_plain():
            return None
        call = self.on_plain([Site(*plain, self.derived(dtype))])
        return None if call is None else lambda x: call(x)[0]

    def exact(self) -> tuple[Tensor, ...]:
        """What `derive` gives for this adapter."""
        return self.derive(*self.parameters())


class InputSide(Adapter):
    """`W' = W Q`: the input is rotated, then meets the base as it is."""

    @abstractmethod
    def rotate(self, x: Tensor, *derived: Tensor, transpose: bool = False) -> Tensor:
        """`x Qᵀ` over the last dimension (`x Q` if `transpose`), from what was derived, in the dtype of `x`."""

    def thin(self, W: Tensor, *derived: Tensor) -> tuple[Tensor, Tensor] | None:
        """`B (out, k)`, `A (k, in)` with `W Q − W == B A`, from what was derived; None where Q − I has full rank."""
        return None

    def factors(self, W: Tensor) -> tuple[Tensor, Tensor] | None:
        return self.thin(W, *self.exact()) if self.factors_exist else None

    def drop(self, *derived: Tensor) -> tuple[Tensor, ...]:
        """What was derived, with a random part of the rotation left out in training."""
        return derived

    def rotated(self, W: Tensor, *derived: Tensor) -> Tensor:
        """`W Q`."""
        return self.rotate(W, *derived, transpose=True)

    def weight(self, W: Tensor) -> Tensor:
        with exact(W):
            return self.rotated(W, *(t.to(W.dtype) for t in self.exact()))

    def reads_weight(self, op: Operator) -> bool:
        return not op.shape.is_linear

    def forward(self, x: Tensor, op: Operator, scale: float = 1.0) -> Tensor:
        x = x.to(compute_dtype(x))
        quick = self.quick(op.plain(x.dtype), x.dtype) if scale == 1.0 else None
        if quick is not None:
            return quick(x)
        derived = self.drop(*self.derived(x.dtype))
        if op.shape.is_linear:
            rotated = self.rotate(x, *derived)
            return op(rotated if scale == 1.0 else torch.lerp(x, rotated, scale))
        if not self.factors_exist:  # patches of an image cannot be rotated before they are cut
            return weight_form(x, op, self.rotated, derived, scale)
        W = op.weight().to(x.device)  # offloaded weights may be elsewhere
        return add_low_rank(x, x, op, self.thin(W, *derived), scale)  # type: ignore[arg-type]


class Additive(Adapter):
    """`W' = W + B A` with thin factors that do not depend on `W`."""

    input_dropout: float = 0.0

    @abstractmethod
    def derive(self, *θ: Tensor) -> tuple[Tensor, ...]:
        """`Bᵀ (…, k, out)` and `A (…, k, in)`; without A, x is folded to k numbers."""

    def thin(self, *derived: Tensor) -> tuple[Tensor, Tensor]:
        """`B (out, k)`, `A (k, in)` from what was derived, in its dtype."""
        Bt, A = derived
        return Bt.mT, A

    def factors(self, W: Tensor) -> tuple[Tensor, Tensor] | None:
        return self.thin(*self.exact())

    def weight(self, W: Tensor) -> Tensor:
        B, A = self.thin(*self.exact())
        with exact(W):
            return (W + B @ A).to(W.dtype)

    @property
    def dropout(self) -> float:
        return self.input_dropout

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.input_dropout) if self.training and self.input_dropout else x

    def forward(self, x: Tensor, op: Operator, scale: float = 1.0) -> Tensor:
        x = x.to(compute_dtype(x))
        quick = self.quick(op.plain(x.dtype), x.dtype) if scale == 1.0 else None
        return add_low_rank(x, self.drop(x), op, self.thin(*self.derived(x.dtype)), scale) if quick is None else quick(x)

    def family(self) -> Hashable:
        return type(self)

    def on_plain(
        self, sites: Sequence[Site], stack: tuple[Tensor, ...] | None = None
    ) -> Callable[[Tensor], tuple[Tensor, ...]] | None:
        flat = [t for W, bias, (Bt, *A) in sites for t in (W, bias, Bt, A[0] if A else None)]
        return lambda x: thin_linears(x, len(sites), *flat)


class WeightSide(Adapter):
    """Any other map. `W'` is of full size, so it never outlives the product it is built for."""

    @abstractmethod
    def transform(self) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """`(f, θ)` with `weight(W) == f(W, *θ)`; `f` is a pure function."""

    def weight(self, W: Tensor) -> Tensor:
        f, θ = self.transform()
        return f(W, *θ)

    def reads_weight(self, op: Operator) -> bool:
        return True

    def forward(self, x: Tensor, op: Operator, scale: float = 1.0) -> Tensor:
        x = x.to(compute_dtype(x))
        quick = self.quick(op.plain(x.dtype), x.dtype) if scale == 1.0 else None
        return weight_form(x, op, *self.transform(), scale=scale) if quick is None else quick(x)


def add_low_rank(x: Tensor, dropped: Tensor, op: Operator, factors: tuple[Tensor, Tensor], scale: float = 1.0) -> Tensor:
    """`op(x) + scale · (B A) dropped`, for x in its compute dtype."""
    B, A = (t.to(x.dtype) for t in factors)
    return op.add_low_rank(op(x), dropped, B if scale == 1.0 else B * scale, A)


def weight_form(x: Tensor, op: Operator, f: Callable[..., Tensor], θ: tuple[Tensor, ...], scale: float = 1.0) -> Tensor:
    """`op` applied to `x` with `W + scale (f(W, *θ) − W)`: the dense form, with nothing of size `W` kept for backward."""
    dtype = compute_dtype(x)
    scaled = f if scale == 1.0 else _Scaled(f, scale)
    x = x.to(dtype)
    W = op.weight().to(x)  # the device too: it may be offloaded
    if torch.compiler.is_compiling() or op.hooked:  # the compiler decides itself what to keep; hooks see a plain call
        return op.with_weight(x, scaled(W, *θ))
    x = op.pad(x)
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
        W = ctx.op.weight().to(x) if kept is None else kept
        leaves = [t.detach().requires_grad_(need) for t, need in zip((W, *θ), (need_W, *need_θ), strict=True)]
        with torch.enable_grad():
            adapted = ctx.f(*leaves)
        dx, G = ctx.op.contract_backward(x, adapted.detach(), grad_outputs[0], need_x)
        wanted = [t for t in leaves if t.requires_grad]
        found = iter(torch.autograd.grad(adapted, wanted, G) if wanted else ())
        dW, *dθ = [next(found) if t.requires_grad else None for t in leaves]
        return dx, dW, None, None, *dθ
