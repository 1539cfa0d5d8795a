"""The layers that can be adapted, each handled once for all methods."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import HalotuneError
from .offload import Overlay, is_offloaded, offload_hook
from .operator import Operator, WeightShape, add_to
from .weight_form import Matrix


class Base(Operator):
    """One storage kind of a linear operator: a view of the module, made where it is needed.

    The module is always called as a module, so that its hooks (offload, quantization, tensor parallelism) fire.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    @classmethod
    @abstractmethod
    def matches(cls, module: nn.Module) -> bool: ...

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x)

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
        hook = offload_hook(self.module) if self.parameter.is_meta else None
        return self.parameter.device if hook is None else torch.device(hook.execution_device)

    @abstractmethod
    def stored(self, W: Tensor) -> Tensor:
        """The matrix `W` `(out, in)` in the module's own layout."""

    @torch.no_grad()
    def write(self, W: Tensor) -> None:
        """Store the matrix `W` `(out, in)`, rounded to the layer's dtype."""
        hook = offload_hook(self.module) if self.parameter.is_meta else None
        if hook is None:
            self.parameter.copy_(self.stored(W))
        else:
            hook.weights_map = Overlay({"weight": self.stored(W).to("cpu", self.dtype)}, hook.weights_map)

    @property
    def can_write(self) -> bool:
        """Whether `write` is possible."""
        return True

    def as_float(self, W: Tensor, dtype: torch.dtype) -> nn.Module:
        """The plain layer with the weight `W (out, in)`, instead of a quantized one."""
        raise HalotuneError(
            f"{type(self.module).__name__} {self.shape} cannot be merged into floats: it holds no weight that is quantized and "
            "readable. Keep the adapter beside it."
        )

    def snapshot(self) -> Any:
        """What `restore` needs to undo a `write` bit for bit."""
        hook = offload_hook(self.module) if self.parameter.is_meta else None
        return self.parameter.detach().clone() if hook is None else hook.weights_map

    @torch.no_grad()
    def restore(self, snapshot: Any) -> None:
        """Put back what `snapshot` gave, also where the module was offloaded, or brought back, in between."""
        hook = offload_hook(self.module) if self.parameter.is_meta else None
        if hook is None:
            self.parameter.copy_(snapshot if isinstance(snapshot, Tensor) else snapshot["weight"])
        elif isinstance(snapshot, Tensor):
            hook.weights_map = Overlay({"weight": snapshot.to("cpu")}, hook.weights_map)
        else:
            hook.weights_map = snapshot

    def tensor(self, name: str) -> Any:
        """A tensor of the module; brought to where it runs, if accelerate keeps it elsewhere."""
        own = getattr(self.module, name)
        if own is None or not own.is_meta or (hook := offload_hook(self.module)) is None:
            return own
        return hook.weights_map[name].to(hook.execution_device)

    @property
    def takes_weight(self) -> bool:
        if self.quantization:
            return not self.opaque
        return not computes_weight(self.module) and type(self.module).forward.__module__ in _FORWARDS

    def is_product(self) -> bool:
        """Whether a call is `W x + bias` with the weight that is read; a class's own forward is tried on one input."""
        if self.takes_weight or self.quantization or computes_weight(self.module):
            return self.takes_weight
        return self.parameter.is_meta or self._agrees()  # on meta nothing can be tried

    @torch.no_grad()
    def _agrees(self) -> bool:
        x = self.sample().to(self.parameter)
        try:
            y = self.module(x)
        except Exception:  # a forward of its own may ask for anything
            return False
        expected = self.add_bias(self.contract(self.pad(x), self.weight()))
        return y.shape == expected.shape and bool((y - expected).norm() <= 0.01 * expected.norm())

    @abstractmethod
    def sample(self) -> Tensor:
        """An input, the same each time."""

    @property
    def transient(self) -> bool:
        """Whether `weight()` makes a new tensor, to be recomputed rather than kept."""
        return self.parameter.is_meta

    @property
    def bias(self) -> Tensor | None:
        return self.tensor("bias")

    @property
    def hooked(self) -> bool:
        return not is_bare(self.module) and not is_offloaded(self.module)

    def with_weight(self, x: Tensor, W: Tensor) -> Tensor:
        if not self.hooked:
            return super().with_weight(x, W)
        return torch.func.functional_call(self.module, {"weight": self.stored(W)}, (x,))

    def add_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self._broadcast(self.bias.to(y))

    def _broadcast(self, bias: Tensor) -> Tensor:
        return bias


class LinearLike(Base):
    """Bases that act on the last dimension of `x`."""

    def sample(self) -> Tensor:
        return torch.linspace(-1, 1, self.shape.in_features)[None]

    def pad(self, x: Tensor) -> Tensor:
        return x

    def contract(self, x: Tensor, W: Tensor) -> Tensor:
        return F.linear(x, W)

    def contract_backward(self, x: Tensor, W: Tensor, dy: Tensor, need_x: bool) -> tuple[Tensor | None, Tensor]:
        return Matrix.contract_backward(x, W, dy, need_x)

    def add_low_rank(self, y: Tensor, x: Tensor, B: Tensor, A: Tensor) -> Tensor:
        return add_to(y, F.linear(x, A), B.t())


# Where the forwards are defined that multiply by the weight and do nothing else.
_FORWARDS = ("torch.nn.modules.linear", "torch.nn.modules.conv", "transformers.pytorch_utils", "halotune.core.attention")


def is_parametrized(module: nn.Module) -> bool:
    """Whether reading the module's weight computes it (`torch.nn.utils.parametrize`)."""
    return "weight" in getattr(module, "parametrizations", ())


def computes_weight(module: nn.Module) -> bool:
    """Whether a hook computes the weight at each call (`torch.nn.utils.weight_norm`, `spectral_norm`, `prune`)."""
    return bool(module._forward_pre_hooks) and "weight" not in module._parameters and not is_parametrized(module)


def is_bare(module: nn.Module) -> bool:
    """Whether calling the module runs its class's `forward` and nothing else."""
    return "forward" not in module.__dict__ and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or nn.modules.module._has_any_global_hook()
    )


class Linear(LinearLike):
    """`torch.nn.Linear` and its subclasses that keep the weight as a float matrix."""

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and module.weight.is_floating_point() and module.weight.dim() == 2

    @property
    def shape(self) -> WeightShape:  # type: ignore[override]
        return WeightShape(self.module.out_features, self.module.in_features)

    def weight(self) -> Tensor:
        return self.tensor("weight")

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None] | None:
        module = self.module
        W, b = module._parameters.get("weight"), module._parameters.get("bias")
        frozen = type(W) is nn.Parameter and not W.requires_grad and (b is None or not b.requires_grad)
        if not frozen or W.dtype is not dtype or W.is_meta:
            return None
        return (W, b) if type(module).forward is nn.Linear.forward and is_bare(module) else None

    def stored(self, W: Tensor) -> Tensor:
        return W


class TransposedLinear(LinearLike):
    """transformers' `Conv1D`: a linear layer whose weight is stored `(in, out)`."""

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        # By name, so that transformers need not be imported.
        return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)

    @property
    def shape(self) -> WeightShape:  # type: ignore[override]
        n_in, n_out = self.module.weight.shape
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
        return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.weight.is_floating_point()

    @property
    def shape(self) -> WeightShape:  # type: ignore[override]
        w = self.module.weight
        return WeightShape(w.shape[0], w[0].numel(), tuple(self.module.kernel_size), self.module.groups)

    def weight(self) -> Tensor:
        return self.tensor("weight").flatten(1)

    def stored(self, W: Tensor) -> Tensor:
        return W.reshape(self.module.weight.shape)

    def sample(self) -> Tensor:
        m = self.module
        size = [m.in_channels, *(2 * d * k for d, k in zip(m.dilation, m.kernel_size, strict=True))]
        return torch.linspace(-1, 1, prod(size)).view(1, *size)

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
