"""An operator applied with another weight, of which nothing of the size of W is kept for backward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .frozen_linear import flattened, unflattened
from .precision import compute_dtype
from .prepared import is_transformed
from .recompute import Preparation, Tensors

if TYPE_CHECKING:
    from .operator import Operator


class Rule(ABC):
    """A map `W -> W'` with parameters θ, and the way back."""

    @abstractmethod
    def define(self, W: Tensor, *θ: Tensor) -> Tensor:
        """The definition, by operations that autograd sees: `W' (…, out, in)`, in the dtype of W."""

    def build(self, W: Tensor, *θ: Tensor) -> Tensor:
        """`define` by a kernel, where one wins."""
        return self.define(W, *θ)

    def rebuild(self, W: Tensor, *θ: Tensor) -> Tensor:
        """`build` once more, in backward, by calls that say so (`Op.again`)."""
        return self.build(W, *θ)

    def pull(self, G: Tensor, W: Tensor, *θ: Tensor) -> Sequence[Tensor | None]:
        """The gradients of θ from `G = dL/dW'`, which may be overwritten."""
        return _Defined(self, W).pull(θ, (G,))


class _Defined(Preparation):
    """The definition as a function of θ; without a W, of W and θ."""

    def __init__(self, rule: Rule, W: Tensor | None) -> None:
        self.rule, self.W = rule, W

    def make(self, *stacked: Tensor) -> Tensors:
        return (self.rule.define(*stacked) if self.W is None else self.rule.define(self.W, *stacked),)


class Scaled(Rule):
    """`W + s (W' − W)`."""

    def __init__(self, rule: Rule, s: float) -> None:
        self.rule, self.s = rule, s

    def define(self, W: Tensor, *θ: Tensor) -> Tensor:
        return torch.lerp(W, self.rule.define(W, *θ), self.s)


class Matrix:
    """A plain matrix as an operator, for `weight_form_linear`."""

    @staticmethod
    def contract(x: Tensor, W: Tensor) -> Tensor:
        return F.linear(x, W)

    @staticmethod
    def contract_backward(x: Tensor, W: Tensor, dy: Tensor, need_x: bool) -> tuple[Tensor | None, Tensor]:
        dy2 = flattened(dy)
        return (unflattened(torch.mm(dy2, W), dy) if need_x else None), torch.mm(dy2.t(), flattened(x))


class _WeightForm(torch.autograd.Function):
    """`y = W' x (+ b)`, `W' = rule(W, θ)`. Backward builds W' again, forms `G = dyᵀ x` and pulls it back to θ (and W)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kept: Tensor | None, bias: Tensor | None, given: tuple[Any, Tensor], rule: Rule, *θ: Tensor
    ) -> Tensor:
        op, W = given
        ctx.save_for_backward(x, kept, *θ)
        ctx.op, ctx.rule = op, rule
        adapted = rule.build(W, *θ)
        if op is Matrix:
            return unflattened(F.linear(flattened(x), adapted, bias), x)
        y = op.contract(x, adapted)
        return torch.ops.aten._unsafe_view(y, y.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, W, *θ = ctx.saved_tensors
        need_x, need_W, *_ = ctx.needs_input_grad
        if W is None:
            W = ctx.op.weight().to(x)
        recorded = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        adapted = (ctx.rule.define if recorded else ctx.rule.rebuild)(W, *θ)
        dx, G = ctx.op.contract_backward(x, adapted, grad_outputs[0], need_x)
        dW = None
        if need_W:
            dW, *dθ = _Defined(ctx.rule, None).pull((W, *θ), (G,))
        else:
            dθ = ctx.rule.pull(G, W, *θ)
        return dx, dW, None, None, None, *dθ


def weight_form(x: Tensor, op: Operator, rule: Rule, θ: Tensors, scale: float = 1.0) -> Tensor:
    """`op` applied to `x` with `W + scale (W' − W)`."""
    rule = rule if scale == 1.0 else Scaled(rule, scale)
    x = x.to(compute_dtype(x))
    W = op.weight().to(x)  # the device too: it may be offloaded
    if torch.compiler.is_compiling() or op.hooked or is_transformed():
        return op.with_weight(x, rule.define(W, *θ))
    x = op.pad(x)
    kept = None if op.transient and not W.requires_grad else W  # what is made for a call is made again, not kept
    return op.add_bias(_WeightForm.apply(x, kept, None, (op, W), rule, *θ))  # type: ignore[arg-type]


def weight_form_linear(x: Tensor, W: Tensor, bias: Tensor | None, rule: Rule, *θ: Tensor) -> Tensor:
    """`x W'ᵀ + b` for a frozen matrix W. W' is built, used and dropped, in forward and again in backward."""
    if torch.is_grad_enabled():
        return _WeightForm.apply(x, W, bias, (Matrix, W), rule, *θ)  # type: ignore[return-value]
    return F.linear(x, rule.build(W, *θ), bias)
