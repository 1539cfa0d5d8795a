"""Generated layers: whatever a class, a hook or a parametrization does, an adapter gives what is defined, or is refused.

What is defined, of a layer f with the weight W that a call of it leaves to be read: a rotation of a linear layer gives
`f(x Qᵀ)`, any other adapter `f(x) + (W' − W) x`, with the stride, padding and groups that f names; where hooks came after the
adapter, a map on the weight is f with W' in it. A merge keeps that, and unmerging gives back every bit, or either is refused
before anything has changed. Layers that do multiply by their weight are adapted and merged, and all that take the right input
and give the right output are adapted by the methods that call a layer as it is. In float64, by plain torch.

    python -m tests.bases.layers --count 2000
"""

from __future__ import annotations

import argparse
import random
import sys
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import halotune
from halotune import HalotuneError

from ..execution.cases import METHODS, adapter_parameters, leaf_of

# -- classes


def apply(layer: Any, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    """The product that the layer's geometry names."""
    return F.linear(x, W, bias) if isinstance(layer, nn.Linear) else layer._conv_forward(x, W.view_as(kernel(layer)), bias)


def kernel(layer: Any) -> Tensor:
    return torch.empty(layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)


def channels(layer: nn.Module) -> int:
    return -1 if isinstance(layer, nn.Linear) else 1


def by_rows(W: Tensor) -> Tensor:
    rows = W.flatten(1)
    return ((rows - rows.mean(1, keepdim=True)) / rows.std(1, keepdim=True)).view_as(W)


def with_bias(m: Any, y: Tensor) -> Tensor:
    if m.bias is None:
        return y
    return y + (m.bias if isinstance(m, nn.Linear) else m.bias.view(-1, *[1] * (y.dim() - 2)))


def written(m: Any, x: Tensor) -> Tensor:
    return with_bias(m, apply(m, x, m.weight, None))


def two_biases(m: Any, x: Tensor) -> Tensor:
    return with_bias(m, apply(m, x, m.weight, m.bias))


def padded(m: Any, x: Tensor) -> Tensor:
    if isinstance(m, nn.Linear):
        return F.pad(apply(m, x, m.weight, m.bias), (0, 4))
    return apply(m, F.pad(x, [1, 1] * (x.dim() - 2)), m.weight, m.bias)


def counting(m: Any, x: Tensor) -> Tensor:
    m.calls += 1
    return apply(m, x, m.weight, m.bias)


def gated(m: Any, x: Tensor) -> Tensor:
    y = apply(m, x, m.weight, m.bias)
    return y * torch.sigmoid(y)


def residual(m: Any, x: Tensor) -> Tensor:
    y = apply(m, x, m.weight, m.bias)
    return y + x.mean()


FORWARDS: dict[str, Callable[[Any, Tensor], Any]] = {
    "written": written,
    "scaled": lambda m, x: apply(m, x, m.weight * 0.25, m.bias),
    "standardized": lambda m, x: apply(m, x, by_rows(m.weight), m.bias),
    "normed": lambda m, x: apply(m, F.normalize(x, dim=channels(m)), m.weight, m.bias),
    "two biases": two_biases,
    "padded": padded,
    "gated": gated,
    "residual": residual,
    "counting": counting,
    "masked": lambda m, x: apply(m, x, m.weight * m.mask, m.bias),
    "rounded": lambda m, x: apply(m, x, (m.weight * 8).round() / 8, m.bias),
    "tuple": lambda m, x: (apply(m, x, m.weight, m.bias), m.bias),
    "int8": lambda m, x: apply(m, x, m.codes * m.step, m.bias),
    "int8 beside floats": lambda m, x: apply(m, x, m.codes * m.step, m.bias),
}


def with_forward(layer: nn.Module, name: str) -> nn.Module:
    """The layer as one of a class of its own."""
    kind, own = type(layer), FORWARDS[name]
    W: Any = layer.weight
    if name == "counting":
        layer.register_buffer("calls", torch.zeros((), dtype=torch.long))
    if name == "masked":
        layer.register_buffer("mask", (torch.rand_like(W) > 0.3).to(W.dtype))
    if name.startswith("int8"):
        layer.register_buffer("codes", (W.detach() * 100).round().to(torch.int8))
        layer.register_buffer("step", torch.tensor(0.01, dtype=W.dtype))
    if name == "int8":
        layer.weight = None
    layer.__class__ = type(name.title().replace(" ", ""), (kind,), {"forward": lambda self, x: own(self, x)})
    return layer


def with_property(layer: nn.Module) -> nn.Module:
    """Its weight is computed by the class from another parameter."""
    layer.raw = nn.Parameter(layer.weight.detach().clone())  # type: ignore[union-attr]
    del layer.weight
    layer.__class__ = type("Tanh", (type(layer),), {"weight": property(lambda self: torch.tanh(self.raw))})
    return layer


def with_call(layer: nn.Module) -> nn.Module:
    kind = type(layer)
    layer.__class__ = type("Halved", (kind,), {"__call__": lambda self, x: kind.__call__(self, x) / 2})
    return layer


def with_conv_forward(layer: nn.Module) -> nn.Module:
    kind: Any = type(layer)
    halved = {"_conv_forward": lambda self, x, W, b: kind._conv_forward(self, x, W / 2, b)}
    layer.__class__ = type("HalvedConv", (kind,), halved if issubclass(kind, nn.modules.conv._ConvNd) else {})
    return layer


def with_fewer_rows(layer: nn.Module) -> nn.Module:
    """Pruned, with the sizes that it had."""
    for name, p in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(p.detach()[:8].clone()))
    return layer


CLASSES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda layer: layer,
    **{name: lambda layer, name=name: with_forward(layer, name) for name in FORWARDS},
    "property": with_property,
    "call": with_call,
    "conv_forward": with_conv_forward,
    "fewer rows": with_fewer_rows,
}

# -- what is done to a layer, before or after it is wrapped


class Twice(nn.Module):
    def forward(self, t: Tensor) -> Tensor:
        return t * 2


def halve_forward(layer: Any) -> None:
    own = layer.forward
    layer.forward = lambda x: own(x) / 2


def wrap_forward(layer: Any) -> None:
    own = layer.forward
    layer.forward = lambda x: own(x)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "weight_norm hook": nn.utils.weight_norm,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm hook": nn.utils.spectral_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "parametrized": lambda layer: parametrize.register_parametrization(layer, "weight", Twice()),
    "capture": lambda layer: layer.register_forward_hook(lambda m, x, y: None),
    "steer": lambda layer: layer.register_forward_hook(lambda m, x, y: y + 0.5),
    "damp": lambda layer: layer.register_forward_hook(lambda m, x, y: y * 0.5),
    "rectify": lambda layer: layer.register_forward_pre_hook(lambda m, x: (x[0].relu(),)),
    "double": lambda layer: layer.register_forward_pre_hook(lambda m, x: (x[0] * 2,)),
    "watch gradients": lambda layer: layer.register_full_backward_hook(lambda m, dx, dy: None),
    "halved forward": halve_forward,
    "wrapped forward": wrap_forward,
    "new weight": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.detach() * 1.5, requires_grad=False)),
}


def change(layer: nn.Module, name: str) -> None:
    torch.manual_seed(0)
    CHANGES[name](layer)


# What leaves a layer `W x + c` with the W that is stored.
PRODUCTS = {
    "plain",
    "written",
    "two biases",
    "counting",
    "steer",
    "capture",
    "watch gradients",
    "wrapped forward",
    "new weight",
}
UNUSUAL = {"padded", "tuple", "fewer rows"}  # outputs that no layer of its sizes has


@dataclass
class Case:
    """One layer, what is done to it, and a method."""

    seed: int
    make: Callable[[], nn.Module]
    shape: str
    kind: str
    method: str
    x: Tensor
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)

    def layer(self) -> nn.Module:
        torch.manual_seed(self.seed)
        layer = CLASSES[self.kind](self.make().double()).requires_grad_(False).eval()
        for name in self.before:
            change(layer, name)
        return layer.requires_grad_(False)

    def must(self) -> set[str]:
        """What may become of it."""
        everything = {self.kind, *self.before, *self.after}
        results = {"right and merged"}
        W: Any = self.make().weight
        if self.method in ("bat", "oft") and W[0].numel() % 4:  # their blocks do not divide it
            results |= {"refused at wrapping"}
        if not everything <= PRODUCTS:
            results |= {"right, merging refused"}
            on_weights = self.method in ("bat",) or (self.method[:3] in ("hra", "oft") and not self.shape.startswith("Linear"))
            if on_weights or self.kind in UNUSUAL or self.kind == "int8":
                results |= {"refused at wrapping", "refused in the forward pass"}
        return results

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.method} on {self.shape}, {self.kind}, {self.before} before, {self.after} after"


def generate(seed: int) -> Case:
    rng = random.Random(seed)
    dim, bias = rng.choice([0, 0, 1, 2]), rng.random() < 0.7
    n_in, n_out = rng.choice([(12, 12), (12, 16), (16, 12)])
    if dim == 0:
        make, shape = lambda: nn.Linear(n_in, n_out, bias), f"Linear({n_in}, {n_out}, {bias})"
        x = torch.randn(rng.choice([(5, n_in), (2, 3, n_in)]), generator=torch.Generator().manual_seed(seed))
    else:
        options = {
            "kernel_size": rng.choice([1, 3]),
            "stride": rng.choice([1, 1, 2]),
            "padding": rng.choice([0, 1]),
            "groups": rng.choice([1, 1, 2, 4]),
            "padding_mode": rng.choice(["zeros", "zeros", "reflect", "circular"]),
            "bias": bias,
        }
        kind = {1: nn.Conv1d, 2: nn.Conv2d}[dim]
        make, shape = lambda: kind(n_in, n_out, **options), f"{kind.__name__}({n_in}, {n_out}, {options})"
        x = torch.randn(2, n_in, *[7] * dim, generator=torch.Generator().manual_seed(seed))
    kind_name = rng.choice([*CLASSES, "plain", "plain", "plain"])
    case = Case(seed, make, shape, kind_name, rng.choice(list(METHODS)), x.double())
    for name in rng.sample(list(CHANGES), rng.choice([0, 0, 1, 1, 2])):
        times = case.after if rng.random() < 0.4 else case.before
        times.append(name)
        try:  # not everything can be done to everything
            reference = case.layer()
            for later in case.after:
                change(reference, later)
            first = next(iter(reference.parameters()), None)
            assert first is not None and reference(case.x) is not None
        except Exception:
            times.pop()
    return case


# -- what is defined


def defined(case: Case, f: nn.Module, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    define = METHODS[case.method].define
    y = f(x)
    is_linear = isinstance(f, nn.Linear)
    if is_linear and case.method.startswith(("hra", "oft")):
        return f(x @ define(torch.eye(x.shape[-1], dtype=x.dtype), **parameters).t())
    W = getattr(f, "weight", None)
    if W is None:
        W = f.codes * f.step  # type: ignore[operator]
    adapted = define(W.flatten(1), **parameters).view_as(W)
    maps = case.method == "bat" or (case.method == "oft" and not is_linear)
    if maps and "weight" in f._parameters:
        return torch.func.functional_call(f, {"weight": adapted}, (x,))
    return y + product(f, x, adapted - W)


def product(f: Any, x: Tensor, W: Tensor) -> Tensor:
    """`W x` with what the layer names."""
    if isinstance(f, nn.Linear):
        return F.linear(x, W)
    kind = nn.Conv1d if isinstance(f, nn.Conv1d) else nn.Conv2d
    return kind._conv_forward(f, x, W, None)


# -- the check


def state(module: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in module.state_dict().items() if "calls" not in n}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[n]) for n, t in a.items())


def close(got: Tensor, want: Tensor) -> bool:
    return got.shape == want.shape and bool((got - want).abs().max() <= 1e-9 * (1 + want.abs().max()))


def run(case: Case) -> str:
    """What became of it. Raises AssertionError where something is wrong, and whatever else is no refusal of ours."""
    method, layer, x = METHODS[case.method], case.layer(), case.x
    plain, before = nn.Sequential(OrderedDict(layer=layer)), state(layer)
    config = getattr(halotune, method.config)(target_modules=["layer"], **method.options)
    try:
        model = halotune.get_peft_model(plain, config).double().eval()
    except HalotuneError:
        assert plain.layer is layer and same(before, state(layer)), "a refusal changed the layer"
        return "refused at wrapping"
    assert same(before, state(layer)) and not getattr(layer, "calls", torch.zeros(())).any(), (
        "wrapping left a trace in the layer"
    )
    torch.manual_seed(case.seed + 1)
    trained = adapter_parameters(model)
    with torch.no_grad():
        for p in trained.values():
            p.copy_(torch.randn_like(p) * 0.3)
    reference = case.layer()
    for name in case.after:
        change(layer, name)
        change(reference, name)
    for module in (layer, reference):
        module.requires_grad_(False).eval()
    leaves = {leaf_of(n): p for n, p in trained.items()}
    want = defined(case, reference, x, leaves)
    gradients = torch.autograd.grad(want.square().sum(), list(trained.values()), allow_unused=True)
    try:
        y = model(x)
        got = torch.autograd.grad(y.square().sum(), list(trained.values()), allow_unused=True)
        with torch.no_grad():
            again = model(x)
    except HalotuneError:
        return "refused in the forward pass"
    assert close(y, want) and close(again, want), (
        f"outputs are off by {(y - want).abs().max() if y.shape == want.shape else y.shape}"
    )
    for g, w in zip(got, gradients, strict=True):
        assert (g is None) == (w is None) and (g is None or close(g, w)), "gradients are off"
    before, merged = state(layer), True
    with torch.no_grad():
        try:
            model.merge_adapter()
            assert close(model(x), want), "merged outputs are off"
            model.unmerge_adapter()
        except HalotuneError:
            merged = False
        assert same(before, state(layer)) and torch.equal(model(x), again), (
            "a merge that is undone, or refused, changed something"
        )
        try:
            out = model.merge_and_unload()
            assert merged and close(out(x), want), "outputs merged for good are off"
        except HalotuneError:
            assert not merged and same(before, state(layer)) and torch.equal(model(x), again), (
                "a refused merge changed something"
            )
    return "right and merged" if merged else "right, merging refused"


def check(seed: int) -> tuple[str, str]:
    """What became of it, and what is wrong."""
    case = generate(seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = run(case)
        assert result in case.must(), f"it was {result}"
        return result, ""
    except Exception as e:
        return "WRONG", f"{case}\n    {type(e).__name__}: {(str(e).splitlines() or [''])[0]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="how many layers")
    parser.add_argument("--seed", type=int, default=0, help="of the first")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: Counter[str] = Counter()
    for seed in range(arguments.seed, arguments.seed + arguments.count):
        result, message = check(seed)
        found[result] += 1
        if message:
            print(message, flush=True)
    print(", ".join(f"{n} {what}" for what, n in found.most_common()))
    return bool(found["WRONG"])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
