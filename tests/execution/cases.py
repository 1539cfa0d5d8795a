"""Every method on small models in float64, and the same models without adapters, run with W' by `definitions`.

What is compared is a whole step: the output, and the gradient of every parameter and input, None where there is none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

import halotune

from . import definitions
from .definitions import LEAVES, PEFTS_NAMES, Definition

WIDTH = 12


@dataclass(frozen=True)
class Method:
    """A way to configure a method.

    Attributes:
        define: `W' = define(W, **parameters)`.
        config: the class of its configuration, in halotune and in peft.
        options: of that class.
        sped_up: the model is a live one of peft's, under `speed_up`.
    """

    define: Definition
    config: str
    options: Mapping[str, Any]
    sped_up: bool = False

    def configure(self, targets: Sequence[str] | str) -> Any:
        library = pytest.importorskip("peft", minversion="0.21") if self.sped_up else halotune
        return getattr(library, self.config)(target_modules=targets, **self.options)


METHODS = {
    "hra": Method(definitions.hra, "HRAConfig", {"r": 4}),
    "hra-gs": Method(definitions.hra_gram_schmidt, "HRAConfig", {"r": 3, "apply_GS": True, "init_weights": False}),
    "loha": Method(definitions.LoHa(3 / 2), "LoHaConfig", {"r": 2, "alpha": 3}),
    "loha-large": Method(definitions.LoHa(3 / 6), "LoHaConfig", {"r": 6, "alpha": 3}),
    "bone": Method(definitions.bone, "BoneConfig", {"r": 4}),
    "bat": Method(definitions.bat, "BoneConfig", {"r": 4, "init_weights": "bat"}),
    "oft": Method(definitions.oft, "OFTConfig", {"r": 0, "oft_block_size": 4, "use_cayley_neumann": False}),
    "lora": Method(definitions.LoRA(5 / 3), "LoraConfig", {"r": 3, "lora_alpha": 5}),
}
SPED_UP = {
    f"{name}-sped-up": Method(m.define, m.config.replace("Bone", "Miss"), m.options, sped_up=True)
    for name, m in METHODS.items()
    if name != "lora"
}
ALL = METHODS | SPED_UP

every_method = pytest.mark.parametrize("method", METHODS)
every_method_and_sped_up = pytest.mark.parametrize("method", ALL)


# -- models


def linear(d_in: int = WIDTH, d_out: int = WIDTH, bias: bool = True) -> nn.Linear:
    return nn.Linear(d_in, d_out, bias)


class Attention(nn.Module):
    """Three layers of one input, one of another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = linear(), linear(bias=False), linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return x + self.o(torch.tanh(q * k) + v)


QKVO = ["q", "k", "v", "o"]
Run = Callable[..., Any]


def directly(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


class Net(nn.Module):
    """Blocks one after another, each run by `run`."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(depth))
        self.run: Run = directly

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.run(block, x)
        return x


def sample(*size: int, seed: int = 1, requires_grad: bool = True, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(size or (2, 5, WIDTH), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype).requires_grad_(requires_grad)


# -- the adapted model and its reference


def inner(model: nn.Module) -> Any:
    """The base model, with the adapters in its layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def trained(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def named(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def leaf_of(name: str) -> str | None:
    """Which tensor of PEFT's files a parameter's name means."""
    parts = [PEFTS_NAMES.get(part, part) for part in name.split(".")]
    return next((leaf for leaf in LEAVES if leaf in parts), None)


def adapter_parameters(model: nn.Module, adapter: str | None = None) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if leaf_of(n) and (adapter is None or adapter in n.split("."))}


@torch.no_grad()
def randomize(model: nn.Module, adapter: str | None = None, seed: int = 1, std: float = 0.3) -> None:
    """Parameters as if trained for a while."""
    rng = torch.Generator().manual_seed(seed)
    for p in adapter_parameters(model, adapter).values():
        p.copy_(std * torch.randn(p.shape, generator=rng, dtype=torch.float64))


@torch.no_grad()
def change(model: nn.Module, by: float = 0.1) -> None:
    """Another value for every adapter parameter, as an optimizer's step gives."""
    for p in adapter_parameters(model).values():
        p.mul_(-0.5).add_(by)


class Reference:
    """The model without adapters, called with W' for the weights of the adapted layers.

    W' is a function of the adapted model's own parameters, so gradients arrive where the adapted model's do.
    """

    def __init__(self, model: nn.Module, plain: nn.Module, paths: Sequence[str], method: str) -> None:
        self.model, self.plain, self.paths = model, plain, list(paths)
        self.methods = {"default": method}
        self.prefix = "base_model.model." if hasattr(model, "get_base_model") else ""

    def parameters(self, path: str, adapter: str, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The adapter's parameters on one layer, by their names in PEFT's files."""
        start, out = f"{self.prefix}{path}.", {}
        for name, p in self.model.named_parameters() if values is None else values.items():
            if name.startswith(start) and adapter in name.split(".") and (leaf := leaf_of(name)):
                out[leaf] = p
        assert out, f"{path}: no parameters of {adapter!r}"
        return out

    def weights(
        self,
        active: Sequence[str] = ("default",),
        scale: float = 1.0,
        values: Mapping[str, Tensor] | None = None,
        within: str = "",
    ) -> dict[str, Tensor]:
        """The W' of all adapted layers that lie in `within`, under the names that they have there."""
        out = {}
        for path in self.paths:
            if not path.startswith(within):
                continue
            layer = self.plain.get_submodule(path)
            stored: Tensor = layer.weight  # type: ignore[assignment]
            W = stored.t() if isinstance(layer, Conv1D) else stored.flatten(1)
            for adapter in active:
                defined = ALL[self.methods[adapter]].define(W, **self.parameters(path, adapter, values))
                W = defined if scale == 1.0 else W + scale * (defined - W)
            out[f"{path.removeprefix(within)}.weight"] = W.t() if isinstance(layer, Conv1D) else W.reshape(stored.shape)
        return out

    def __call__(self, *args: Any, **how: Any) -> Any:
        """`how`: the arguments of `weights`."""
        return functional_call(self.plain, self.weights(**how), args)

    def part(self, path: str) -> Callable[..., Any]:
        """A submodule."""
        return lambda *args, **how: functional_call(
            self.plain.get_submodule(path), self.weights(within=f"{path}.", **how), args
        )


def adapted(
    method: str,
    make: Callable[[], nn.Module] = Net,
    targets: Sequence[str] = QKVO,
    *,
    inject: bool = False,
    dtype: torch.dtype = torch.float64,
    std: float = 0.3,
) -> tuple[Any, Reference]:
    """What `make` makes, with random adapters on the layers of these names; and its reference."""
    torch.manual_seed(0)
    plain = make().to(dtype).requires_grad_(False)
    base, how = copy.deepcopy(plain), ALL[method]
    paths = [n for n, m in plain.named_modules() if not list(m.children()) and n.rsplit(".", 1)[-1] in targets]
    config = how.configure(list(targets))
    if how.sped_up:
        model: nn.Module = pytest.importorskip("peft").get_peft_model(base, config)
    elif inject:
        model = halotune.inject_adapter_in_model(config, base)
        for name, p in model.named_parameters():
            p.requires_grad_(leaf_of(name) is not None)
    else:
        model = halotune.get_peft_model(base, config)
    model.to(dtype)
    randomize(model, std=std)
    return (halotune.speed_up(model) if how.sped_up else model), Reference(model, plain, paths, method)


def add(model: Any, reference: Reference, name: str, method: str, targets: Sequence[str] = QKVO, seed: int = 5) -> None:
    """One more adapter, inactive."""
    model.add_adapter(name, ALL[method].configure(list(targets)))
    reference.methods[name] = method
    model.to(torch.float64)
    randomize(model, name, seed)


# -- a step, and what must be equal


def square_sum(y: Tensor) -> Tensor:
    return y.square().sum()


def step(run: Callable[[], Any], leaves: Sequence[Tensor], loss: Callable[[Any], Tensor] = square_sum) -> list[Tensor | None]:
    """The output, and the gradients of these tensors."""
    for t in leaves:
        t.grad = None
    y = run()
    loss(y).backward()
    outputs = [y] if isinstance(y, Tensor) else list(y)
    return [*(t.detach().clone() for t in outputs), *(None if t.grad is None else t.grad.clone() for t in leaves)]


def assert_same(
    got: Sequence[Tensor | None], want: Sequence[Tensor | None], tolerance: float = 1e-9, none_is_zero: bool = False
) -> None:
    """Equal to rounding, relative to the largest number of each tensor; and None where None is wanted."""
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if none_is_zero and (a is None) != (b is None):
            a, b = (torch.zeros_like(b), b) if a is None else (a, torch.zeros_like(a))  # type: ignore[arg-type]
        assert (a is None) == (b is None), f"tensor {i} of {len(got)}: {describe(a)}, expected {describe(b)}"
        if a is not None and b is not None:
            a, b = a.detach(), b.detach()
            assert a.shape == b.shape, f"tensor {i} of {len(got)}"
            size = float(b.abs().max()) if b.numel() else 0.0
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance * (size + 1e-3), msg=lambda m, i=i: f"tensor {i}: {m}")


def describe(t: Tensor | None) -> str:
    return "no gradient" if t is None else f"a gradient of at most {float(t.abs().max()):.2g}"


def assert_agree(model: nn.Module, reference: Run, *inputs: Tensor, passes: int = 3, loss: Any = square_sum) -> None:
    """Training passes and passes without gradients, the first ones and later ones, are the reference's."""
    leaves = [*trained(model), *(x for x in inputs if x.requires_grad)]
    want = step(lambda: reference(*inputs), leaves, loss)
    for _ in range(passes):
        assert_same(step(lambda: model(*inputs), leaves, loss), want)
    outputs = want[: len(want) - len(leaves)]
    with torch.no_grad():
        for _ in range(2):
            y = model(*inputs)
            assert_same([y] if isinstance(y, Tensor) else list(y), outputs)


def switches(model: nn.Module) -> Iterator[Any]:
    """The adapted layers."""
    for name, module in inner(model).named_modules():
        if name and hasattr(module, "enable_adapters") and hasattr(module, "base_layer"):
            yield module
