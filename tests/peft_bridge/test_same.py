"""Sped up, a model of peft's computes, trains, saves and looks as before."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import halotune

from ..interop.models import base, error, output, randomize
from ..interop.test_peft_live import CASES, Case
from .models import LLAMA, Single, calm, every, fast_layers, live, pair, peft, same, tensors

pytestmark = calm
OURS = {name: c for name, c in CASES.items() if c.config != "LoraConfig"}
cases = pytest.mark.parametrize("case", [pytest.param(c, id=name) for name, c in OURS.items() if c.trains])


def gradients(model: nn.Module, y: Tensor | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    y = output(model) if y is None else y
    target = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    (y - target).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def agree(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> bool:
    return a.keys() == b.keys() and all(error(a[name], g) < tolerance for name, g in b.items() if g.norm() > 1e-9)


@cases
def test_outputs_and_gradients(case: Case) -> None:
    theirs, ours = pair(randomize(case.theirs()).eval())
    assert error(output(ours), output(theirs)) < 1e-5
    assert agree(gradients(ours), gradients(theirs), 1e-5)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize(
    "config, layer, size",
    [
        pytest.param(
            peft.HRAConfig(r=3, init_weights=False), lambda b: nn.Conv2d(3, 5, 3, 2, 1, bias=b), (2, 3, 7, 9), id="hra"
        ),
        pytest.param(
            peft.HRAConfig(r=2, apply_GS=True, init_weights=False), lambda b: nn.Conv2d(3, 5, 2, bias=b), (3, 5, 5), id="hra-gs"
        ),
        pytest.param(
            peft.LoHaConfig(r=2), lambda b: nn.Conv2d(4, 6, (3, 2), 2, (1, 0), (1, 2), 2, bias=b), (2, 4, 7, 9), id="loha"
        ),
        pytest.param(peft.LoHaConfig(r=2), lambda b: nn.Conv2d(4, 6, 3, padding="same", bias=b), (2, 4, 7, 9), id="loha-same"),
        pytest.param(peft.LoHaConfig(r=2), lambda b: nn.Conv1d(4, 6, 3, 2, 1, 2, 2, bias=b), (2, 4, 9), id="loha-1d"),
    ],
)
def test_convolutions(config: Any, layer: Any, size: tuple[int, ...], bias: bool) -> None:
    config = copy.copy(config)
    config.target_modules = ["layer"]
    theirs, ours = pair(live(config, Single(layer(bias))))
    assert fast_layers(ours) == ["base_model.model.layer"]
    x = torch.randn(size)
    assert error(ours(x), theirs(x)) < 1e-5
    assert agree(gradients(ours, ours(x)), gradients(theirs, theirs(x)), 1e-5)


@pytest.mark.parametrize("case", [pytest.param(OURS["loha-tucker"], id="loha-tucker")])
def test_tucker_outputs(case: Case) -> None:
    """peft's gradients of this form are another test's."""
    model = randomize(case.theirs()).eval()
    expected = output(model)
    with pytest.warns(UserWarning, match="Tucker"):
        halotune.speed_up(model)
    assert error(output(model), expected) < 1e-5


@cases
def test_an_optimizer_goes_on(case: Case) -> None:
    """Three steps of peft's, then three of ours: the losses of six of peft's, from one state of AdamW."""
    torch.manual_seed(0)
    start = randomize(case.theirs(), std=0.05).eval()
    losses = []
    for change in (False, True):
        model = copy.deepcopy(start)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        losses.append([])
        for step in range(6):
            if change and step == 3:
                halotune.speed_up(model)
            y = output(model)
            loss = (y - torch.linspace(-1, 1, y.numel()).reshape(y.shape)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert abs(losses[0][-1] - losses[0][2]) > 1e-4 * losses[0][2]


@cases
def test_files_names_and_looks(case: Case, tmp_path) -> None:
    model = randomize(case.theirs())
    looks, state = repr(model), tensors(model)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    model.save_pretrained(tmp_path / "before", **case.save)
    assert halotune.speed_up(model) is model
    output(model)
    model.save_pretrained(tmp_path / "after", **case.save)
    files = ["adapter_model.safetensors", "adapter_config.json"]
    assert all((tmp_path / "before" / f).read_bytes() == (tmp_path / "after" / f).read_bytes() for f in files)
    assert repr(model) == looks
    assert same(tensors(model), state)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters


@every
def test_twice_is_as_good_as_once_and_it_can_be_undone(config: Any) -> None:
    model = live(config())
    classes, expected = [type(m) for m in model.modules()], output(model)
    hooks = len(model.get_base_model()._forward_pre_hooks)
    attributes = [set(m.__dict__) for m in model.modules()]
    halotune.speed_up(halotune.speed_up(model))
    assert len(model.get_base_model()._forward_pre_hooks) == hooks + 1
    assert len(fast_layers(model)) == 4
    assert all(isinstance(m, c) for m, c in zip(model.modules(), classes, strict=True))
    output(model)
    assert halotune.slow_down(halotune.slow_down(model)) is model
    assert [type(m) for m in model.modules()] == classes
    assert [set(m.__dict__) for m in model.modules()] == attributes
    assert len(model.get_base_model()._forward_pre_hooks) == hooks
    assert torch.equal(output(model), expected)
    halotune.speed_up(model)
    assert len(fast_layers(model)) == 4


@every
@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(config: Any, how: Any) -> None:
    """A copy is as fast, stands on its own, and can be trained, merged and undone; merged or not."""
    model = halotune.speed_up(live(config()))
    expected, state = output(model), tensors(model)
    other = how(model)
    assert len(fast_layers(other)) == 4
    randomize(other, seed=5)
    assert error(output(other), expected) > 1e-3
    assert torch.equal(output(model), expected)
    merged = how(model.merge_adapter() or model)
    assert error(output(merged), expected) < 1e-5
    merged.unmerge_adapter()
    assert same(tensors(merged), state)
    slow = halotune.slow_down(how(merged))
    assert not fast_layers(slow)
    assert error(output(slow), expected) < 1e-5


@every
@pytest.mark.parametrize("autocast", [True, False], ids=["fp32-adapter", "bf16-adapter"])
def test_half_precision(config: Any, autocast: bool) -> None:
    """In bf16 both are near the fp32 model; dtypes are peft's."""
    exact = output(live(config()))
    model = peft.get_peft_model(base("llama", torch.bfloat16), config(), autocast_adapter_dtype=autocast).eval()
    for p, q in zip(model.parameters(), live(config()).parameters(), strict=True):
        p.data.copy_(q)
    theirs, ours = pair(model)
    assert output(ours).dtype == output(theirs).dtype == torch.bfloat16
    assert error(output(ours), exact) < max(0.03, 1.5 * error(output(theirs), exact))
    grads = gradients(ours)
    assert {name: g.dtype for name, g in grads.items()} == {name: g.dtype for name, g in gradients(theirs).items()}


@every
def test_autocast(config: Any) -> None:
    theirs, ours = pair(live(config()))
    with torch.autocast("cpu", torch.bfloat16):
        a, b = output(ours), output(theirs)
        x = torch.randn(2, 3, ours.get_base_model().config.hidden_size)
        layers = [m.get_base_model().model.layers[0].self_attn.q_proj for m in (ours, theirs)]
        assert layers[0](x).dtype == layers[1](x).dtype == torch.float32
    assert a.dtype == b.dtype
    assert error(a, output(theirs)) < 0.03


@pytest.mark.parametrize("config", [LLAMA["hra"], LLAMA["bat"]], ids=["hra", "bat"])
def test_inputs_of_another_dtype(config: Any) -> None:
    """peft casts what reaches these layers, and casts back."""
    theirs, ours = pair(live(config(), dtype=torch.bfloat16))
    x = torch.randn(2, 3, ours.get_base_model().config.hidden_size)
    a, b = (m.get_base_model().model.layers[0].self_attn.q_proj(x) for m in (ours, theirs))
    assert a.dtype == b.dtype == torch.float32
    assert error(a, b) < 0.03


@every
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "plain"])
def test_gradient_checkpointing(config: Any, reentrant: bool) -> None:
    theirs, ours = pair(live(config()))
    expected = gradients(theirs)
    ours.train()
    ours.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    ours.enable_input_require_grads()
    assert agree(gradients(ours), expected, 1e-5)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own compiler does it
@every
def test_compiled_in_one_graph(config: Any) -> None:
    targets = {"target_modules": ["0", "1"]}
    model = halotune.speed_up(live(config(**targets), "mlp"))
    model.add_adapter("b", config(**targets))
    model.set_adapter("b")
    randomize(model, seed=1)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for name in ("b", "default"):  # it follows a switch
        model.set_adapter(name)
        assert error(output(compiled), output(model)) < 1e-5
    with model.disable_adapter():
        assert error(output(compiled), output(model)) < 1e-5


@pytest.mark.parametrize(
    "config, training",
    [
        pytest.param(LLAMA["loha"](rank_dropout=0.5), "rank", id="rank_dropout"),
        pytest.param(LLAMA["loha"](module_dropout=0.5), "module", id="module_dropout"),
        pytest.param(LLAMA["miss"](miss_dropout=0.5), "input", id="miss_dropout"),
    ],
)
def test_dropout(config: Any, training: str) -> None:
    """On in training alone, with peft's mean over many draws; what is switched off in peft's layer is off here."""
    theirs, ours = pair(live(config))
    x = torch.randn(4, ours.get_base_model().config.hidden_size)
    layer, other = (m.get_base_model().model.layers[0].self_attn.q_proj for m in (ours, theirs))
    assert torch.equal(layer(x), layer(x))
    assert error(layer(x), other(x)) < 1e-5
    ours.train(), theirs.train()
    assert len({layer(x).sum().item() for _ in range(20)}) > 1
    mean, expected = (torch.stack([m(x) for _ in range(1500)]).mean(0) - m.base_layer(x) for m in (layer, other))
    assert error(mean, expected) < 0.15
    for m in layer.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    if training == "input":
        assert torch.equal(layer(x), layer(x))
