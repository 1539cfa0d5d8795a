"""`add_weighted_adapter`: exact, or refused with the combination that is."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halotune import (
    BoneConfig,
    HalotuneError,
    HRAConfig,
    LoHaConfig,
    LoraConfig,
    MissConfig,
    PeftModel,
    TaskType,
)
from halotune.core.config import AdapterConfig

from ..laws.cases import matrix
from .models import MLP, adapted, close, composed, config, differ, layers, same_state, state

UP, DOWN, ALL = ["up"], ["up", "down"], ["stem", "up", "down"]


def hra(r: int, targets: Sequence[str] = ALL, **more: Any) -> HRAConfig:
    return HRAConfig(r=r, target_modules=list(targets), init_weights=False, **more)


def loha(r: int, targets: Sequence[str] = ALL, **more: Any) -> LoHaConfig:
    return LoHaConfig(r=r, alpha=3, target_modules=list(targets), **more)


def bone(r: int, targets: Sequence[str] = ALL, **more: Any) -> BoneConfig:
    return BoneConfig(r=r, target_modules=list(targets), **more)


def bat(r: int, targets: Sequence[str] = ALL, **more: Any) -> BoneConfig:
    return bone(r, targets, init_weights="bat", **more)


def miss(r: int, targets: Sequence[str] = ALL, **more: Any) -> MissConfig:
    return MissConfig(r=r, target_modules=list(targets), **more)


def mini(r: int, columns: int, targets: Sequence[str] = ALL) -> MissConfig:
    return miss(r, targets, mini_r=columns, init_weights="mini")


def lora(r: int, targets: Sequence[str] = ALL, **more: Any) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=5, target_modules=list(targets), **more)


def oracle(plain: nn.Module, model: PeftModel, names: Sequence[str], weights: Sequence[float], chain: bool) -> nn.Module:
    """By definition: `F_n(… F_1(W))` for a chain, else `W + Σ w_i (F_i(W) − W)`."""
    if chain:
        return composed(plain, model, names)
    out = copy.deepcopy(plain)
    with torch.no_grad():
        for path, layer in layers(model).items():
            module = out.get_submodule(path)
            W = matrix(module)
            new = W + sum(
                w * (layer.adapters[n].weight(W) - W) for n, w in zip(names, weights, strict=True) if n in layer.adapters
            )
            module.weight.copy_(new.reshape(module.weight.shape))
    return out


@dataclass(frozen=True)
class Exact:
    """A combination that is exact.

    Attributes:
        r: the rank of the result.
        patterns: how many layers have another rank.
    """

    name: str
    configs: Sequence[AdapterConfig]
    weights: Sequence[float]
    how: str
    r: int
    chain: bool = False
    patterns: int = 0
    kind: str = field(default="LORA")


EXACT = [
    # Bone of one r and kind
    Exact("bone", [bone(3), bone(3)], [0.5, -2], "linear", 3, kind="BONE"),
    Exact("bone, other layers", [bone(7, UP), bone(7, ["stem", "up"])], [0.5, 2], "linear", 7, kind="BONE"),
    Exact("bat", [bat(3), bat(3, UP), bat(3, DOWN)], [1, 0.3, -1], "linear", 3, kind="BONE"),
    Exact("mini", [mini(3, 3), mini(3, 3, UP)], [0.5, 2], "linear", 3, kind="MISS"),
    Exact("miss", [miss(5), miss(5)], [0.5, 2], "linear", 5, kind="MISS"),
    Exact("miss bat", [miss(3, init_weights="bat"), miss(3, init_weights="bat")], [0.5, 2], "linear", 3, kind="MISS"),
    Exact(
        "bone, rank_pattern",
        [bone(3, rank_pattern={"up": 5, "stem": 2}), bone(3, rank_pattern={"up": 5, "stem": 2})],
        [0.5, 2],
        "linear",
        5,
        patterns=3,  # stem, and two of down
        kind="BONE",
    ),
    # LoRA
    Exact("lora", [lora(2), lora(3)], [0.5, -2], "linear", 5),
    Exact("lora cat", [lora(2), lora(3)], [0.5, -2], "cat", 5),
    Exact("rslora", [lora(2, use_rslora=True), lora(2, rank_pattern={"up": 4})], [0.5, 3], "linear", 6),
    # chains of reflections
    Exact("hra", [hra(2), hra(3)], [1, 1], "cat", 5, chain=True, kind="HRA"),
    Exact("hra alone", [hra(4)], [1], "cat", 4, chain=True, kind="HRA"),
    Exact("gram-schmidt", [hra(3, apply_GS=True), hra(2)], [1, 1], "cat", 5, chain=True, kind="HRA"),
    Exact("gram-schmidt last", [hra(2), hra(3, apply_GS=True)], [1, 1], "cat", 5, chain=True, kind="HRA"),
    Exact("three", [hra(2, UP), hra(1, DOWN), hra(4, ["stem"])], [1, 1, 1], "cat", 4, chain=True, kind="HRA"),
    Exact(
        "hra, rank_pattern",
        [hra(2, rank_pattern={"up": 4}), hra(1, rank_pattern={"down": 3})],
        [1, 1],
        "cat",
        5,
        chain=True,
        kind="HRA",
    ),
    # all else, as a LoRA of the summed ranks
    Exact("hra, weights", [hra(2), hra(3)], [0.5, -2], "lora", 5),
    Exact("hra, sum of two", [hra(2), hra(2)], [1, 1], "lora", 4),
    Exact("gram-schmidt, weights", [hra(3, apply_GS=True), hra(2)], [0.5, 2], "lora", 5),
    Exact("loha", [loha(2), loha(1)], [0.5, 2], "lora", 5),
    Exact("one loha", [loha(2)], [1], "lora", 4),
    Exact("tucker", [loha(2, use_effective_conv2d=True), loha(1)], [0.5, 2], "lora", 5),
    Exact("bone of unequal r", [bone(3), bone(7)], [0.5, 2], "lora", 10),
    Exact("mini and balance", [mini(3, 3), miss(3)], [0.5, 2], "lora", 6),
    Exact("mixed", [hra(2), loha(2), bone(3, UP), lora(1, DOWN), miss(2)], [0.5, 2, -1, 0.3, 1], "lora", 12),
    Exact("mixed, nowhere together", [hra(3, UP), bone(2, ["stem"])], [0.5, 2], "lora", 3),
]


@pytest.mark.parametrize("case", EXACT, ids=lambda c: c.name)
@torch.no_grad()
def test_exact(plain: MLP, x: Tensor, tmp_path, case: Exact):
    names = [f"a{i}" for i in range(len(case.configs))]
    model = adapted(plain, **dict(zip(names, copy.deepcopy(case.configs), strict=True)))
    before = state(model)
    model.add_weighted_adapter(names, case.weights, "sum", case.how)

    now = model.state_dict()
    assert all(torch.equal(now[k], t) for k, t in before.items())  # the parts are as they were
    assert model.active_adapters == ["a0"]
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".adapters.sum." in n)
    found = model.peft_config["sum"]
    assert (found.peft_type.value, found.r, len(found.rank_pattern)) == (case.kind, case.r, case.patterns)

    expected = oracle(plain, model, names, case.weights, case.chain)(x)
    model.set_adapter("sum")
    close(model(x), expected)
    assert differ(expected, plain(x))

    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "sum")
    close(loaded(x), expected)
    adapted_by_sum = {p for p, layer in layers(model).items() if "sum" in layer.adapters}
    assert adapted_by_sum == set(layers(loaded)) == set(layers(model))
    model.delete_adapter("a0")  # the sum does not hang on its parts
    close(model(x), expected)


@torch.no_grad()
def test_a_chain_of_reflections_is_padded_with_zero_columns(plain: MLP):
    """Layers that only some of the parts adapt have one r all the same, without a rank_pattern."""
    model = adapted(plain, a=hra(2, ["stem", "up"]), b=hra(3, DOWN))
    model.add_weighted_adapter(["a", "b"], [1, 1], "chain", "cat")
    columns = {p: layer.adapters["chain"].hra_u.norm(dim=0) for p, layer in layers(model).items()}
    assert {p: (c > 0).tolist() for p, c in columns.items()} == {
        "stem": [True] * 2 + [False] * 3,
        **{f"blocks.{i}.up": [True] * 5 for i in range(2)},
        **{f"blocks.{i}.down": [True] * 3 + [False] * 2 for i in range(2)},
    }
    assert not model.peft_config["chain"].apply_GS


@pytest.mark.parametrize("angle", [1e-2, 1e-4, 1e-10])
@torch.no_grad()
def test_a_chain_drops_the_columns_that_gram_schmidt_drops(plain: MLP, x: Tensor, angle: float):
    """Nearly dependent columns span a plane as long as float64 can tell."""
    model = adapted(plain, a=hra(3, UP, apply_GS=True), b=hra(2, UP))
    for layer in layers(model).values():
        U = layer.adapters["a"].hra_u
        U[:, 1] = U[:, 0] + angle * U[:, 1]
        U[:, 2] = 0
    model.add_weighted_adapter(["a", "b"], [1, 1], "chain", "cat")
    reflections = layers(model)["blocks.0.up"].adapters["chain"].hra_u[:, :3].norm(dim=0) > 0
    assert reflections.sum() == (1 if angle < 1e-8 else 2)
    model.set_adapter(["a", "b"])
    y = model(x)
    model.set_adapter("chain")
    torch.testing.assert_close(model(x), y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("how", ["linear", "lora"])
@torch.no_grad()
def test_scales_count(plain: MLP, x: Tensor, how: str):
    model = adapted(plain, a=bone(3), b=bone(3, UP))
    model.set_scale("a", 0.5)
    model.set_scale("b", -2)
    model.add_weighted_adapter(["a", "b"], [3, 0.5], "sum", how)
    model.set_adapter("sum")
    expected = oracle(plain, model, ["a", "b"], [1.5, -1], chain=False)
    close(model(x), expected(x))


@torch.no_grad()
def test_a_scaled_chain_is_refused(plain: MLP):
    model = adapted(plain, a=hra(2), b=hra(2))
    model.set_scale("b", 0.5)
    with pytest.raises(HalotuneError, match=r"HRA \(r=2, weight 0.5\); exact is \"lora\""):
        model.add_weighted_adapter(["a", "b"], [1, 1], "sum", "cat")


class ConvNet(nn.Module):
    """Convolutions of one and two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(4, 6, (3, 2), groups=2, padding="same", padding_mode="circular")
        self.plain = nn.Conv2d(6, 4, (1, 2), stride=(1, 2), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(torch.tanh(self.grouped(x)))


CONVOLUTIONS: Mapping[str, tuple[str, list[AdapterConfig], list[float]]] = {
    "hra": ("cat", [hra(2, ["grouped"]), hra(3, ["grouped", "plain"])], [1, 1]),
    "bone": ("linear", [bone(5, ["grouped", "plain"]), bone(5, ["plain"])], [0.5, 2]),
    "lora": ("linear", [lora(2, ["grouped", "plain"]), lora(1, ["plain"])], [0.5, 2]),
    "mixed": (
        "lora",
        [
            hra(2, ["grouped", "plain"]),
            loha(2, ["grouped", "plain"], use_effective_conv2d=True),
            bone(3, ["grouped"]),
            lora(1, ["plain"]),
        ],
        [0.5, 2, -1, 0.3],
    ),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
@torch.no_grad()
def test_convolutions(tmp_path, case: str):
    how, configs, weights = copy.deepcopy(CONVOLUTIONS[case])
    plain, x = ConvNet().double().requires_grad_(False), torch.randn(2, 4, 5, 6, dtype=torch.float64)
    model = adapted(plain, **{f"a{i}": c for i, c in enumerate(configs)})
    names = list(model.peft_config)
    model.add_weighted_adapter(names, weights, "sum", how)
    model.set_adapter("sum")
    expected = oracle(plain, model, names, weights, chain=how == "cat")(x)
    close(model(x), expected)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    close(PeftModel.from_pretrained(plain, tmp_path / "sum")(x), expected)


@torch.no_grad()
def test_projections_of_attention(tmp_path):
    """One of them lies in the wrapped module, and yet is named as before; ranks differ by layer."""
    layer = nn.TransformerEncoderLayer(6, 2, 9, batch_first=True)
    plain = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    pattern = {"rank_pattern": {"out_proj": 2, "linear1": 4}}
    model = adapted(plain, a=bone(3, ["in_proj", "out_proj"], **pattern), b=bone(3, ["out_proj", "linear1"], **pattern))
    model.add_weighted_adapter(["a", "b"], [0.5, 2], "sum")
    deltas = {}
    for path, wrapped in layers(model).items():
        W = wrapped.base.weight()
        parts = [w * (wrapped.adapters[n].weight(W) - W) for n, w in (("a", 0.5), ("b", 2)) if n in wrapped.adapters]
        close(wrapped.adapters["sum"].weight(W) - W, sum(parts))
        deltas[path] = parts
    assert len(deltas) == 6
    model.set_adapter("sum")
    y = model(x)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert torch.equal(PeftModel.from_pretrained(plain, tmp_path / "sum")(x), y)


# -- what is refused


@dataclass(frozen=True)
class Refused:
    name: str
    configs: Sequence[AdapterConfig]
    weights: Sequence[float]
    how: str
    message: str


LORA, NONE = 'exact is "lora"', "exact is none: merge one after the other"
REFUSED = [
    Refused("unequal r", [bone(3), bone(5)], [1, 1], "linear", rf"Bone \(r=3, weight 1\), Bone \(r=5.*; {LORA}"),
    Refused("two kinds", [bone(3), bat(3)], [1, 1], "linear", rf"Bone \(r=3.*Bat \(r=3.*{NONE}"),
    Refused("mini and balance", [mini(3, 3), miss(3)], [1, 1], "linear", LORA),
    Refused("two minis", [mini(3, 3), mini(3, 1)], [1, 1], "linear", LORA),
    Refused("bone and miss", [bone(3), miss(3)], [1, 1], "linear", rf"Bone .*Miss .*{LORA}"),
    Refused("bats of unequal r", [bat(3), bat(1)], [1, 1], "linear", rf"Bat \(r=3.*Bat \(r=1.*{NONE}"),
    Refused("bone cat", [bone(3), bone(3)], [1, 1], "cat", LORA),
    Refused("bat cat", [bat(3), bat(3)], [1, 1], "cat", NONE),
    Refused("hra linear", [hra(2), hra(2)], [1, 1], "linear", rf"HRA \(r=2, weight 1\), HRA \(r=2.*{LORA}"),
    Refused("hra, weights", [hra(2), hra(2)], [1, 0.5], "cat", rf"HRA \(r=2, weight 0.5\); {LORA}"),
    Refused("loha linear", [loha(2), loha(2)], [1, 1], "linear", rf"LoHa \(r=2, weight 1\).*{LORA}"),
    Refused("loha cat", [loha(2), loha(2)], [1, 1], "cat", LORA),
    Refused("mixed linear", [bone(3), lora(3)], [1, 1], "linear", LORA),
    Refused("mixed cat", [hra(2), lora(2)], [1, 1], "cat", LORA),
    Refused("bat in a lora", [bat(3, UP), lora(2)], [1, 1], "lora", 'Bat has full rank.*of this kind and one r .*"linear"'),
    Refused("bat alone in a lora", [bat(3)], [1], "lora", "Bat has full rank"),
    # One kind on every layer, but not one for all: no configuration describes that.
    Refused("two kinds apart", [bone(3, UP), bat(3, ["down"])], [1, 1], "linear", 'different kinds.*"lora"'),
    Refused("bat first", [bat(3, UP), bone(3, ["down"])], [1, 1], "linear", "different kinds"),
    Refused("minis apart", [mini(3, 3, UP), miss(3, ["down"])], [1, 1], "linear", "different kinds"),
    Refused("bone and miss apart", [bone(3, UP), miss(3, ["down"])], [1, 1], "linear", "different kinds"),
    Refused("biases", [hra(2, bias="all"), hra(2)], [1, 1], "cat", "'a' also trains biases"),
    Refused(
        "heads", [bone(3), bone(3, modules_to_save=["head"])], [1, 1], "linear", "'b' also trains .*fully fine-tuned modules"
    ),
    Refused("no such way", [lora(2), lora(2)], [1, 1], "svd", "expected 'linear', 'cat' or 'lora'; got 'svd'"),
    Refused("too few weights", [lora(2), lora(2)], [1], "linear", r"a weight each; got \['a', 'b'\] and \[1\]"),
    Refused("too many weights", [lora(2)], [1, 2], "linear", "a weight each"),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda c: c.name)
@torch.no_grad()
def test_refused(plain: MLP, x: Tensor, case: Refused):
    configs = copy.deepcopy(case.configs)
    model = adapted(plain, **dict(zip("abc", configs, strict=False)))
    before = state(model)
    with pytest.raises(HalotuneError, match=case.message):
        model.add_weighted_adapter(list(model.peft_config), list(case.weights), "sum", case.how)
    assert same_state(model, before) and "sum" not in model.peft_config


@torch.no_grad()
def test_names_that_cannot_be_combined(plain: MLP):
    model = adapted(plain, a=lora(2), b=lora(2))
    for names, weights, name, message in (
        (["a", "c"], [1, 1], "sum", r"no adapter named 'c'; the model has \['a', 'b'\]"),
        (["a", "a"], [1, 1], "sum", "expected different names"),
        ([], [], "sum", "expected different names"),
        (["a", "b"], [1, 1], "b", "an adapter named 'b' already"),
        (["a", "b"], [1, 1], "x.y", "adapter name 'x.y'"),
    ):
        with pytest.raises(HalotuneError, match=message):
            model.add_weighted_adapter(names, weights, name)
    model.merge_adapter()
    with pytest.raises(HalotuneError, match=r"combining needs the base's weights. Call unmerge_adapter\(\)"):
        model.add_weighted_adapter(["a", "b"], [1, 1], "sum")


# -- the new adapter is one like any other


def test_it_can_be_trained(plain: MLP, x: Tensor):
    model = adapted(plain, a=hra(2), b=hra(2, UP, task_type=TaskType.CAUSAL_LM))
    model.add_weighted_adapter(["b", "a"], [1, 1], "chain", "cat")
    assert model.peft_config["chain"].task_type == TaskType.CAUSAL_LM
    model.set_adapter("chain")
    model(x).square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(gradients) == {n for n, _ in model.named_parameters() if ".adapters.chain." in n}
    assert all(torch.isfinite(g).all() for g in gradients.values())  # zero columns too


@torch.no_grad()
def test_half_precision_bases(plain: MLP):
    """Adapters keep their own dtype, and factors are formed in it, not in the base's."""
    base = copy.deepcopy(plain).bfloat16()
    model = adapted(base, a=hra(2), b=loha(2))
    model.add_weighted_adapter(["a", "b"], [0.5, 2], "sum", "lora")
    for layer in layers(model).values():
        W = layer.base.weight().float()
        delta = 0.5 * (layer.adapters["a"].weight(W) - W) + 2 * (layer.adapters["b"].weight(W) - W)
        close(layer.adapters["sum"].weight(W) - W, delta)
        assert {p.dtype for p in layer.adapters["sum"].parameters()} == {torch.float32}


@torch.no_grad()
def test_a_sum_of_sums(plain: MLP, x: Tensor):
    model = adapted(plain, a=config("hra-r4"), b=config("bone-r7"), c=config("loha-r2"))
    model.add_weighted_adapter(["a", "b"], [0.5, 2], "ab", "lora")
    model.add_weighted_adapter(["ab", "c"], [-1, 1], "abc", "lora")
    model.set_adapter("abc")
    close(model(x), oracle(plain, model, ["a", "b", "c"], [-0.5, -2, 1], chain=False)(x))
