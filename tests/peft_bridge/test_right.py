"""Where peft is wrong: right here, and said once."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

import halotune
from halotune import HalotuneError

from ..interop.models import base, error, inputs, output, randomize
from .models import LLAMA, Single, calm, every, in_order, live, pair, peft, same, tensors, two

pytestmark = calm


def heard(call: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


def hra_conv(**kwargs: Any) -> Any:
    return live(peft.HRAConfig(r=4, target_modules=["layer"]), Single(nn.Conv2d(3, 5, 3, **kwargs)))


GEOMETRY: dict[str, tuple[dict[str, Any], str]] = {
    "stride": ({"stride": (2, 1)}, "first stride and padding"),
    "padding": ({"padding": (2, 0)}, "first stride and padding"),
    "dilation": ({"dilation": 2}, "drops its dilation"),
    "reflect": ({"padding": 1, "padding_mode": "reflect"}, "padding mode"),
    "circular": ({"padding": 1, "padding_mode": "circular"}, "padding mode"),
}


@pytest.mark.parametrize("kwargs, message", GEOMETRY.values(), ids=GEOMETRY)
def test_hra_on_convolutions(kwargs: dict[str, Any], message: str) -> None:
    """The convolution with the merged kernel, which peft computes rightly, is the truth."""
    model, x = hra_conv(**kwargs), torch.randn(2, 3, 9, 8)
    merged = copy.deepcopy(model).merge_and_unload()
    wrong = model(x)
    assert wrong.shape != merged(x).shape or error(wrong, merged(x)) > 1e-2
    said = heard(lambda: halotune.speed_up(model)(x))
    assert len(said) == 1 and message in said[0] and "layer" in said[0]
    assert error(model(x), merged(x)) < 1e-5
    assert not heard(lambda: halotune.speed_up(hra_conv(**kwargs))(x))  # once


def test_oft_on_convolutions() -> None:
    """Those with a kernel are as the merged weight says; peft adds patches where they overlap."""
    model, x = (
        live(peft.OFTConfig(oft_block_size=6, target_modules=["layer"]), Single(nn.Conv2d(2, 5, 3))),
        torch.randn(2, 2, 9, 8),
    )
    merged = copy.deepcopy(model).merge_and_unload()
    assert error(model(x), merged(x)) > 1e-2
    said = heard(lambda: halotune.speed_up(model)(x))
    assert len(said) == 1 and "overlapping patches" in said[0]
    assert error(model(x), merged(x)) < 1e-5


def test_the_order_of_two_oft_adapters() -> None:
    """It is the order in which they would be merged."""
    model = two(LLAMA["oft"])
    model.base_model.set_adapter(["default", "b"])
    merged, wrong = copy.deepcopy(model).merge_and_unload(adapter_names=["default", "b"]), output(model)
    assert error(wrong, output(merged)) > 1e-2
    said = heard(lambda: halotune.speed_up(model))
    assert len(said) == 1 and "order opposite" in said[0]
    assert error(output(model), output(merged)) < 1e-5


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
@pytest.mark.parametrize("tucker", [False, True], ids=["flat", "tucker"])
def test_loha_pads_as_the_convolution_does(mode: str, tucker: bool) -> None:
    config = peft.LoHaConfig(r=2, target_modules=["layer"], use_effective_conv2d=tucker)
    model = live(config, Single(nn.Conv2d(3, 5, 3, padding=1, padding_mode=mode)))
    x = torch.randn(2, 3, 9, 8)
    merged = copy.deepcopy(model).merge_and_unload()
    assert error(model(x), merged(x)) > 1e-2
    said = heard(lambda: halotune.speed_up(model))
    assert sum("pads with zeros" in s for s in said) == 1
    assert error(model(x), merged(x)) < 1e-5


def test_gradients_of_the_tucker_form() -> None:
    config = peft.LoHaConfig(r=2, target_modules=["layer"], use_effective_conv2d=True)
    theirs = live(config, Single(nn.Conv2d(3, 4, 3))).double()
    ours = copy.deepcopy(theirs)
    assert ["Tucker" in s for s in heard(lambda: halotune.speed_up(ours))] == [True]
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    names = [name for name, p in ours.named_parameters() if p.requires_grad]

    def run(model: Any, *tensors: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, dict(zip(names, tensors, strict=True)), (x,))

    values = [dict(ours.named_parameters())[n].detach().clone().requires_grad_() for n in names]
    assert gradcheck(lambda *t: run(ours, *t), values)
    assert not gradcheck(lambda *t: run(theirs, *t), values, raise_exception=False)


def test_hra_on_8_bit_weights() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    linear = bnb.nn.Linear8bitLt(32, 16, has_fp16_weights=False)
    linear.load_state_dict(nn.Linear(32, 16).state_dict())
    model = live(peft.HRAConfig(r=4, target_modules=["layer"]), Single(linear.to("cpu")))
    vectors, x = model.base_model.model.layer.hra_u["default"].float(), torch.randn(3, 32)
    unit = vectors / vectors.norm(dim=0)
    rotated = x
    for i in reversed(range(4)):  # x Qᵀ, Q = H_1 … H_4
        rotated = rotated - 2 * (rotated @ unit[:, i : i + 1]) @ unit[:, i : i + 1].T
    expected = model.base_model.model.layer.base_layer(rotated)
    assert error(model(x), expected) > 1
    said = heard(lambda: halotune.speed_up(model))
    assert sum("codes of 8-bit weights" in s for s in said) == 1
    assert error(model(x), expected) < 0.02


def test_a_zero_column() -> None:
    model = live(LLAMA["hra"]())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "hra_u" in name:
                p[:, 1] = 0
    assert output(model).isnan().all()
    said = heard(lambda: halotune.speed_up(model))
    assert len(said) == 1 and "zero column" in said[0] and "3 more layers" in said[0]
    y = output(model)
    assert y.isfinite().all()
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_pefts_own_start_under_gram_schmidt() -> None:
    model = peft.get_peft_model(base("llama"), LLAMA["hra"](apply_GS=True)).eval()
    said = heard(lambda: halotune.speed_up(model))
    assert len(said) == 1 and "linearly dependent" in said[0]
    assert output(model).isfinite().all()


@pytest.mark.parametrize("config", [LLAMA["hra"], LLAMA["bat"]], ids=["hra", "bat"])
def test_disabled_while_merged_in_half_precision(config: Any) -> None:
    theirs, ours = pair(live(config(), dtype=torch.bfloat16))
    state = tensors(ours)
    for model in (theirs, ours):
        model.merge_adapter()
    with theirs.disable_adapter():
        output(theirs)
    assert not same(tensors(theirs), state)

    def disabled() -> None:
        with ours.disable_adapter():
            output(ours)

    said = heard(disabled)
    assert len(said) == 1 and "bit for bit" in said[0]
    assert same(tensors(ours), state)
    ours.merge_adapter()
    assert not heard(disabled)


@in_order
def test_one_of_two_merged(config: Any) -> None:
    model = two(config)
    model.base_model.set_adapter(["default", "b"])
    expected = output(model)
    halotune.speed_up(model)
    said = heard(lambda: model.merge_adapter(["default"]))
    assert len(said) == 1 and "['b'] stay active" in said[0]
    assert error(output(model), expected) < 1e-5


def test_an_order_that_a_merge_would_change() -> None:
    model = two(LLAMA["hra"])
    model.base_model.set_adapter(["default", "b"])
    halotune.speed_up(model)
    state = tensors(model)
    with pytest.raises(HalotuneError, match=r"layers\.0\.self_attn\.q_proj: the active adapters apply in the order"):
        model.merge_adapter(["b"])
    assert same(tensors(model), state)


@every
@pytest.mark.parametrize("safe", [True, False])
def test_merging_nan(config: Any, safe: bool) -> None:
    model = halotune.speed_up(live(config()))
    next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))
    weights = {name: t for name, t in tensors(model).items() if "base_layer" in name}
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(safe_merge=safe)
    assert all(torch.equal(model.state_dict()[name], t) for name, t in weights.items())


def test_a_tied_weight() -> None:
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = live(peft.HRAConfig(r=2, target_modules=["lm_head"]), "tied")
    expected, embedding = output(model), model.get_input_embeddings().weight.clone()
    halotune.speed_up(model)
    assert any("shares its weight" in s for s in heard(model.merge_adapter))
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert error(output(model), expected) < 1e-5
    model.unmerge_adapter()
    assert model.get_base_model().lm_head.base_layer.weight is model.get_input_embeddings().weight
    assert error(output(model), expected) < 1e-5


@every
@pytest.mark.filterwarnings("ignore:adapter_names. each sample goes through its own")
def test_a_batch_of_several_adapters(config: Any) -> None:
    model = two(lambda **kwargs: config(task_type="CAUSAL_LM", modules_to_save=["lm_head"], **kwargs))
    halotune.speed_up(model)
    x, alone = inputs(model), {"__base__": output(base("llama"))}
    for name in ("default", "b"):
        model.set_adapter(name)
        alone[name] = output(model)
    for names in (["b", "default"], ["__base__", "b"], ["default", "default"]):
        y = model(input_ids=x, adapter_names=names).logits
        assert all(error(y[i], alone[name][i]) < 1e-5 for i, name in enumerate(names))
    assert not heard(lambda: model(input_ids=x, adapter_names=["b", "default"]))
    with pytest.raises(HalotuneError, match=r"\['typo'\]; the model has \['b', 'default'\]"):
        model(input_ids=x, adapter_names=["typo", "b"])
    for beams in (1, 2):
        options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
        mixed = model.generate(input_ids=x, adapter_names=["b", "default"], **options)
        for i, name in enumerate(["b", "default"]):
            model.set_adapter(name)
            assert torch.equal(mixed[i], model.generate(input_ids=x, **options)[i])
    model.merge_adapter()
    with pytest.raises(HalotuneError, match="merged"):
        model(input_ids=x, adapter_names=["b", "default"])


def test_names_are_said_to_work_once() -> None:
    model = halotune.speed_up(live(LLAMA["hra"]()))
    with pytest.warns(UserWarning, match="peft ignores the names"):
        model(input_ids=inputs(model), adapter_names=["default", "__base__"])


def test_two_kinds_of_miss_on_one_layer() -> None:
    model = live(LLAMA["miss"]())
    expected = output(model)
    model.add_adapter("b", LLAMA["bat"]())
    halotune.speed_up(model)
    assert error(output(model), expected) < 1e-5
    model.set_adapter("b")
    assert torch.equal(output(model), output(base("llama")))  # BAT starts as the identity
    alone = live(LLAMA["bat"](), seed=1)
    randomize(model, seed=1)
    assert error(output(model), output(alone)) < 1e-5


def test_bat_with_dropout() -> None:
    said = heard(lambda: halotune.speed_up(live(LLAMA["bat"](miss_dropout=0.5))))
    assert len(said) == 1 and "not defined for BAT" in said[0]


def test_an_adapter_added_later_is_spoken_of_too() -> None:
    model = halotune.speed_up(live(LLAMA["hra"]()))
    model.add_adapter("b", LLAMA["hra"](target_modules=["o_proj"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("hra_u.b"):
                p[:, 0] = 0
    model.set_adapter("b")
    said = heard(lambda: output(model))
    assert len(said) == 1 and "zero column" in said[0] and "o_proj" in said[0]
