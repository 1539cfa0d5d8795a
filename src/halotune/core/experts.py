"""Experts whose weights are three-dimensional parameters of one module, `(experts, out, in)` or `(experts, in, out)`.

transformers' experts interface (`use_experts_implementation`) says how such a module is made: flags for transposed weights,
biases, a gate, a norm; and its own methods for the activation. `experts_forward` is one implementation for all of them: rows
sorted by expert, each projection an operator on groups of rows (`ops/grouped.py`) that adapters act on as on any other.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..ops.grouped import grouped_outer, product_of_each
from .base import LinearLike, register_base
from .errors import HalotuneError
from .grouped_linear import add_low_rank, low_rank_linear
from .layer import AdaptedLayer
from .offload import at_rest, offload_hook
from .operator import BareOperator, WeightShape
from .prepared import exact, is_transformed
from .sharded_parameters import is_sharded, local
from .wrapper import ParameterView, Wrapper

IMPLEMENTATION = "halotune"  # in transformers' registry
_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


def projection_names(module: nn.Module) -> tuple[str, ...]:
    """The weights of a module of experts; () for any other module, and for experts packed in a form of their own."""
    own = vars(module)
    if not all(isinstance(own.get(flag), bool) for flag in _FLAGS):
        return ()
    names = ("gate_up_proj" if own["has_gate"] else "up_proj", "down_proj")
    parameters, computed = module._parameters, getattr(module, "parametrizations", ())
    readable = all(n in computed or (n in parameters and _is_float(parameters[n])) for n in names)
    return names if readable else ()


def _is_float(p: Tensor | None) -> bool:
    return p is not None and p.dim() == 3 and p.is_floating_point() and p.dtype.itemsize > 1


class ExpertWeights(ParameterView):
    """One projection of all experts."""

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.module, f"{self.weight_name}_bias") if self.module.has_bias else None

    @property
    def computed(self) -> Any:
        """What computes the weight anew wherever it is read, as it does one in few bits; None for a plain parameter."""
        return dict(getattr(self.module, "parametrizations", {})).get(self.weight_name)

    @property
    def state(self) -> Any:
        """What bitsandbytes knows of a weight in 4 bits (`shape`, `dtype`, `quant_type`), or None."""
        return None if self.computed is None else getattr(self.computed[0], "quant_state", None)

    @cached_property
    def size(self) -> torch.Size:
        """Of the weight, on all processes; reading it may cost dequantization, and FSDP1 flattens the weight later."""
        return (self.weight if self.state is None else self.state).shape

    @property
    def is_spread(self) -> bool:
        """Whether expert parallelism has given each process experts of its own."""
        return getattr(self.module, "_is_expert_parallel", False)

    @property
    def experts(self) -> int:
        return self.size[0]

    @property
    def here(self) -> int:
        """How many are on this process."""
        return local(self.weight).shape[0] if self.is_spread else self.experts

    def forward(self, x: Tensor, groups: Groups) -> Tensor:
        return GroupedOperator(ExpertsBase(self), groups)(x)


class ExpertsBase(LinearLike):
    """The view of `ExpertWeights` as linear operators of one shape."""

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return isinstance(module, ExpertWeights)

    @property
    def shape(self) -> WeightShape:  # type: ignore[override]
        _, *sizes = self.module.size
        return WeightShape(*(reversed(sizes) if self.module.module.is_transposed else sizes))

    def weight(self) -> Tensor:
        """`(experts, out, in)`: of those that are here, of expert parallelism; else of all."""
        W = self.module.weight
        if W.is_meta:  # accelerate's hook is that of the module of experts
            W = at_rest(self.module.module, self.module.weight_name).to(self.device)
        elif is_sharded(W):
            W = local(W) if self.module.is_spread else super().weight()
        return W.mT if self.module.module.is_transposed else W

    def stored(self, W: Tensor) -> Tensor:
        return W.mT if self.module.module.is_transposed else W

    @property
    def dtype(self) -> torch.dtype:
        return self.parameter.dtype if self.module.state is None else self.module.state.dtype

    @property
    def device(self) -> torch.device:
        stored = self.module.computed
        own = self.parameter if stored is None else next(stored.parameters())
        hook = offload_hook(self.module.module) if own.is_meta else None
        return own.device if hook is None else torch.device(hook.execution_device)

    @property
    def quantization(self) -> str | None:
        return None if self.module.state is None else f"bitsandbytes {self.module.state.quant_type}"

    @property
    def takes_weight(self) -> bool:
        return True  # it is our own code that multiplies

    def is_product(self, *, written: bool = True) -> bool:
        return True

    @property
    def is_writable_here(self) -> bool:
        return not self.module.is_spread and super().is_writable_here

    def require_mergeable(self, where: str, as_float: bool = False) -> None:
        if self.module.computed is not None or self.parameter.is_meta:
            how = "offloaded" if self.module.computed is None else "computed from other parameters (quantized, say)"
            raise HalotuneError(
                f"{where}: the weight of these experts is {how}, so nothing can be written there. Nothing was merged. Load the "
                "base in floats, in memory, or keep the adapter beside it."
            )
        super().require_mergeable(where, as_float)

    def require_known(self, where: str, adapters: Sequence[Any]) -> None:
        if self.module.is_spread:
            raise HalotuneError(
                f"{where}: these experts are spread over processes, and so are their adapters. Save the adapter, and export it "
                "from a model on one process."
            )


register_base(ExpertsBase)


def in_one_node(B: Tensor, A: Tensor) -> bool:
    """Whether a delta with these factors is one: each expert has a B of its own, and an A, unless that is a constant."""
    own = B.dim() == 3 and (A.dim() == 3 or not A.requires_grad)
    return own and not (torch.compiler.is_compiling() or is_transformed())


@dataclass(frozen=True)
class Groups:
    """Rows sorted by expert.

    Attributes:
        ends: where the rows of each expert end, `(experts,)` int32.
        ids: the expert of each row.
        whole: every row has an expert here; else those past the last end have theirs on another process.
    """

    ends: Tensor
    ids: Tensor
    whole: bool = True

    def product(self, x: Tensor, W: Tensor) -> Tensor:
        """`x_i W_e`: `W (experts, k, m)`, or `(k, m)` for all."""
        return product_of_each(x, W, self.ends, self.whole)

    def add_low_rank(self, y: Tensor, x: Tensor, B: Tensor, A: Tensor) -> Tensor:
        """`y_i + B_e A_e x_i`: `B (experts, out, r)`, `A (experts, r, in)`, either or both without experts for all."""
        if y.dtype is not x.dtype or not in_one_node(B, A):
            return y + self.product(self.product(x, A.mT), B.mT)
        return add_low_rank(y, x, A, B, self.ends, 1.0, self.whole)


class GroupedOperator(BareOperator):
    """`x_i -> W_e x_i + b_e` for rows sorted by expert.

    Args:
        part: the experts from one to another; None is all.
    """

    def __init__(self, base: ExpertsBase, groups: Groups, part: slice | None = None) -> None:
        self.base, self.groups, self.experts = base, groups, part

    @property
    def shape(self) -> WeightShape:  # type: ignore[override]
        return self.base.shape

    def part(self, begin: int, end: int, top: int, bottom: int) -> GroupedOperator:
        """On some of the experts, and their rows."""
        groups = Groups(self.groups.ends[begin:end] - top, self.groups.ids[top:bottom])
        return GroupedOperator(self.base, groups, slice(begin, end))

    def __call__(self, x: Tensor) -> Tensor:
        if self.base.module.computed is None:
            return self.add_bias(self.contract(x, self.weight()))
        return self.add_bias(_Computed.apply(x, self))  # type: ignore[arg-type]

    def weight(self) -> Tensor:
        W = self.base.weight()
        return W if self.experts is None else W[self.experts]

    def with_low_rank(self, x: Tensor, B: Tensor, A: Tensor, scale: float = 1.0) -> Tensor | None:
        """`(W_e + s B_e A_e) x_i + b_e`, for B and A that may be finer than x; None where they are no delta in one node."""
        if not in_one_node(B, A):
            return None
        groups = self.groups
        if self.base.module.computed is not None or (W := self.weight()).requires_grad:
            return add_low_rank(self(x), x, A, B, groups.ends, scale, groups.whole)
        return self.add_bias(low_rank_linear(x, A, B, W, groups.ends, scale, groups.whole))

    @property
    def transient(self) -> bool:
        return True

    def contract(self, x: Tensor, W: Tensor) -> Tensor:
        return self.groups.product(x, W.mT)

    def contract_backward(self, x: Tensor, W: Tensor, dy: Tensor, need_x: bool) -> tuple[Tensor | None, Tensor]:
        dW = grouped_outer(dy, x, self.groups.ends)
        return (self.groups.product(dy, W) if need_x else None), dW

    def add_low_rank(self, y: Tensor, x: Tensor, B: Tensor, A: Tensor) -> Tensor:
        return self.groups.add_low_rank(y, x, B, A)

    def add_bias(self, y: Tensor) -> Tensor:
        bias = self.base.bias
        return y if bias is None else y + local(bias)[self.groups.ids].to(y.dtype)


class _Computed(torch.autograd.Function):
    """The product with a weight that is computed where it is read: again in backward, so that none is kept until then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, op: GroupedOperator) -> Tensor:
        ctx.op = op
        return op.contract(x, op.weight().detach())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None]:
        op = ctx.op
        return op.groups.product(grad_outputs[0], op.weight().detach()), None


class AdaptedExpertWeights(AdaptedLayer):
    """Adapters on one projection of all experts."""

    def forward(self, x: Tensor, groups: Groups) -> Tensor:  # type: ignore[override]
        if self.rows is not None:
            raise HalotuneError(
                "adapter_names: experts get the tokens of all samples together, sorted by expert, so that samples cannot be "
                "told apart there. Run the adapters one at a time."
            )
        return self._on(GroupedOperator(cast(ExpertsBase, self.base), groups), self._running_names())(x)


class AdaptedExperts(Wrapper):
    """A module of experts with adapters on its projections, which are children under the names of its parameters."""

    _wraps = "base_layer"

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        for name in projection_names(base_layer):
            setattr(self, name, ExpertWeights(self, name))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_layer(*args, **kwargs)

    def attach(self) -> None:
        """Let the module run by way of `experts_forward`. Its configuration, which others share, stays as it is."""
        own = vars(self.base_layer)
        if "_halotune" not in own:
            config = copy.copy(own["config"])
            own["_halotune"] = self, own["config"]
            internal = "_experts_implementation_internal"  # the property sets it in all configurations inside, too
            vars(config)[internal if internal in vars(config) else "_experts_implementation"] = IMPLEMENTATION
            own["config"] = config

    def detach(self) -> None:
        """The module runs as it did before."""
        own = vars(self.base_layer)
        if "_halotune" in own:
            _, own["config"] = own.pop("_halotune")


def is_experts(module: nn.Module | None) -> bool:
    """Whether it is a module of experts, or one with adapters."""
    return isinstance(module, AdaptedExperts) or (module is not None and bool(projection_names(module)))


def experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The implementation of transformers' experts interface with adapters.

    Args:
        experts: the module, with `AdaptedExperts` around it.
        hidden_states: `(tokens, hidden)`.
        top_k_index: the experts of each token, `(tokens, k)`; ids from `experts` on have theirs on another process.
        top_k_weights: their weights, `(tokens, k)`.

    Returns:
        `(tokens, hidden)`, in the dtype of the hidden states.
    """
    up, down = (getattr(vars(experts)["_halotune"][0], name) for name in projection_names(experts))
    k, n, whole = top_k_index.shape[-1], _weights(up).here, not _weights(up).is_spread
    with exact(hidden_states):  # in the dtype of the weights, as the interface's other implementations
        ids, order = torch.sort(top_k_index.reshape(-1), stable=True)
        ends = torch.searchsorted(ids, torch.arange(n, device=ids.device, dtype=ids.dtype), right=True).int()
        weights = top_k_weights.reshape(-1)[order]
        if not whole:
            weights = weights.masked_fill(ids >= n, 0)
        groups = Groups(ends, ids if whole else ids.clamp(max=n - 1), whole)
        x = up(hidden_states[order // k].to(_dtype(up)), groups)
        x = experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)
        y = down(x, groups)
        if getattr(experts, "has_post_expert_norm", False):
            y = experts.post_expert_norm(y)
        y = (y * weights[:, None])[torch.argsort(order)]
        return y.view(*top_k_index.shape, y.shape[-1]).sum(-2).to(hidden_states.dtype)


def _weights(projection: nn.Module) -> ExpertWeights:
    return cast(ExpertWeights, projection.base_layer if isinstance(projection, AdaptedLayer) else projection)


def _dtype(projection: nn.Module) -> torch.dtype:
    return ExpertsBase(_weights(projection)).dtype
