"""Exports for diffusion pipelines: diffusers' own loader gives the same outputs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from halotune import BoneConfig, HRAConfig, LoHaConfig, get_peft_model
from halotune.cli.main import main
from halotune.core.config import AdapterConfig
from halotune.engine.injection.modules import adapted_layers
from halotune.export import check

from ..convert.test_diffusion import SDXL, unet
from ..examples.models import save_stable_diffusion
from ..laws.cases import matrix, relative
from ..several.models import randomized

pytest.importorskip("diffusers")

# Attention, feed-forward layers, and convolutions of every kind in a UNet: strided, 3×3, 1×1.
UNET = ["to_q", "to_v", "to_out.0", "ff.net.0.proj", "conv1", "conv_shortcut", "downsamplers.0.conv", "proj_in", "conv_in"]
METHODS = [
    pytest.param(HRAConfig(r=4, init_weights=False), id="hra"),
    pytest.param(LoHaConfig(r=2, alpha=3), id="loha"),
    pytest.param(LoHaConfig(r=2, alpha=3, use_effective_conv2d=True), id="loha-tucker"),
    pytest.param(BoneConfig(r=3), id="bone"),
]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stable_diffusion(tmp_path_factory.mktemp("sd"))


def load(folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(folder)


@torch.no_grad()
def denoised(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return unet(torch.randn(2, 4, 8, 8, generator=generator), 3, torch.randn(2, 16, 32, generator=generator)).sample


def adapted(model: nn.Module, config: AdapterConfig, targets: list[str]) -> Any:
    config = copy.copy(config)
    config.target_modules = set(targets)
    return randomized(get_peft_model(model, config)).eval()


@pytest.mark.parametrize("config", METHODS)
def test_a_unet(config: AdapterConfig, pipeline: Path, tmp_path: Path):
    pipe = load(pipeline)
    plain = denoised(pipe.unet)
    model = adapted(copy.deepcopy(pipe.unet), config, UNET)
    report = model.export("lora", tmp_path, runtime="diffusers")
    assert report.exact and check(tmp_path, "diffusers") == []
    A, B = (load_file(tmp_path / "pytorch_lora_weights.safetensors")[f"unet.conv_in.lora_{f}.weight"] for f in "AB")
    assert A.shape == (report.rank, 4, 3, 3) and B.shape == (16, report.rank, 1, 1)

    pipe.load_lora_weights(tmp_path)
    assert relative(denoised(model), plain) > 1e-2
    assert relative(denoised(pipe.unet), denoised(model)) < 1e-5
    pipe.unload_lora_weights()
    assert torch.equal(denoised(pipe.unet), plain)


def test_a_text_encoder(pipeline: Path, tmp_path: Path):
    pipe = load(pipeline)
    ids = torch.arange(32).reshape(2, 16)
    plain = pipe.text_encoder(ids)[0]
    model = adapted(copy.deepcopy(pipe.text_encoder), HRAConfig(r=4, init_weights=False), ["q_proj", "out_proj", "fc1"])
    model.export("lora", tmp_path, runtime="diffusers")
    pipe.load_lora_weights(tmp_path)
    assert relative(model(ids)[0], plain) > 1e-2
    assert relative(pipe.text_encoder(ids)[0], model(ids)[0]) < 1e-5


@pytest.mark.parametrize("config", METHODS[::2])
@torch.no_grad()
def test_a_transformer(config: AdapterConfig, tmp_path: Path):
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
    ).eval()
    parts = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    pipe = StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **dict.fromkeys(parts)
    )
    inputs = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32), torch.randn(2, 16), torch.tensor([3.0, 3.0])
    plain = transformer(*inputs).sample
    model = adapted(copy.deepcopy(transformer), config, ["to_q", "to_out.0", "add_k_proj", "ff.net.2", "proj"])
    model.export("lora", tmp_path, runtime="diffusers")
    pipe.load_lora_weights(tmp_path)
    assert relative(model(*inputs).sample, plain) > 1e-2
    assert relative(pipe.transformer(*inputs).sample, model(*inputs).sample) < 1e-5


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 12, 3, padding=1, groups=3)


def test_the_header_gives_the_rank_of_a_grouped_convolution(tmp_path: Path):
    """diffusers reads the rank off lora_B, which here has a third of the columns, unless the header has it."""
    model = adapted(Grouped(), HRAConfig(r=2, init_weights=False), ["conv"])
    model.export("lora", tmp_path, runtime="diffusers", component="transformer")
    file = tmp_path / "pytorch_lora_weights.safetensors"
    with safe_open(file, framework="pt") as f:
        assert f.metadata()["lora_adapter_metadata"] == (
            '{"transformer.r": 6, "transformer.lora_alpha": 6, "transformer.target_modules": ["conv"]}'
        )
    assert load_file(file)["transformer.conv.lora_B.weight"].shape == (12, 2, 1, 1)


def test_comfyui_knows_a_unet_by_kohyas_names(pipeline: Path, tmp_path: Path):
    model = adapted(load(pipeline).unet, HRAConfig(r=4, init_weights=False), UNET)
    report = model.export("lora", tmp_path, runtime="comfyui")
    assert check(tmp_path, "comfyui") == []
    tensors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    layers = adapted_layers(model.get_base_model())
    assert len(tensors) == 3 * len(layers) == 3 * len(report.layers)
    assert "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_up.weight" in tensors
    for path, layer in layers.items():
        name = f"lora_unet_{path.replace('.', '_')}"
        up, down = (tensors[f"{name}.lora_{f}.weight"].flatten(1) for f in ("up", "down"))
        W = matrix(layer.base_layer)
        delta = float(tensors[f"{name}.alpha"]) / down.shape[0] * up @ down
        assert relative(delta, layer.adapters["default"].weight(W) - W) < 1e-5


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_diffusers_reads_comfyuis_file_of_a_unet(kind: str, pipeline: Path, tmp_path: Path):
    """It refuses alphas in the keys together with scales in the header."""
    from diffusers import StableDiffusionXLPipeline

    if kind == "sd":
        pipe: Any = load(pipeline)
        parts: dict[str, Any] = {}
    else:
        names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
        pipe = StableDiffusionXLPipeline(unet=unet(**SDXL), **dict.fromkeys(names))
        parts = {"added_cond_kwargs": {"text_embeds": torch.ones(2, 8), "time_ids": torch.ones(2, 6)}}
    width = pipe.unet.config.cross_attention_dim
    inputs = torch.randn(2, 4, 8, 8), 3, torch.randn(2, 5, width)
    model = adapted(copy.deepcopy(pipe.unet), HRAConfig(r=4, init_weights=False), ["to_q", "to_out.0", "conv1", "proj_in"])
    model.export("lora", tmp_path, runtime="comfyui")
    assert check(tmp_path, ["comfyui", "diffusers"]) == []
    pipe.load_lora_weights(tmp_path)
    with torch.no_grad():
        assert relative(pipe.unet(*inputs, **parts).sample, model(*inputs, **parts).sample) < 1e-5


def test_alphas_and_a_header_are_too_much(pipeline: Path, tmp_path: Path):
    """Why the rule is there: what diffusers itself says."""
    model = adapted(load(pipeline).unet, HRAConfig(r=4, init_weights=False), ["to_q"])
    model.export("lora", tmp_path, runtime="comfyui")
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(load_file(file), file, {"lora_adapter_metadata": '{"unet.r": 4, "unet.lora_alpha": 4}'})
    (problem,) = check(tmp_path, "diffusers")
    assert problem.rule.name == "two-scales" and "lora_adapter_metadata in the header, and lora_unet_" in problem.found
    with pytest.raises(ValueError, match=r"network_alphas.*and.*metadata"):
        load(pipeline).load_lora_weights(tmp_path)


def test_the_command_finds_the_model_in_its_pipeline(pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pipe = load(pipeline)
    model = adapted(pipe.unet, LoHaConfig(r=2, alpha=3), UNET)
    model.save_pretrained(tmp_path / "loha")
    expected = denoised(model)
    arguments = ["--base", str(pipeline), "--output", str(tmp_path / "lora"), "--for", "diffusers", "--check", "diffusers"]
    assert main(["export", str(tmp_path / "loha"), *arguments]) == 0
    assert "LoRA of rank 4 for diffusers" in capsys.readouterr().out
    pipe = load(pipeline)
    pipe.load_lora_weights(tmp_path / "lora")
    assert relative(denoised(pipe.unet), expected) < 1e-5
