"""One adapter on a stack of experts: a method's own definition, applied to all of them at once.

The parameters of E adapters lie in one tensor each, `(E, …)`, under the method's own names; or, shared, those of one adapter
serve all experts. What a method says of stacks `(…, out, in)` is all that is used, so that no method knows of experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from .adapter import Adapted, Adapter, usable
from .config import AdapterConfig
from .errors import HalotuneError
from .kinds import LowRank, Rotation
from .operator import Matrix, Operator, WeightShape
from .prepared import Tensors, is_transformed
from .sharded_parameters import is_sharded, local

PART = 256 * 2**20  # bytes of the W' that exist at once where a method has no form but W'


class ExpertAdapter(Adapter):
    """Adapters of one method on the experts of a stack.

    Attributes:
        one: what a single expert's adapter is; its parameters are on the meta device.
        experts: how many there are.
        shared: one adapter serves them all, and its parameters have no dimension of experts.
    """

    one: Adapter

    def __init__(self, one: Adapter, experts: int, shared: bool) -> None:
        super().__init__(one.shape)
        vars(self)["one"] = one  # no submodule: its parameters are not among ours
        self.experts, self.shared = experts, shared
        self.dropout, self.scale_free, self.makes_weight = one.dropout, one.scale_free, one.makes_weight  # type: ignore[misc]
        self.penalized = one.penalized

    @classmethod
    def create(cls, shape: WeightShape, config: AdapterConfig) -> Self:
        raise HalotuneError("an adapter on experts is made of those of single experts: ExpertAdapter.of(create, …).")

    @classmethod
    def of(cls, create: Callable[[], Adapter], experts: int, shared: bool) -> Self:
        """Of adapters that are drawn one by one."""
        first = create()
        alike = shared or any(p.is_meta for p in first.parameters())
        return cls.stacked([first] if alike else [first, *(create() for _ in range(experts - 1))], experts, shared)

    @classmethod
    def stacked(cls, adapters: Sequence[Adapter], experts: int, shared: bool) -> Self:
        """Of the adapters of all experts; or of one."""
        out = cls(copy.deepcopy(adapters[0]).to("meta"), experts, shared)
        for name, _ in adapters[0].named_parameters():
            own = [a.get_parameter(name).detach() for a in adapters]
            t = (
                own[0].clone()
                if shared
                else torch.stack(own)
                if len(own) > 1
                else own[0].expand(experts, *own[0].shape).clone()
            )
            *modules, leaf = name.split(".")
            place: nn.Module = out
            for module in modules:
                if module not in place._modules:
                    place.add_module(module, nn.Module())
                place = place.get_submodule(module)
            place.register_parameter(leaf, nn.Parameter(t))
        return out

    def expert(self, e: int) -> Adapter:
        """The adapter of one expert, with parameters of its own."""
        out = copy.deepcopy(self.one)
        for name, p in self.named_parameters():
            own = p.detach() if self.shared else p.detach()[e]
            path, _, leaf = name.rpartition(".")
            place = out.get_submodule(path)
            (place if isinstance(place, nn.ParameterDict) else place._parameters)[leaf] = nn.Parameter(own.clone())
        return out

    def each(self) -> Iterator[Adapter]:
        """The adapters of all experts; of a shared one, the same again and again."""
        same = self.expert(0) if self.shared else None
        for e in range(self.experts):
            yield same or self.expert(e)

    def tensors(self) -> Tensors:
        return tuple([_Replicated.apply(t) if self.shared and is_sharded(t) else local(t) for t in super().tensors()])

    def distribute(self, mesh: Any) -> None:
        """Keep the parameters of those experts alone that are on this process; shared ones on all of them."""
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        if type(self.one).start_from is not Adapter.start_from:
            raise HalotuneError(
                f"{type(self.one).__name__} starts from the weight of its layer, which expert parallelism has spread over "
                "processes. Make the adapter on one process, save it, and load it here."
            )
        placements = [Replicate() if self.shared else Shard(0)]
        for module in self.modules():
            for name, p in module._parameters.items():
                if p is not None:  # drawn by the first process for all
                    module._parameters[name] = nn.Parameter(distribute_tensor(p.detach(), mesh, placements))

    def part(self, begin: int, end: int) -> Adapter:
        """This adapter on some of the experts."""
        return self if self.shared else _Part.of_experts(self, begin, end)

    # -- the definition: that of the method

    def prepare(self, *parameters: Tensor) -> Tensors:
        return self.one.prepare(*parameters)

    def weight_factors(self, *parameters: Tensor) -> Tensors:
        return self.one.weight_factors(*parameters)

    def adapt(self, W: Tensor, *factors: Tensor) -> Tensor:
        return self.one.adapt(W, *self._for_each(W.shape[0], factors))

    def _for_each(self, experts: int, factors: Sequence[Tensor]) -> Tensors:
        return tuple([t.expand(experts, *t.shape) if self.shared else t for t in factors])

    # -- what the engine asks

    @torch.no_grad()
    def start_from(self, op: Operator) -> None:
        if type(self.one).start_from is Adapter.start_from:
            return
        if self.shared:
            raise HalotuneError(
                f"expert_sharing: {type(self.one).__name__} starts from the weight of its layer, and experts have different "
                "ones. Leave expert_sharing out, so that each expert gets an adapter of its own."
            )
        W = op.weight()
        for e in range(self.experts):
            adapter = self.expert(e)
            adapter.start_from(Matrix(W[e]))
            for own, p in zip(self.parameters(), adapter.parameters(), strict=True):
                own[e] = p

    def factors(self, W: Tensor) -> tuple[Tensor, Tensor] | None:
        """`B (experts, out, k)`, `A (experts, k, in)`."""
        found = [a.factors(W[e]) for e, a in enumerate(self.each())]
        if any(f is None for f in found):
            return None
        B, A = zip(*cast("list[tuple[Tensor, Tensor]]", found), strict=True)
        return torch.stack(B), torch.stack(A)

    @property
    def factors_exist(self) -> bool:
        return self.one.factors_exist

    def reads_weight(self, op: Operator) -> bool:
        return self.one.reads_weight(op)

    def replaces_weight(self, op: Operator) -> bool:
        return self.one.replaces_weight(op)

    @property
    def rank(self) -> int:
        return self.one.rank

    @classmethod
    def combined(cls, adapters: Sequence[Any], weights: Sequence[float], how: str, rank: int) -> Self | None:
        shared = all(a.shared for a in adapters)
        made = []
        for parts in zip(*(a.each() for a in adapters), strict=True):
            if len({type(p) for p in parts}) > 1:
                return None
            made.append(type(parts[0]).combined(parts, weights, how, rank))
            if made[-1] is None or shared:
                break
        return None if None in made else cls.stacked(cast("list[Adapter]", made), adapters[0].experts, shared)

    def penalty(self, *parameters: Tensor) -> Tensor:
        return self.one.penalty(*parameters)

    def loading_warning(self, *parameters: Tensor) -> str | None:
        return self.one.loading_warning(*parameters)

    # -- forward

    def batch_key(self) -> Hashable:
        return type(self.one), self.one.batch_key(), self.experts, self.shared

    def forward(self, x: Tensor, op: Operator, scale: float = 1.0) -> Tensor:
        if is_transformed():
            return self.run(x, op, usable(self.factors_now(), x.dtype), scale)
        y = self._run_unprepared(x, op, scale)
        return self.run(x, op, self.prepared(x).factors, scale) if y is None else y

    def _run_unprepared(self, x: Tensor, op: Operator, scale: float) -> Tensor | None:
        """By way of the parameters as they are, where they are factors already."""
        one = self.one
        if not isinstance(one, LowRank) or isinstance(op, Adapted) or (self.training and one.dropout):
            return None
        if (found := one.parameters_as_factors(*self.tensors())) is None:
            return None
        B, A, s = found
        return cast(Any, op).with_low_rank(x, B, A, scale * s)

    def run(self, x: Tensor, op: Operator, factors: Tensors, scale: float) -> Tensor:
        one = self.one
        one.training = self.training
        if isinstance(one, Rotation):
            if one.training and one.dropout:
                factors = one.drop(*factors)
            groups = cast(Any, op.bare).groups
            rotated = one.rotate(x, *factors) if self.shared else one.rotate_groups(x, groups, *factors)
            return op(rotated if scale == 1.0 else torch.lerp(x, rotated, scale))
        if isinstance(one, LowRank):
            if not isinstance(op, Adapted) and not (one.training and one.dropout):
                B, A = one.low_rank(*factors)
                y = cast(Any, op).with_low_rank(x, B, A, scale)
                if y is not None:
                    return y
            return LowRank.run(one, x, op, factors, scale)  # a method's own way may be for a single layer
        if not one.reads_weight(op):
            return one.run(x, op, factors, scale)
        return self._in_parts(x, op, factors, scale)

    def _in_parts(self, x: Tensor, op: Operator, factors: Tensors, scale: float) -> Tensor:
        """By way of W', of some experts at a time. Where their rows end is asked of the device once."""
        shape, ends = op.bare.shape, cast(Any, op.bare).groups.ends.tolist()
        step = max(1, PART // (shape.out_features * shape.in_features * x.itemsize))
        splits = [t.split(step) for t in self._for_each(len(ends), factors)]
        done: list[Tensor] = []
        top = 0
        for i, begin in enumerate(range(0, len(ends), step)):
            end = min(begin + step, len(ends))
            bottom = ends[end - 1]
            if bottom > top or not (done or end < len(ends)):  # without any row, one part says what depends on what
                own = part_of(op, begin, end, top, bottom)
                done.append(self.one.run(x[top:bottom], own, tuple([t[i] for t in splits]), scale))
            top = bottom
        if top < x.shape[0]:
            done.append(x.new_zeros(x.shape[0] - top, shape.out_features))
        return done[0] if len(done) == 1 else torch.cat(done)

    def run_plain(self, x: Tensor, W: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
        raise AssertionError("a stack of experts is no plain matrix")


class _Part(ExpertAdapter):
    """An adapter on some of a stack's experts; it holds nothing of its own."""

    @classmethod
    def of_experts(cls, whole: ExpertAdapter, begin: int, end: int) -> _Part:
        part = cls.__new__(cls)
        vars(part).update(vars(whole))
        vars(part)["between"] = begin, end
        return part

    def tensors(self) -> Tensors:
        begin, end = vars(self)["between"]
        return tuple([t[begin:end] for t in super().tensors()])

    def forward(self, x: Tensor, op: Operator, scale: float = 1.0) -> Tensor:
        return self.run(x, op, usable(self.factors_now(), x.dtype), scale)


class _Replicated(torch.autograd.Function):
    """What all processes hold, as this one's tensor. Each has the gradient of its own experts' rows: they add up."""

    @staticmethod
    def forward(ctx: Any, p: Any) -> Tensor:
        ctx.mesh, ctx.placements = p.device_mesh, p.placements
        return p.to_local()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        from torch.distributed.tensor import DTensor, Partial

        partial = DTensor.from_local(grad_outputs[0], ctx.mesh, [Partial()], run_check=False)
        return partial.redistribute(ctx.mesh, ctx.placements)


def part_of(op: Operator, begin: int, end: int, top: int, bottom: int) -> Operator:
    """The operator on the experts from `begin` to `end`, whose rows are those from `top` to `bottom`."""
    if isinstance(op, Adapted):
        adapter = cast(ExpertAdapter, op.adapter).part(begin, end)
        return Adapted(part_of(op.inner, begin, end, top, bottom), adapter, op.scale)
    return cast(Any, op).part(begin, end, top, bottom)
