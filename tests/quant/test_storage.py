"""Single formats: what is recognised, what each is called, what goes wrong in other packages, and what is refused."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import halotune
from halotune import BoneConfig, HalotuneError, HRAConfig, LoHaConfig, PeftModel
from halotune.core.adapter import WeightShape
from halotune.core.base import base_for, base_kind
from halotune.core.layer import AdaptedLayer

from ..laws.cases import Model, relative
from .cases import BASES, IN, OPAQUE, OUT, READABLE, VARIANTS, Case, each_base, linear, matrix, some

HRA, LOHA = VARIANTS[0], VARIANTS[3]

NAMES = {
    "bnb-nf4": "bitsandbytes nf4",
    "bnb-nf4-double": "bitsandbytes nf4 (double)",
    "bnb-nf4-bf16": "bitsandbytes nf4 (double)",
    "bnb-fp4": "bitsandbytes fp4",
    "bnb-int8": "bitsandbytes int8",
    "ao-int8": "torchao Int8Tensor",
    "ao-int8-bf16": "torchao Int8Tensor",
    "ao-fp8": "torchao Float8Tensor",
    "hqq-4bit": "hqq 4-bit",
    "hqq-8bit": "hqq 8-bit",
    "packed": "tests",
}


@each_base()
def test_sizes_dtype_and_name(base):
    """The sizes are never those of a packed tensor, and an evaluation changes none of it."""
    module = Case(HRA, base).module()
    for _ in range(2):
        op = base_for(module)
        assert op.shape == WeightShape(OUT, IN) and op.dtype == base.dtype and op.device == torch.device("cpu")
        assert op.quantization == NAMES[base.name] and op.opaque is (base is OPAQUE)
        if not op.opaque:
            assert op.weight().shape == (OUT, IN) and op.weight().is_floating_point()
        with torch.no_grad():
            module.eval()(Case(HRA, base).input())


def test_packages_are_not_imported_before_a_layer_of_theirs_is():
    code = (
        "import sys, torch, halotune\n"
        "from halotune import HRAConfig, get_peft_model\n"
        "get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), HRAConfig(r=2, target_modules=['0']))\n"
        "assert not {'bitsandbytes', 'torchao', 'hqq', 'transformers'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("by_us", [False, True], ids=["before-it-was-adapted", "by-an-evaluation"])
def test_a_weight_that_bitsandbytes_rearranged(double, by_us):
    """On a CPU with AVX512-BF16 an evaluation does it. Read as it lies, the weight is noise; its own inverse misplaces the
    scales unless they are double-quantized; gradients are None.
    """
    from bitsandbytes.functional import _convert_weight_packed_for_cpu, dequantize_4bit

    (base,) = some("bnb-nf4-double" if double else "bnb-nf4")
    layer = Case(HRA, base).layer()
    module, W = layer.base_layer, matrix(layer.base_layer)
    before = copy.copy(module.weight.quant_state)
    module.weight.data, state = _convert_weight_packed_for_cpu(module.weight.data, module.weight.quant_state)
    assert state is module.quant_state
    if by_us:
        state.before = before
    assert relative(dequantize_4bit(module.weight.data.reshape(-1, 1), copy.copy(state)), W) > 0.3

    limit = 0.0 if by_us else 3e-3  # the scales were rounded to bf16
    assert relative(layer.base.weight(), W) <= limit
    assert relative(layer.merged_weight(["default"]), layer.adapters["default"].weight(W)) <= max(limit, 1e-6)
    assert state.packing_format_for_cpu  # reading changes nothing

    x = torch.randn(4, IN, requires_grad=True)
    layer.eval()
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    assert relative(gradient, layer.adapters["default"].weight(W).sum(0).expand(4, IN)) <= max(2 * limit, 1e-5)
    assert relative(matrix(module), W) <= limit


@torch.no_grad()
def test_saving_after_an_evaluation_leaves_the_base_alone(tmp_path):
    """Asked for its state, bitsandbytes puts a rearranged weight back with its scales in a wrong order: 20 % off."""
    (base,) = some("bnb-nf4")
    case = Case(HRA, base)
    model = halotune.get_peft_model(Model(case.module()), HRAConfig(r=4, target_modules=["layer"])).eval()
    x = case.input()
    y = model(x)
    model.save_pretrained(tmp_path)
    assert torch.equal(model(x), y)
    again = PeftModel.from_pretrained(Model(model.get_base_model().layer.base_layer), tmp_path)
    assert torch.equal(again(x), y)


def test_hra_on_eight_bits():
    """In peft off by 1e3, without an error."""
    (base,) = some("bnb-int8")
    layer = Case(HRA, base).layer()
    x = Case(HRA, base).input()
    for training in (True, False):
        layer.train(training)
        expected = nn.functional.linear(x, layer.adapters["default"].weight(matrix(layer.base_layer)), layer.base_layer.bias)
        assert relative(layer(x), expected) < (1e-5 if training else 0.02)


# -- gradients that a layer does not return


def dynamic(bias: bool = True) -> nn.Module:
    import torchao.quantization as q

    model = nn.Sequential(linear(torch.randn(OUT, IN) / IN**0.5, torch.zeros(OUT)))
    q.quantize_(model, q.Int8DynamicActivationInt8WeightConfig())
    return model[0]


@pytest.mark.parametrize("bias", ["none", "hra_only"])
def test_a_base_that_returns_no_gradient_is_refused_in_training(bias):
    """torchao with quantized activations: HRA would get no gradient at all, silently."""
    model = halotune.get_peft_model(Model(dynamic()), HRAConfig(r=4, target_modules=["layer"], bias=bias))
    x = torch.randn(3, IN)
    with pytest.raises(HalotuneError, match=r"Linear \(96, 192\) \[torchao Int8Tensor\] returns no gradient for its input"):
        model(x)
    with torch.no_grad():
        assert relative(model(x), model.get_base_model().layer.base_layer(x)) < 0.02  # HRA starts at the identity
    bone = halotune.get_peft_model(Model(dynamic()), BoneConfig(r=4, target_modules=["layer"]))
    bone(x).sum().backward()  # the input asks for none, and the adapter's own is right
    assert bone.get_base_model().layer.adapters["default"].bone_block.grad.abs().sum() > 0


@each_base()
def test_a_trained_bias_does_not_hide_a_gradient(base):
    """Where y requires a gradient anyhow, the graph is asked whether it reaches x."""
    layer = Case(HRA, base).layer()
    layer.base_layer.bias.requires_grad_()
    x = Case(HRA, base).input(requires_grad=True)
    found = torch.autograd.grad((layer(2 * x)).sum(), [x, layer.base_layer.bias])
    assert all(g.abs().sum() > 0 for g in found)


# -- layers that can only be called


def test_bat_needs_a_weight():
    with pytest.raises(HalotuneError, match=r"layer: Bat is a map on the weight itself, and that of PackedLinear \(96, 192\)"):
        halotune.get_peft_model(
            Model(Case(HRA, OPAQUE).module()), BoneConfig(r=3, init_weights="bat", target_modules=["layer"])
        )


@pytest.mark.parametrize("quantized", ["requantize", "keep_float"])
@pytest.mark.parametrize("safe", [False, True])
def test_merging_into_what_cannot_be_read_is_refused_before_anything_is_written(quantized, safe):
    model = nn.Sequential(Case(HRA, READABLE[0]).module(), nn.Linear(OUT, IN), Case(HRA, OPAQUE).module())
    model = halotune.get_peft_model(model, HRAConfig(r=4, target_modules=["0", "1", "2"]))
    weight = model.get_base_model()[0].base_layer.weight
    with pytest.raises(HalotuneError, match=r"^2: PackedLinear .* cannot be read, so nothing can be merged"):
        model.merge_adapter(safe_merge=safe, quantized=quantized)
    with pytest.raises(HalotuneError, match=r"^2: "):
        model.merge_and_unload(safe_merge=safe, quantized=quantized)
    assert model.get_base_model()[0].base_layer.weight is weight and not model.base_model.merged_adapters


def test_what_quantized_layers_look_like():
    """Sizes under their names, packed numbers, no float weight: and nothing else."""
    from transformers.integrations.finegrained_fp8 import FP8Linear

    assert base_kind(FP8Linear(256, 128)) is type(base_for(Case(HRA, OPAQUE).module()))
    assert base_for(FP8Linear(256, 128)).shape == WeightShape(128, 256)

    class Old(nn.Module):  # auto-gptq's names
        def __init__(self):
            super().__init__()
            self.infeatures, self.outfeatures = 8, 4
            self.register_buffer("qweight", torch.zeros(1, 4, dtype=torch.int32))
            self.register_buffer("scales", torch.ones(1, 4, dtype=torch.bfloat16))

    assert base_for(Old()).shape == WeightShape(4, 8) and base_for(Old()).dtype == torch.bfloat16

    class Router(nn.Module):
        in_features, out_features = 8, 4

    for module in (nn.Embedding(3, 4), nn.LayerNorm(3), nn.Bilinear(2, 3, 4), Router()):
        assert base_kind(module) is None


# -- formats that can be read and not written


def test_a_format_that_cannot_be_made_again_is_merged_into_floats():
    import torchao.quantization as q

    model = Model(linear(torch.randn(OUT, IN) / IN**0.5, torch.zeros(OUT)))
    q.quantize_(model, q.IntxWeightOnlyConfig())
    module = model.layer
    wrapped = halotune.get_peft_model(model, HRAConfig(r=3, init_weights=False, target_modules=["layer"])).eval()
    x = torch.randn(3, IN)
    y = wrapped(x)
    with pytest.raises(HalotuneError, match=r"^layer: Linear .*Intx.* not requantized.*keep_float"):
        wrapped.merge_adapter()
    report = wrapped.merge_adapter(quantized="keep_float")
    assert report.total().lost < 1e-6 and relative(wrapped(x), y) < 1e-5
    wrapped.unmerge_adapter()
    assert wrapped.get_base_model().layer.base_layer is module and torch.equal(wrapped(x), y)


def test_torchao_scales_of_the_input_belong_to_the_weight():
    """AWQ and SmoothQuant multiply x by a vector first."""
    import torchao.quantization as q

    model = Model(linear(torch.randn(OUT, IN) / IN**0.5, torch.zeros(OUT)))
    q.quantize_(model, q.Int8WeightOnlyConfig())
    model.layer.weight.act_pre_scale = torch.rand(IN) + 0.5
    x = torch.randn(3, IN)
    op = base_for(model.layer)
    assert relative(nn.functional.linear(x, op.weight(), model.layer.bias), model(x)) < 1e-5
    assert not op.can_write


@pytest.mark.parametrize("granularity", ["PerTensor", "PerRow", "PerGroup"])
def test_torchao_scales_are_shared_as_before(granularity):
    import torchao.quantization as q
    from torchao.quantization import granularity as kinds

    chosen = kinds.PerGroup(32) if granularity == "PerGroup" else getattr(kinds, granularity)()
    model = Model(linear(torch.randn(OUT, IN) / IN**0.5, torch.zeros(OUT)))
    q.quantize_(model, q.Int8WeightOnlyConfig(granularity=chosen))
    layer = AdaptedLayer(model.layer)
    layer.add("default", Case(HRA, READABLE[0]).adapter())
    old = model.layer.weight
    layer.merge(["default"])
    new = layer.base_layer.weight
    assert list(new.block_size) == list(old.block_size) and new.scale.shape == old.scale.shape
    assert not torch.equal(new.qdata, old.qdata) and new.dtype == old.dtype


def test_a_layer_that_was_not_quantized_yet():
    from bitsandbytes.nn import Linear4bit

    with pytest.raises(HalotuneError, match=r"Linear4bit is not quantized yet.*Move the model"):
        halotune.get_peft_model(Model(Linear4bit(64, 32)), HRAConfig(r=2, target_modules=["layer"]))


# -- what is said


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (HRAConfig(r=4), None),
        (BoneConfig(r=3), None),
        (LoHaConfig(r=2), None),
        (LoHaConfig(r=16), r"LoHa with r=16 .*1 quantized layers \(such as layer, bitsandbytes nf4\) are then dequantized"),
        (BoneConfig(r=3, init_weights="bat"), r"Bat with r=3 .* dequantized, one at a time"),
    ],
)
def test_who_dequantizes_says_so_once(config, said):
    config.target_modules = ["layer"]
    model = Model(Case(HRA, READABLE[0]).module())
    if said is None:
        model = halotune.get_peft_model(model, config)
    else:
        with pytest.warns(UserWarning, match=said):
            model = halotune.get_peft_model(model, config)
    for _ in range(2):
        model(torch.randn(3, IN)).sum().backward()  # no more warnings: they are errors here


def test_every_format_has_a_name_here():
    assert {b.name for b in BASES} == NAMES.keys()
    assert isinstance(matrix(Case(LOHA, OPAQUE).module()), Tensor)
