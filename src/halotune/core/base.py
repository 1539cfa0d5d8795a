"""The layers that can be adapted, each handled once for all methods."""

from __future__ import annotations

from abc import abstractmethod
from collections import ChainMap
from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.parameter import is_lazy

from .errors import HalotuneError
from .offload import is_offloaded, offload_hook, only_places
from .operator import BareOperator, WeightShape
from .sharded_parameters import is_sharded, is_unit, only_shards, store, whole, whole_size
from .trial import agrees, drawn

if TYPE_CHECKING:
    from .adapter import Adapter


class Base(BareOperator):
    """One storage kind of a linear operator: a view of the module, made where it is needed.

    The module is always called as a module, so that its hooks (offload, quantization, tensor parallelism) fire.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    @classmethod
    @abstractmethod
    def matches(cls, module: nn.Module) -> bool: ...

    def __call__(self, x: Tensor) -> Tensor:
        y = self.module(x)
        if not isinstance(y, Tensor):
            raise HalotuneError(
                f"{type(self.module).__name__} {self.shape} returned a {type(y).__name__}, where an adapter needs a tensor. "
                "Leave the layer out with exclude_modules."
            )
        return y

    @property
    def quantization(self) -> str | None:
        """The format of a weight that is stored in few bits; None for floats."""
        return None

    @property
    def parameter(self) -> nn.Parameter:
        """The stored weight, in the module's own layout."""
        return self.module.weight

    @property
    def dtype(self) -> torch.dtype:
        return self.parameter.dtype

    @property
    def device(self) -> torch.device:
        """Where the layer runs."""
        hook = self._offloaded
        return self.parameter.device if hook is None else torch.device(hook.execution_device)

    @property
    def _offloaded(self) -> Any | None:
        """accelerate's hook, where it keeps the weight elsewhere."""
        return offload_hook(self.module) if self.parameter.is_meta else None

    @abstractmethod
    def stored(self, W: Tensor) -> Tensor:
        """The matrix `W` `(out, in)` in the module's own layout."""

    @torch.no_grad()
    def write(self, W: Tensor) -> None:
        """Store the matrix `W` `(out, in)`, rounded to the layer's dtype."""
        if (hook := self._offloaded) is None:
            store(self.parameter, self.stored(W))
        else:
            hook.weights_map = ChainMap({"weight": self.stored(W).to("cpu", self.dtype)}, hook.weights_map)

    @property
    def can_write(self) -> bool:
        """Whether `write` is possible."""
        return True

    @property
    def is_writable_here(self) -> bool:
        """Whether what is written is kept: it would be lost in FSDP1's flat parameters and in ZeRO-3's."""
        weight, view = self.parameter, "weight" in vars(self.module) and not computes_weight(self.module)
        flat = view or hasattr(weight, "_fsdp_flattened") or hasattr(weight, "ds_id")
        return not (flat or (self.quantization and is_sharded(weight)))

    def as_float(self, W: Tensor, dtype: torch.dtype) -> nn.Module:
        """The plain layer with the weight `W (out, in)`, instead of a quantized one that can be read."""
        raise NotImplementedError

    def snapshot(self) -> Any:
        """What `restore` needs to undo a `write` bit for bit."""
        hook = self._offloaded
        return self.parameter.detach().clone() if hook is None else hook.weights_map

    @torch.no_grad()
    def restore(self, snapshot: Any) -> None:
        """Put back what `snapshot` gave, also where the module was offloaded, or brought back, in between."""
        if (hook := self._offloaded) is None:
            store(self.parameter, snapshot if isinstance(snapshot, Tensor) else snapshot["weight"])
        elif isinstance(snapshot, Tensor):
            hook.weights_map = ChainMap({"weight": snapshot.to("cpu")}, hook.weights_map)
        else:
            hook.weights_map = snapshot

    def tensor(self, name: str) -> Any:
        """A tensor of the module; brought to where it runs, if accelerate keeps it elsewhere."""
        own = getattr(self.module, name, None)
        if own is not None and is_sharded(own):
            if own.requires_grad and torch.is_grad_enabled():
                raise HalotuneError(
                    f"{type(self.module).__name__} {self.shape}: its {name} is trained and sharded apart from its adapter, "
                    "which needs it whole, so it would get no gradient. Call fully_shard on the adapted layer, or on its block."
                )
            return whole(own)
        if own is None or not own.is_meta or (hook := offload_hook(self.module)) is None:
            return own
        return hook.weights_map[name].to(hook.execution_device)

    @property
    def takes_weight(self) -> bool:
        # where processes gather the weight for it, each would, whatever the tokens that it has
        gathered = is_sharded(self.parameter) or hasattr(self.parameter, "ds_id")
        return not self.opaque and runs_as_written(self.module) and not gathered

    def is_product(self, *, written: bool = True) -> bool:
        """Whether a call is `W x + c` with the weight that is read. Where the class does not say so, a call is tried.

        Args:
            written: and with any weight that is put in its place, so that one may be merged.
        """
        if not self.opaque and runs_as_written(self.module):
            return True
        return not self.opaque and (self.parameter.is_meta or agrees(self, written))

    @abstractmethod
    def samples(self) -> list[Tensor]:
        """Inputs to try a call with, the same each time."""

    def require_mergeable(self, where: str, as_float: bool = False) -> None:
        """Refuse what is stored in a way that cannot be read or written, or where a call is not a product with it.

        Args:
            where: the layer's name.
            as_float: a float layer will take the place of a quantized one.
        """
        if self.opaque:
            raise HalotuneError(
                f"{where}: {self} can be called, but its weight cannot be read, so nothing can be merged into it. Nothing was "
                "merged. Keep the adapter beside it, or load the base in floats to merge."
            )
        if not self.is_writable_here:
            raise HalotuneError(
                f"{where}: this {type(self.module).__name__} {self.shape} holds a part of its weight, the model being sharded. "
                "Nothing was merged. Save the adapter, and merge it into a base that is not (halotune merge)."
            )
        if is_parametrized(self.module) or not self.is_product():
            raise HalotuneError(
                f"{where}: this {type(self.module).__name__} {self.does_more}, so a merged weight would be lost, or mean "
                "something else. Nothing was merged. Take hooks off, and make the weight a plain parameter first, for "
                "example with torch.nn.utils.parametrize.remove_parametrizations, or keep the adapter beside it."
            )
        if not (as_float or self.can_write):
            raise HalotuneError(
                f"{where}: {self} can be read, but not requantized here. Nothing was merged. Merge with "
                "quantized='keep_float', which puts float layers instead of quantized ones."
            )

    @torch.no_grad()
    def require_known(self, where: str, adapters: Sequence[Adapter]) -> None:
        """Refuse to give the deltas of these adapters as factors, if they depend on a weight that a call does not apply."""
        if self.opaque or self.is_product(written=False):
            return
        for a in adapters:
            unknown = torch.full((self.shape.out_features, self.shape.in_features), torch.nan).to(next(a.parameters()))
            if (found := a.factors(unknown)) is None or not all(torch.isfinite(f).all() for f in found):
                raise HalotuneError(
                    f"{where}: the delta of {type(a).__name__} depends on the weight, and this {type(self.module).__name__} "
                    f"{self.does_more}, so no factors give the same outputs. Keep the adapter as it is."
                )

    def require_stored(self, where: str) -> None:
        """Refuse to put a weight back where it would be computed anew."""
        if not self.quantization and (is_parametrized(self.module) or computes_weight(self.module)):
            raise HalotuneError(
                f"{where}: since adapters were merged into it, this {type(self.module).__name__} {self.does_more}, so its "
                "weight cannot be put back. Undo that first (parametrize.remove_parametrizations, prune.remove …)."
            )

    @property
    def does_more(self) -> str:
        """Why a call is no plain product, for errors."""
        module = self.module
        if is_parametrized(module) or computes_weight(module):
            return (
                "computes its weight from other parameters (weight_norm, spectral_norm, prune, a parametrization, a property)"
            )
        if has_hooks(module):
            return "has hooks that change what goes in, what comes out or its weight"
        return "does more in a forward of its own than multiply by its weight"

    @property
    def transient(self) -> bool:
        """Whether `weight()` makes a new tensor, to be recomputed rather than kept."""
        return self.parameter.is_meta or is_sharded(self.parameter)

    @property
    def bias(self) -> Tensor | None:
        return self.tensor("bias")

    @property
    def hooked(self) -> bool:
        return not runs_as_written(self.module)

    def with_weight(self, x: Tensor, W: Tensor) -> Tensor:
        return self.called_with(x, W) if self.hooked else super().with_weight(x, W)

    def called_with(self, x: Tensor, W: Tensor) -> Tensor:
        """Call the module, its hooks and a forward of its own included, with W in the place of its weight."""
        away = "is offloaded" if is_offloaded(self.module) else "is sharded by itself" if is_unit(self.module) else ""
        if is_parametrized(self.module) or computes_weight(self.module) or away:
            what = away or self.does_more
            raise HalotuneError(
                f"{type(self.module).__name__} {self.shape} {what}, and has hooks or a forward of its own, so it cannot be run "
                "with the weight that an adapter makes. Make the weight a plain parameter in memory, take the hooks off, or "
                "use a method that calls the layer as it is (low-rank deltas and rotations do)."
            )
        return torch.func.functional_call(self.module, {"weight": self.stored(W)}, (x,))

    def add_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self._broadcast(self.bias.to(y))

    def _broadcast(self, bias: Tensor) -> Tensor:
        return bias


class LinearLike(Base):
    """Bases that act on the last dimension of `x`."""

    def samples(self) -> list[Tensor]:
        x = drawn((1, self.shape.in_features))
        return [x, x[None]]  # a forward of its own may want a batch of sequences

    def weight(self) -> Tensor:
        return self.tensor("weight")

    def stored(self, W: Tensor) -> Tensor:
        return W


# Where the forwards are defined that multiply by the weight and do nothing else.
_FORWARDS = {
    "torch.nn.modules.linear",
    "torch.nn.modules.conv",
    "transformers.pytorch_utils",
    "bitsandbytes.nn.modules",
    "hqq.core.quantize",
    "halotune.core.attention",
    "halotune.core.experts",
}


def is_parametrized(module: nn.Module) -> bool:
    """Whether reading the module's weight computes it (`torch.nn.utils.parametrize`)."""
    return "weight" in getattr(module, "parametrizations", ())


def computes_weight(module: nn.Module) -> bool:
    """Whether a hook (`torch.nn.utils.weight_norm`, `spectral_norm`, `prune`) or the class computes the weight."""
    if "weight" in module._parameters or is_parametrized(module) or isinstance(getattr(module, "weight", None), nn.Parameter):
        return False
    return bool(module._forward_pre_hooks) or hasattr(type(module), "weight")


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    )


def runs_as_written(module: nn.Module) -> bool:
    """Whether a call is known to multiply by the weight and do nothing else, but for bringing tensors to their device."""
    kind = type(module)
    if kind.forward.__module__ not in _FORWARDS or kind.__call__ is not nn.Module.__call__:
        return False
    if (has_hooks(module) and not only_shards(module)) or computes_weight(module):
        return False
    if "forward" in module.__dict__ and not (is_offloaded(module) or only_places(module)):
        return False
    conv = getattr(kind, "_conv_forward", None)
    return conv is None or conv.__module__ in _FORWARDS


def _is_float(module: nn.Module) -> bool:
    """Whether the module holds a weight of floats that is there already (a lazy layer's comes with its first input)."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and not is_lazy(weight) and weight.is_floating_point()


class Linear(LinearLike):
    """`torch.nn.Linear` and its subclasses that keep the weight as a float matrix."""

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        if not (isinstance(module, nn.Linear) and _is_float(module)):
            return False
        shape, sizes = module.weight.shape, (module.out_features, module.in_features)
        return len(shape) == 2 and (tuple(shape) == sizes or 0 in shape)  # a sharded one may be empty here

    @property
    def shape(self) -> WeightShape:  # type: ignore[override]
        return WeightShape(self.module.out_features, self.module.in_features)

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None] | None:
        module = self.module
        W, b = module._parameters.get("weight"), module._parameters.get("bias")
        frozen = type(W) is nn.Parameter and not W.requires_grad and (b is None or not b.requires_grad)
        if not frozen or W.dtype is not dtype or W.is_meta or has_hooks(module):
            return None
        if "forward" in module.__dict__ and not only_places(module):
            return None
        kind = type(module)
        usual = kind.forward is nn.Linear.forward and kind.__call__ is nn.Module.__call__
        return (W, b) if usual else None


class TransposedLinear(LinearLike):
    """transformers' `Conv1D`: a linear layer whose weight is stored `(in, out)`."""

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        # By name, so that transformers need not be imported.
        named = any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)
        return named and _is_float(module)

    @property
    def shape(self) -> WeightShape:  # type: ignore[override]
        n_in, n_out = whole_size(self.module.weight)
        return WeightShape(n_out, n_in)

    def weight(self) -> Tensor:
        return self.tensor("weight").t()

    def stored(self, W: Tensor) -> Tensor:
        return W.t()


_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Convolution(Base):
    """`torch.nn.Conv1d`, `Conv2d`, `Conv3d`: stride, dilation, groups and every padding mode."""

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and _is_float(module)

    @property
    def shape(self) -> WeightShape:  # type: ignore[override]
        n_out, *rest = whole_size(self.module.weight)
        return WeightShape(n_out, prod(rest), tuple(self.module.kernel_size), self.module.groups)

    def weight(self) -> Tensor:
        return self.tensor("weight").flatten(1)

    def stored(self, W: Tensor) -> Tensor:
        return W.reshape(whole_size(self.module.weight))

    def samples(self) -> list[Tensor]:
        m = self.module
        size = [m.in_channels, *(2 * d * k for d, k in zip(m.dilation, m.kernel_size, strict=True))]
        return [drawn((1, *size))]

    def _pads_first(self) -> bool:
        return self.module.padding_mode != "zeros" or isinstance(self.module.padding, str)

    def pad(self, x: Tensor) -> Tensor:
        if not self._pads_first():
            return x
        mode = self.module.padding_mode
        return F.pad(x, self.module._reversed_padding_repeated_twice, "constant" if mode == "zeros" else mode)

    def _geometry(self) -> tuple[Any, ...]:
        """stride, padding, dilation, transposed, output padding, groups."""
        m, none = self.module, [0] * len(self.module.kernel_size)
        padding = none if self._pads_first() else m.padding
        return m.stride, padding, m.dilation, False, none, m.groups

    def _broadcast(self, bias: Tensor) -> Tensor:
        return bias.view(-1, *[1] * len(self.module.kernel_size))

    def contract(self, x: Tensor, W: Tensor) -> Tensor:
        return self._convolve(x, self.stored(W))

    def _convolve(self, x: Tensor, kernel: Tensor) -> Tensor:
        stride, padding, dilation, _, _, groups = self._geometry()
        return _CONV[len(stride)](x, kernel, None, stride, padding, dilation, groups)

    def contract_backward(self, x: Tensor, W: Tensor, dy: Tensor, need_x: bool) -> tuple[Tensor | None, Tensor]:
        if x.dim() == self.module.weight.dim() - 1:  # one sample, no batch
            dx, dW = self.contract_backward(x[None], W, dy[None], need_x)
            return (None if dx is None else dx[0]), dW
        dx, dW, _ = torch.ops.aten.convolution_backward(dy, x, self.stored(W), None, *self._geometry(), [need_x, True, False])
        return dx, dW.flatten(1)

    def add_low_rank(self, y: Tensor, x: Tensor, B: Tensor, A: Tensor) -> Tensor:
        """Two small convolutions: every group of channels meets the same `A`, and its own rows of `B`."""
        ones = [1] * len(self.module.kernel_size)
        kernel = A.reshape(A.shape[0], *self.module.weight.shape[1:]).repeat(self.module.groups, 1, *ones)
        z = self._convolve(self.pad(x), kernel)
        pointwise = B.reshape(*B.shape, *ones)
        delta = _CONV[len(ones)](z, pointwise, groups=self.module.groups)
        return y + delta.to(y.dtype)


_KINDS: list[type[Base]] = [Linear, TransposedLinear, Convolution]


def register_base(kind: type[Base]) -> None:
    """Let `kind` be asked first which modules it handles (a quantized layer is often a subclass of `nn.Linear`)."""
    if kind not in _KINDS:
        _KINDS.insert(0, kind)


def base_kind(module: nn.Module) -> type[Base] | None:
    """The kind that handles this module, or None."""
    return next((kind for kind in _KINDS if kind.matches(module)), None)


def base_for(module: nn.Module, name: str = "") -> Base:
    """The view of `module` as a linear operator.

    Raises:
        HalotuneError: for a module that is no linear operator that we know.
    """
    kind = base_kind(module)
    if kind is None:
        where = f"{name!r} is a" if name else "got a"
        raise HalotuneError(
            f"{where} {type(module).__name__}, which cannot be adapted. Supported: torch.nn.Linear, Conv1d, Conv2d, "
            "Conv3d and transformers' Conv1D with floating-point weights. Leave it out with exclude_modules, or train "
            "the module in full with modules_to_save."
        )
    return kind(module)
