"""What names experts, and what is said where a name means something else."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import halotune
from halotune import BoneConfig, HalotuneError, HRAConfig, LoraConfig
from halotune.engine.injection.modules import adapted_layers

from .toys import HIDDEN, Block, block

BOTH = {"experts.gate_up_proj", "experts.down_proj"}


class Shared(Block):
    """With a shared expert, whose layers have the same names."""

    def __init__(self) -> None:
        super().__init__()
        self.shared_expert = nn.ModuleDict({"down_proj": nn.Linear(HIDDEN, HIDDEN)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.shared_expert["down_proj"](x)


def found(model: nn.Module, config) -> set[str]:
    return set(adapted_layers(halotune.get_peft_model(model, config).get_base_model()))


def test_parameters_are_named_by_their_endings():
    assert found(block(), HRAConfig(r=2, target_parameters=["gate_up_proj", "experts.down_proj"])) == BOTH
    assert found(block(), HRAConfig(r=2, target_parameters=["down_proj"])) == {"experts.down_proj"}
    both_kinds = HRAConfig(r=2, target_modules=["out"], target_parameters=["down_proj"])
    assert found(block(), both_kinds) == {"experts.down_proj", "out"}
    assert found(block(), HRAConfig(r=2, target_parameters=["out.weight"])) == {"out"}  # as in peft
    assert found(block(), HRAConfig(r=2, target_parameters=BOTH, exclude_modules=["gate_up_proj"])) == {"experts.down_proj"}


def test_names_that_mean_nothing():
    with pytest.raises(HalotuneError, match=r"'proj' names no weight .* experts\.down_proj, experts\.gate_up_proj"):
        found(block(), HRAConfig(r=2, target_parameters=["proj"]))
    with pytest.raises(HalotuneError, match=r"router\.weight is a parameter of a Router, \(5, 15\) .* modules_to_save"):
        found(block(), HRAConfig(r=2, target_parameters=["router.weight"]))
    with pytest.raises(HalotuneError, match="has no fused experts"):
        found(nn.Sequential(nn.Linear(4, 4)), HRAConfig(r=2, target_parameters=["proj"]))


def test_experts_named_as_modules_are_told_their_parameters():
    for named in (["experts"], ["gate_up_proj"], "experts.*proj"):
        with pytest.raises(HalotuneError, match=r"target_parameters=\['experts\."):
            found(block(), HRAConfig(r=2, target_modules=named))


def test_experts_of_the_name_of_another_target_are_not_skipped_silently():
    with pytest.warns(UserWarning, match=r"experts\.down_proj, have that name too .*target_parameters=\['experts.down_proj'\]"):
        assert found(Shared().double(), HRAConfig(r=2, target_modules=["down_proj"])) == {"shared_expert.down_proj"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for extra in ({"exclude_modules": ["experts.down_proj"]}, {"target_parameters": ["experts.down_proj"]}):
            found(Shared().double(), HRAConfig(r=2, target_modules=["down_proj"], **extra))


def test_all_linear_is_written_so_that_a_reader_finds_the_same(tmp_path):
    with pytest.warns(UserWarning, match="1 routers of experts .*Router"):
        model = halotune.get_peft_model(Shared().double(), HRAConfig(r=2, target_modules="all-linear"))
    config = model.peft_config["default"]
    assert config.target_parameters == BOTH
    assert config.target_modules == {"out", "shared_expert.down_proj"}
    model.save_pretrained(tmp_path)
    again = halotune.PeftModel.from_pretrained(Shared().double(), tmp_path)
    assert set(adapted_layers(again.get_base_model())) == set(adapted_layers(model.get_base_model()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found(block(), HRAConfig(r=2, target_modules="all-linear", exclude_modules=["router"]))
        found(block(), HRAConfig(r=2, target_modules="all-linear", modules_to_save=["router"]))


def test_patterns_of_ranks_and_biases():
    model = halotune.get_peft_model(block(), HRAConfig(r=2, target_parameters=BOTH, rank_pattern={"down_proj": 4}))
    experts = model.get_base_model().experts
    assert experts.gate_up_proj.adapters["default"].hra_u.shape == (5, 15, 2)
    assert experts.down_proj.adapters["default"].hra_u.shape == (5, 21, 4)
    with pytest.raises(HalotuneError, match="biases of fused experts"):
        found(block("interleaved"), LoraConfig(r=2, target_parameters=BOTH, bias="lora_only"))
    with pytest.raises(HalotuneError, match=r"experts\.gate_up_proj: BAT: r must divide"):
        found(block(), BoneConfig(r=4, init_weights="bat", target_parameters=BOTH))


def test_sharing_is_a_part_of_the_file_and_of_the_size():
    each, shared = (
        halotune.get_peft_model(block(), HRAConfig(r=2, target_parameters=BOTH, expert_sharing=s)) for s in (False, True)
    )
    n = [m.get_nb_trainable_parameters()[0] for m in (each, shared)]
    assert n == [5 * 2 * (15 + 21), 2 * (15 + 21)]
    assert "expert_sharing" not in each.peft_config["default"].to_dict()
    assert shared.peft_config["default"].to_dict()["expert_sharing"] is True


def test_experts_of_a_kernel_of_their_own_are_refused_by_name():
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    from transformers import GptOssConfig

    config = GptOssConfig(num_local_experts=2, hidden_size=64, intermediate_size=64)
    model = nn.ModuleDict({"linear": nn.Linear(4, 4), "experts": mxfp4.Mxfp4GptOssExperts(config)})
    with pytest.raises(HalotuneError, match=r"Mxfp4GptOssExperts, .*uint8, packed .* load the model dequantized"):
        found(model, HRAConfig(r=2, target_parameters=["experts.down_proj"]))
    with pytest.warns(UserWarning, match="1 modules hold several matrices .* experts"):
        found(model, HRAConfig(r=2, target_modules="all-linear"))


def test_experts_in_eight_bits_with_scales_beside_them_are_left_out_by_name():
    """Their parameters have three dimensions, and are no weights without the scales."""
    models = [block(dtype=torch.float32) for _ in range(2)]
    for model in models:
        for name in ("gate_up_proj", "down_proj"):
            p = getattr(model.experts, name)
            setattr(model.experts, name, nn.Parameter(p.to(torch.float8_e4m3fn), requires_grad=False))
    with pytest.warns(UserWarning, match="1 modules hold several matrices .* experts"):
        assert found(models[0], HRAConfig(r=2, target_modules="all-linear", exclude_modules=["router"])) == {"out"}
    with pytest.raises(HalotuneError, match="float8_e4m3fn"):
        found(models[1], HRAConfig(r=2, target_parameters=["down_proj"]))
