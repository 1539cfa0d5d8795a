"""diffusers' own methods for adapters, which find ours by the type of peft's layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from halotune import HalotuneError, HRAConfig
from halotune.integrations.diffusers import PipelineAdapters

from .pipelines import CONFIGS, add, differ, image, load, near

peft = pytest.importorskip("peft")

PARTS = ["text_encoder", "unet"]


def test_activating(pipe: Any, base: Tensor):
    adapters = add(pipe)
    dog = image(pipe)
    assert pipe.get_active_adapters() == ["dog"]
    add(pipe, "style", unet=CONFIGS["bat"])
    style = image(pipe)
    assert pipe.get_list_adapters() == {"unet": ["dog", "style"], "text_encoder": ["dog"]}

    pipe.set_adapters(["style", "dog"], [0.7, 1.0])
    found = image(pipe)
    assert adapters.active == ["style", "dog"]
    adapters.set(["style", "dog"], [0.7, 1.0])
    assert torch.equal(image(pipe), found) and differ(found, dog) and differ(found, style)
    pipe.set_adapters("dog", {"unet": 1.0, "text_encoder": 0.0})
    found = image(pipe)
    adapters.set("dog", {"text_encoder": 0.0})
    assert torch.equal(image(pipe), found) and differ(found, dog)
    pipe.set_adapters("dog")
    assert torch.equal(image(pipe), dog) and adapters.active == ["dog"]
    pipe.unet.set_adapters(["style"], [0.0])
    assert pipe.unet.active_adapters() == ["style"]
    pipe.unet.set_adapter("dog")
    assert torch.equal(image(pipe), dog)

    pipe.disable_lora()
    assert torch.equal(image(pipe), base)
    pipe.enable_lora()
    assert torch.equal(image(pipe), dog)
    pipe.unet.disable_adapters()
    assert differ(image(pipe), dog)
    pipe.unet.enable_adapters()
    assert torch.equal(image(pipe), dog)


def test_models_set_one_by_one(pipe: Any):
    """They may disagree on the order."""
    adapters = add(pipe)
    add(pipe, "style", unet=CONFIGS["bat"], text_encoder=CONFIGS["hra"])
    adapters.set(["dog", "style"])
    pipe.unet.set_adapters(["style", "dog"])
    assert sorted(adapters.active) == ["dog", "style"]
    full = image(pipe)
    pipe.fuse_lora(components=PARTS)
    assert sorted(adapters.fused) == ["dog", "style"] and near(image(pipe), full)
    adapters.unfuse()
    assert torch.equal(image(pipe), full)


def test_scales_of_blocks(pipe: Any):
    """diffusers gives each block of a UNet a scale of its own."""
    adapters = add(pipe, unet=CONFIGS["hra"])
    full = image(pipe)
    pipe.set_adapters("dog", [{"unet": {"down": 0.3, "mid": 0.3, "up": 0.3}}])
    found = image(pipe)
    adapters.set("dog", 0.3)
    assert torch.equal(image(pipe), found)
    pipe.set_adapters("dog", [{"unet": {"mid": 0.3}}])
    assert differ(image(pipe), found) and differ(image(pipe), full)


def test_a_scale_for_one_call(pipe: Any, base: Tensor):
    """It multiplies the scale that was set."""
    adapters = add(pipe)
    full = image(pipe)
    scaled = image(pipe, cross_attention_kwargs={"scale": 0.5})
    assert torch.equal(image(pipe), full) and differ(scaled, full)
    adapters.set("dog", 0.5)
    assert torch.equal(image(pipe), scaled)
    assert near(image(pipe, cross_attention_kwargs={"scale": 2.0}), full)
    assert torch.equal(image(pipe, cross_attention_kwargs={"scale": 0.0}), base)


def test_fusing(pipe: Any, base: Tensor):
    adapters = add(pipe)
    full = image(pipe)
    pipe.fuse_lora(components=PARTS)
    assert pipe.fused_loras == {"dog"} and adapters.fused == ["dog"] and near(image(pipe), full)
    pipe.unfuse_lora(components=PARTS)
    assert not pipe.fused_loras and adapters.fused == [] and torch.equal(image(pipe), full)

    pipe.fuse_lora(components=["unet"], lora_scale=0.5, adapter_names=["dog"])
    fused = image(pipe)
    adapters.unfuse()
    adapters.set("dog", {"unet": 0.5})
    assert near(image(pipe), fused) and differ(fused, full)
    pipe.fuse_lora(components=PARTS)
    with pytest.warns(UserWarning, match="adapters were merged; the base weights are restored"):
        adapters.set("dog")
    assert torch.equal(image(pipe), full)

    next(p for n, p in pipe.unet.named_parameters() if ".dog." in n).data.fill_(torch.nan)
    with pytest.raises(HalotuneError, match="merging dog gives"):
        pipe.fuse_lora(components=["unet"], safe_fusing=True)
    adapters.unfuse()
    adapters.set("dog", 0)
    assert torch.equal(image(pipe), base)


def test_fused_for_good(pipe: Any, tmp_path: Path):
    """The way of diffusers' users: fuse, unload, save."""
    adapters = add(pipe)
    full = image(pipe)
    pipe.fuse_lora(components=PARTS)
    pipe.unload_lora_weights()
    assert near(image(pipe), full) and adapters.names == {}
    pipe.save_pretrained(tmp_path)
    assert near(image(load(tmp_path)), full)


def test_deleting(pipe: Any, base: Tensor, tmp_path: Path):
    adapters = add(pipe)
    adapters.save(tmp_path)
    dog = image(pipe)
    add(pipe, "style", unet=CONFIGS["bat"])
    adapters.set(["dog", "style"])
    pipe.delete_adapters("style")
    assert adapters.names == {"dog": PARTS} and torch.equal(image(pipe), dog)
    pipe.delete_adapters(["dog"])
    assert adapters.names == {} and torch.equal(image(pipe), base)
    adapters.load(tmp_path)
    assert torch.equal(image(pipe), dog)
    pipe.unload_lora_weights()
    assert adapters.names == {} and torch.equal(image(pipe), base)
    adapters.load(tmp_path)
    assert torch.equal(image(pipe), dog)


def test_adding_takes_configurations_of_peft_only(pipe: Any):
    with pytest.raises(ValueError, match=r"should be an instance of PeftConfig. Got .*halotune"):
        pipe.unet.add_adapter(HRAConfig(r=4))


@pytest.fixture
def lora(folder: Path, tmp_path: Path) -> tuple[Path, Tensor]:
    """A LoRA as others publish them, and what it paints alone."""
    pipe = load(folder)
    config = peft.LoraConfig(r=3, lora_alpha=3, init_lora_weights=False, target_modules=["to_q", "to_v"])
    pipe.unet.add_adapter(config, "lora")
    weights = peft.utils.get_peft_model_state_dict(pipe.unet, adapter_name="lora")
    pipe.save_lora_weights(tmp_path / "lora", unet_lora_layers=weights)
    return tmp_path / "lora", image(pipe)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_a_lora_over_adapters(pipe: Any, base: Tensor, lora: tuple[Path, Tensor], tmp_path: Path):
    file, alone = lora
    adapters = add(pipe)
    dog = image(pipe)
    pipe.load_lora_weights(file, adapter_name="lora")
    assert pipe.get_list_adapters() == {"unet": ["dog", "lora"], "text_encoder": ["dog"]}
    assert adapters.names == {"dog": PARTS}
    pipe.set_adapters(["dog", "lora"])
    both = image(pipe)
    assert differ(both, dog) and differ(both, alone)
    pipe.set_adapters("lora")
    assert near(image(pipe), alone)
    pipe.set_adapters("dog")
    assert torch.equal(image(pipe), dog)

    message = r"has layers of peft, such as those of a LoRA.*unload_lora_weights.*LoRAs can be loaded over them"
    for use in (lambda: adapters.save(tmp_path), adapters.fuse, lambda: pipe.fuse_lora(components=["unet"])):
        with pytest.raises(HalotuneError, match=message):
            use()
    with pytest.raises(HalotuneError, match=f"adapter 'b': the UNet2DConditionModel {message}"):
        adapters.add({"unet": HRAConfig(r=2)}, "b")
    assert torch.equal(image(pipe), dog)
    pipe.unload_lora_weights()
    assert torch.equal(image(pipe), base) and adapters.names == {}
    PipelineAdapters(pipe).add({"unet": HRAConfig(r=2)})
