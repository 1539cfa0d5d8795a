"""What quantized linear layers share: sizes, the call, the check for lost gradients; and merging, where they can be read."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from ..core.base import LinearLike, has_hooks
from ..core.errors import HalotuneError
from ..core.operator import WeightShape


class Quantized(LinearLike):
    """A linear layer that keeps its weight in few bits. It is called as it is, and its weight left alone, wherever a method
    does not ask for the weight itself.
    """

    @property
    @abstractmethod
    def quantization(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The format, for reports and errors."""

    @property
    def shape(self) -> WeightShape:  # type: ignore[override]
        """From the layer's own fields: a packed weight has another shape."""
        return WeightShape(self.module.out_features, self.module.in_features)

    def __call__(self, x: Tensor) -> Tensor:
        y = self.module(x)
        if x.requires_grad and torch.is_grad_enabled() and not self._passes_gradient(x, y):
            raise HalotuneError(
                f"{self} returns no gradient for its input, so that nothing before it would be trained. Quantize the weights "
                "alone, not the activations; or, where nothing is trained, call the model under torch.no_grad()."
            )
        return y

    def _passes_gradient(self, x: Tensor, y: Tensor) -> bool:
        bias = self.bias
        if bias is None or not bias.requires_grad or torch.compiler.is_compiling():
            return y.requires_grad
        return _depends_on(y, x)  # y requires a gradient for the bias alone

    def __str__(self) -> str:
        return f"{type(self.module).__name__} {self.shape} [{self.quantization}]"

    @property
    def transient(self) -> bool:
        return True

    @property
    def hooked(self) -> bool:
        return has_hooks(self.module)

    def called_with(self, x: Tensor, W: Tensor) -> Tensor:
        """A float layer with the hooks of this one."""
        layer = nn.Linear.__new__(nn.Linear)
        layer.__dict__.update({k: v for k, v in vars(self.module).items() if k != "forward"})
        bias = self.bias
        layer._parameters = {"weight": W, "bias": bias if bias is None else bias.to(x)}  # type: ignore[assignment, dict-item]
        return layer(x)


class Readable(Quantized):
    """A quantized layer whose weight can be read, and written.

    What it stores is one value, the *stored form*: `snapshot` gives it, `quantize` makes one of a matrix, `restore` puts one
    in place. A stored form is replaced, never written to, so that restoring is exact.
    """

    @abstractmethod
    def quantize(self, W: Tensor) -> Any:
        """The stored form of `W (out, in)`, in this layer's format. The layer is untouched."""

    def snapshot(self) -> Any:
        """The stored form; the weight, where that is all of it."""
        return self.parameter

    @abstractmethod
    def restore(self, snapshot: Any) -> None:
        """Put a stored form in place."""

    @torch.no_grad()
    def write(self, W: Tensor) -> None:
        self.restore(self.quantize(W))

    @torch.no_grad()
    def as_float(self, W: Tensor, dtype: torch.dtype) -> nn.Module:
        shape, bias = self.shape, self.bias
        linear = nn.Linear(shape.in_features, shape.out_features, bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(W.to(self.device, dtype), requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=bias.requires_grad)
        return linear.train(self.module.training)


def comes_from(thing: object, package: str, name: str | None = None) -> bool:
    """Whether a class of `thing`, or one that it derives from, is of this package (and has this name).

    The package is not imported to find out.
    """
    classes = (c for c in type(thing).__mro__ if c.__module__.split(".")[0] == package)
    return any(name is None or c.__name__ == name for c in classes)


def _depends_on(y: Tensor, x: Tensor) -> bool:
    """Whether the graph of y reaches x; what lies beyond x is not visited."""
    source = torch.autograd.graph.get_gradient_edge(x).node
    waiting, seen = [y.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is source:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(n for n, _ in node.next_functions)
    return False
