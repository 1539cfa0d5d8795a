"""Stable Diffusion, SDXL and FLUX: files under kohya's names, of one model and of whole pipelines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import halotune
from halotune import HalotuneError, LoHaConfig, convert_adapter, get_peft_model
from halotune.convert.base import BaseLayers, load_bases
from halotune.engine.files.state_dict import read_metadata

from .models import randomize, same

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
loaders = pytest.importorskip("diffusers.loaders.single_file_utils")
UNET = {
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "sample_size": 8,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 32,
    "use_linear_projection": True,
    "transformer_layers_per_block": 2,
}
FLUX = {"num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 12, "pooled_projection_dim": 6, "guidance_embeds": True}


def unet(**more) -> nn.Module:
    return diffusers.UNet2DConditionModel(**UNET, **more)


def flux(heads: int = 2, width: int = 8) -> nn.Module:
    axes = (width // 4, width // 4, width // 2)
    return diffusers.FluxTransformer2DModel(
        **FLUX, in_channels=4, attention_head_dim=width, num_attention_heads=heads, axes_dims_rope=axes
    )


def clip(projection: bool = False, width: int = 8) -> nn.Module:
    sizes = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    cls = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return cls(transformers.CLIPTextConfig(**sizes, **tokens, projection_dim=width))


MODELS = {"sd": unet, "sdxl": lambda: unet(**SDXL), "flux": flux, "clip": clip, "clip2": lambda: clip(projection=True)}


def folder_of(model: nn.Module, folder: Path) -> Path:
    """A model's configuration on disk, without its weights."""
    if isinstance(model, diffusers.ModelMixin):
        model.save_config(folder)
    else:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
    return folder


def original_file(base: BaseLayers, file: Path, prefix: str, r: int = 3, names: str = "original") -> dict[str, Tensor]:
    """A LoHa on every layer, under the original names (stacked where these are), as a script would write it."""
    modules = {path: [path] for path in base.shapes}
    if names == "original":
        for name, parts in base.originals.items():
            for part in parts:
                modules.pop(part.path, None)
            modules[name] = [part.path for part in parts]
    tensors = {}
    for name, paths in modules.items():
        n_in = base.shapes[paths[0]].in_features
        n_out = sum(base.shapes[path].out_features for path in paths)
        own = {f"hada_w{i}_{half}": torch.randn(size) for i in "12" for half, size in (("a", (n_out, r)), ("b", (r, n_in)))}
        own["alpha"] = torch.tensor(1.5)
        tensors.update({f"{prefix}_{name.replace('.', '_')}.{key}": t.to(torch.bfloat16) for key, t in own.items()})
    save_file(tensors, file, {"ss_tag_frequency": '{"a": 1}'})
    return tensors


# -- names, against diffusers' own converters of whole checkpoints


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("per_block", [1, 2, 3])
def test_names_of_a_unet_are_those_that_diffusers_converts(kind: str, per_block: int) -> None:
    with torch.device("meta"):
        model = unet(layers_per_block=per_block, **(SDXL if kind == "sdxl" else {}))
    base = BaseLayers.of(model)
    assert {p.path for parts in base.originals.values() for p in parts} == set(base.shapes)
    paths = {name: parts[0].path for name, parts in base.originals.items()}
    checkpoint = {f"model.diffusion_model.{n}.{leaf}": p for n, p in paths.items() for leaf in ("weight", "bias")}
    converted = loaders.convert_ldm_unet_checkpoint(checkpoint, model.config)
    assert converted == {f"{path}.{leaf}": path for path in base.shapes for leaf in ("weight", "bias")}


def test_rows_of_flux_are_those_that_diffusers_converts() -> None:
    with torch.device("meta"):
        model = flux(heads=24, width=128)  # the width that diffusers' converter is written for
    base = BaseLayers.of(model)
    assert {p.path for parts in base.originals.values() for p in parts} == set(base.shapes)
    checkpoint = {}
    for i, (name, parts) in enumerate(base.originals.items()):
        rows = sum(base.shapes[p.path].out_features for p in parts)
        checkpoint.update({f"{name}.{leaf}": torch.arange(rows)[:, None] + 100_000 * i for leaf in ("weight", "bias")})
    whole = dict(checkpoint)
    norms = [
        f"double_blocks.{i}.{s}_attn.norm.{x}_norm.scale" for i in (0, 1) for s in ("img", "txt") for x in ("query", "key")
    ]
    norms += [f"single_blocks.{i}.norm.{x}_norm.scale" for i in (0, 1) for x in ("query", "key")]
    converted = loaders.convert_flux_transformer_checkpoint_to_diffusers(checkpoint | dict.fromkeys(norms, torch.zeros(1)))
    for name, parts in base.originals.items():
        for part in parts:
            t = whole[f"{name}.weight"]
            ours = t if part.rows is None else torch.cat([t[a:b] for a, b in part.rows])
            assert torch.equal(ours, converted[f"{part.path}.weight"]), (name, part)


# -- files


@pytest.mark.parametrize(
    ("kind", "prefix", "names"),
    [
        ("sd", "lora_unet", "model"),
        ("sd", "lora_unet", "original"),
        ("sdxl", "lora_unet", "original"),
        ("sdxl", "lora_unet", "model"),
        ("flux", "lora_unet", "original"),
        ("flux", "lora_transformer", "model"),
        ("clip", "lora_te", "original"),
        ("clip2", "lora_te2", "original"),
        ("sdxl", "lycoris", "model"),
    ],
)
def test_files_come_back_bit_for_bit(kind: str, prefix: str, names: str, tmp_path: Path) -> None:
    folder = folder_of(MODELS[kind](), tmp_path / "base")
    original_file(load_bases(folder)[""], tmp_path / "in.safetensors", prefix, names=names)
    found = convert_adapter(tmp_path / "in.safetensors", tmp_path / "peft", "peft", base=folder)
    assert not found.left_out and prefix in found.source and "LOHA" in str(found)
    to = "lycoris" if prefix == "lycoris" else "kohya"
    chosen = None if (kind, names) not in (("sd", "original"), ("sdxl", "model")) or to == "lycoris" else names
    own = {"names": chosen, "base": folder} if names == "original" or chosen else {"base": None}
    convert_adapter(tmp_path / "peft", tmp_path / "out.safetensors", to, **own)
    if names == "model" and kind == "flux":  # what sd-scripts would write is another file
        convert_adapter(tmp_path / "peft", tmp_path / "scripts.safetensors", "kohya")
    assert same(tmp_path / "out.safetensors", tmp_path / "in.safetensors")


@pytest.mark.parametrize("kind", ["sdxl", "flux"])
def test_stacked_layers_have_the_weights_of_their_parts(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    base = BaseLayers.of(model)
    tensors = original_file(base, tmp_path / "in.safetensors", "lora_unet")
    loaded = halotune.load_lycoris(model, tmp_path / "in.safetensors").get_base_model()
    for name, parts in base.originals.items():
        own = {
            key: tensors[f"lora_unet_{name.replace('.', '_')}.hada_{key}"].float() for key in ("w1_a", "w1_b", "w2_a", "w2_b")
        }
        delta = (own["w1_a"] @ own["w1_b"]) * (own["w2_a"] @ own["w2_b"]) * (1.5 / 3)
        for part in parts:
            B, A = loaded.get_submodule(part.path).adapters["default"].factors(None)
            expected = delta if part.rows is None else torch.cat([delta[a:b] for a, b in part.rows])
            torch.testing.assert_close(B @ A, expected, rtol=1e-5, atol=1e-5)


def test_layers_trained_apart_are_not_stacked(tmp_path: Path) -> None:
    folder = folder_of(flux(), tmp_path / "base")
    config = LoHaConfig(r=2, target_modules=["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"])
    randomize(get_peft_model(flux(), config)).save_pretrained(tmp_path / "peft")
    with pytest.raises(HalotuneError, match=r"img_attn\.qkv stacks 3 layers, which differ in hada_w1_b, .*names=\"model\""):
        convert_adapter(tmp_path / "peft", tmp_path / "out.safetensors", "kohya", base=folder)
    assert not (tmp_path / "out.safetensors").exists()
    convert_adapter(tmp_path / "peft", tmp_path / "out.safetensors", "kohya", base=folder, names="model")
    assert all(key.startswith("lora_transformer_") for key in load_file(tmp_path / "out.safetensors"))


def test_some_of_the_stacked_layers_are_not_enough(tmp_path: Path) -> None:
    folder = folder_of(flux(), tmp_path / "base")
    get_peft_model(flux(), LoHaConfig(r=2, target_modules=["attn.to_q"])).save_pretrained(tmp_path / "peft")
    with pytest.raises(HalotuneError, match=r"transformer_blocks\.0\.attn\.to_k, .*attn\.to_v have no adapter"):
        convert_adapter(tmp_path / "peft", tmp_path / "out.safetensors", "kohya", base=folder)


# -- pipelines


def pipeline(folder: Path) -> Path:
    parts = {"unet": unet(**SDXL), "text_encoder": clip(), "text_encoder_2": clip(projection=True, width=12)}
    index = {name: [type(m).__module__.split(".")[0], type(m).__name__] for name, m in parts.items()}
    for name, model in parts.items():
        folder_of(model, folder / name)
    entries = {
        "_class_name": "StableDiffusionXLPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps({**entries, **index}))
    return folder


def pipeline_file(folder: Path, file: Path) -> dict[str, Tensor]:
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    tensors = {}
    for name, base in load_bases(folder).items():
        tensors.update(original_file(base, file, prefixes[name]))
    save_file(tensors, file, {"ss_tag_frequency": '{"a": 1}'})
    return tensors


def test_a_pipelines_file_becomes_a_folder_for_each_model_and_back(tmp_path: Path) -> None:
    base = pipeline(tmp_path / "sdxl")
    pipeline_file(base, tmp_path / "in.safetensors")
    found = convert_adapter(tmp_path / "in.safetensors", tmp_path / "peft", "peft", base=base)
    assert list(found.adapters) == ["unet", "text_encoder", "text_encoder_2"] and not found.left_out
    assert [path.name for path in found.written] == list(found.adapters)
    convert_adapter(tmp_path / "peft", tmp_path / "out.safetensors", "kohya", base=base)
    assert same(tmp_path / "out.safetensors", tmp_path / "in.safetensors")
    assert read_metadata(tmp_path / "out.safetensors")["ss_tag_frequency"] == '{"a": 1}'
    model = halotune.PeftModel.from_pretrained(clip(), tmp_path / "peft" / "text_encoder")
    assert model(torch.tensor([[3, 4]])).last_hidden_state.isfinite().all()


def test_each_model_of_a_pipeline_takes_its_own_modules(tmp_path: Path) -> None:
    base = pipeline(tmp_path / "sdxl")
    pipeline_file(base, tmp_path / "in.safetensors")
    for model, prefix in ((unet(**SDXL), "lora_unet"), (clip(), "lora_te1"), (clip(projection=True, width=12), "lora_te2")):
        layers = len(BaseLayers.of(model).shapes)
        with pytest.warns(UserWarning, match="left out are .* modules under lora_"):
            loaded = halotune.load_lycoris(model, tmp_path / "in.safetensors")
        halotune.save_lycoris(loaded, tmp_path / "own.safetensors", prefix=prefix, names="original", dtype=torch.bfloat16)
        own = load_file(tmp_path / "own.safetensors")
        whole = load_file(tmp_path / "in.safetensors")
        assert same(own, {key: t for key, t in whole.items() if key.startswith(f"{prefix}_")})
        assert sum(key.endswith(".alpha") for key in own) == layers
