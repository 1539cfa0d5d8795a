"""New weights in place: the parameters stay the same objects, and a compiled model stays compiled."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._dynamo.exc import RecompileError

from halotune import (
    BoneConfig,
    HalotuneError,
    HRAConfig,
    LoHaConfig,
    LoraConfig,
    MissConfig,
    PeftModel,
    hotswap_adapter,
)
from halotune.core.config import AdapterConfig

from .models import MLP, adapted, close, composed, config, differ, every_method, randomized, same_state, state

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler


def saved(plain: MLP, folder: Path, config: AdapterConfig) -> PeftModel:
    """Another adapter of this configuration, in files."""
    model = adapted(plain, default=config)
    model.save_pretrained(folder)
    return model


@every_method
@torch.no_grad()
def test_parameters_stay_in_place(plain: MLP, x: Tensor, tmp_path, method: str):
    other = saved(plain, tmp_path, config(method))
    model = adapted(plain, a=config(method), b=config("hra-r4"))
    parameters = {n: (id(p), p.data_ptr(), p.requires_grad) for n, p in model.named_parameters()}
    before, y = state(model), model(x)  # what is computed from the old weights must not be kept

    result = hotswap_adapter(model, tmp_path, "a")
    assert result.missing_keys == result.unexpected_keys == []
    assert torch.equal(model(x), other(x)) and differ(model(x), y)
    assert {n: (id(p), p.data_ptr(), p.requires_grad) for n, p in model.named_parameters()} == parameters
    changed = {n for n, p in model.state_dict().items() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if ".adapters.a." in n}


class OneLayer(nn.Module):
    """Little to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


@every_method
@torch.no_grad()
def test_a_compiled_model_is_not_compiled_again(tmp_path, method: str):
    plain, x = OneLayer().double(), torch.randn(5, 6, dtype=torch.float64)
    others = [saved(plain, tmp_path / str(i), config(method, ["up"])) for i in range(2)]
    model = adapted(plain, a=config(method, ["up"]))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    y = compiled(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i, other in enumerate(others):
            hotswap_adapter(compiled, tmp_path / str(i), "a")
            close(compiled(x), other(x))
            assert differ(compiled(x), y)


@torch.no_grad()
def test_what_does_compile_again_is_right():
    """Active adapters, scales and merges are part of the compiled code; so the test above could fail."""
    plain, x = OneLayer().double(), torch.randn(5, 6, dtype=torch.float64)
    model = adapted(plain, a=config("hra-r4", ["up"]), b=config("bat-r3", ["up"]))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(compiled(x), composed(plain, model, ["a"])(x))
    model.set_adapter(["b", "a"])
    with torch._dynamo.config.patch(error_on_recompile=True), pytest.raises(RecompileError):
        compiled(x)
    close(compiled(x), composed(plain, model, ["b", "a"])(x))
    model.set_scale("b", 0.3)
    close(compiled(x), composed(plain, model, ["b", "a"], {"b": 0.3})(x))
    model.merge_adapter(["b"])
    close(compiled(x), composed(plain, model, ["b", "a"], {"b": 0.3})(x))
    with model.disable_adapter():
        close(compiled(x), plain(x))


def test_training_goes_on(plain: MLP, x: Tensor, tmp_path):
    """An optimizer still holds the parameters that are used."""
    saved(plain, tmp_path, config("hra-r4"))
    model = adapted(plain, a=config("hra-r4"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    hotswap_adapter(model, tmp_path, "a")
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        assert model(x).square().mean() < loss


# -- what is refused

DIFFERENT: dict[str, tuple[AdapterConfig, AdapterConfig, str]] = {
    "r": (HRAConfig(r=4), HRAConfig(r=2), "r: 4 here, 2 there"),
    "targets": (LoraConfig(r=2), LoraConfig(r=2, exclude_modules=["up"]), r"exclude_modules: None here, \['up'\]"),
    "alpha": (LoHaConfig(r=2, alpha=3), LoHaConfig(r=2, alpha=4), "alpha: 3 here, 4 there"),
    "rslora": (LoraConfig(r=2), LoraConfig(r=2, use_rslora=True), "use_rslora: False here, True there"),
    "GS": (HRAConfig(r=4), HRAConfig(r=4, apply_GS=True, init_weights=False), "apply_GS: False here, True there"),
    "kind": (BoneConfig(r=3), BoneConfig(r=3, init_weights="bat"), "init_weights: True here, 'bat' there"),
    "mini": (MissConfig(r=3), MissConfig(r=3, init_weights="mini"), "init_weights: True here, 'mini' there"),
    "rank_pattern": (HRAConfig(r=4), HRAConfig(r=4, rank_pattern={"up": 2}), "rank_pattern: .* {'up': 2} there"),
    "method": (LoHaConfig(r=2), LoraConfig(r=2), "peft_type: 'LOHA' here, 'LORA' there"),
    "whole": (HRAConfig(r=4), HRAConfig(r=4, modules_to_save=["head"]), r"modules_to_save: None here, \['head'\]"),
}


@pytest.mark.parametrize("field", DIFFERENT)
@torch.no_grad()
def test_another_configuration(plain: MLP, tmp_path, field: str):
    here, there, message = copy.deepcopy(DIFFERENT[field])
    here.target_modules = there.target_modules = {"up", "down"}
    saved(plain, tmp_path, there)
    model = adapted(plain, a=here)
    before = state(model)
    with pytest.raises(HalotuneError, match=rf"cannot be swapped into 'a'.*{message}.*load_adapter with another name"):
        hotswap_adapter(model, tmp_path, "a")
    assert same_state(model, before)


@torch.no_grad()
def test_initial_values_and_bookkeeping_may_differ(plain: MLP, x: Tensor, tmp_path):
    other = saved(plain, tmp_path, HRAConfig(r=4, target_modules=["up"], init_weights=False))
    entries = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**entries, "revision": "x", "task_type": "CAUSAL_LM"}))
    model = adapted(plain, a=HRAConfig(r=4, target_modules=["up"]))
    hotswap_adapter(model, tmp_path, "a")
    assert torch.equal(model(x), other(x))


BROKEN = {
    "missing": lambda t: {k: v for k, v in t.items() if "0.up" not in k},
    "extra": lambda t: {**t, "base_model.model.nowhere.hra_u": torch.zeros(2)},
    "shape": lambda t: {k: v[:, :2].contiguous() for k, v in t.items()},
    "NaN": lambda t: {k: v / 0 * 0 if "1.down" in k else v for k, v in t.items()},  # the others are good
}


@pytest.mark.parametrize("how", [*BROKEN, "truncated", "absent"])
@torch.no_grad()
def test_a_bad_file_leaves_the_old_weights(plain: MLP, x: Tensor, tmp_path, how: str):
    saved(plain, tmp_path, config("hra-r4", ["up", "down"]))
    file = tmp_path / "adapter_model.safetensors"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-9])
    elif how == "absent":
        file.unlink()
    else:
        save_file(BROKEN[how](load_file(file)), file)
    model = adapted(plain, a=config("hra-r4", ["up", "down"]))
    before, y = state(model), model(x)
    with pytest.raises(HalotuneError, match="adapter_model.safetensors|" + str(tmp_path)):
        hotswap_adapter(model, tmp_path, "a")
    assert same_state(model, before) and torch.equal(model(x), y)


@torch.no_grad()
def test_not_while_merged(plain: MLP, x: Tensor, tmp_path):
    """The weights hold the old adapter: the swap would show only after an unmerge."""
    other = saved(plain, tmp_path, config("hra-r4"))
    model = adapted(plain, a=config("hra-r4"), b=config("hra-r4"))
    model.merge_adapter(["a"])
    before = state(model)
    with pytest.raises(HalotuneError, match=r"'a' is merged.*unmerge_adapter\(\) first"):
        hotswap_adapter(model, tmp_path, "a")
    assert same_state(model, before)
    hotswap_adapter(model, tmp_path, "b")  # not merged
    model.unmerge_adapter()
    model.set_adapter("b")
    assert torch.equal(model(x), other(x))


@torch.no_grad()
def test_no_such_adapter(plain: MLP, tmp_path):
    saved(plain, tmp_path, config("hra-r4"))
    model = randomized(adapted(plain, a=config("hra-r4")))
    with pytest.raises(HalotuneError, match=r"no adapter named 'default'; the model has \['a'\]"):
        hotswap_adapter(model, tmp_path)
