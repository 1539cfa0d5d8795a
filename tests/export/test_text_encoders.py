"""Text encoders of every kind, exported and converted: the names that programs know them by, and their pipeline's."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from halotune import HalotuneError, HRAConfig, LoHaConfig, convert_adapter, get_peft_model
from halotune.cli.main import main
from halotune.core.config import AdapterConfig
from halotune.engine.injection.modules import adapted_layers
from halotune.export import check
from halotune.integrations.diffusers import PipelineAdapters

from ..convert.test_diffusion import SDXL, unet
from ..examples.models import save_stable_diffusion
from ..laws.cases import matrix, relative
from ..several.models import randomized

pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

NAME = "pytorch_lora_weights.safetensors"
CLIP = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
T5 = ["q", "k", "v", "o", "wi", "wo"]


def clip(projection: bool = False, width: int = 8) -> nn.Module:
    sizes = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 16}
    cls = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return cls(transformers.CLIPTextConfig(**sizes, **tokens, projection_dim=width)).eval()


def t5() -> nn.Module:
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 40}
    return transformers.T5EncoderModel(transformers.T5Config(**sizes)).eval()


def comfyui_keys(clip_l: bool = False, clip_g: bool = False, t5: int = 0) -> dict[str, str]:
    """What ComfyUI knows a text encoder's layers by -> the layer's path in transformers before 5.6 (`model_lora_keys_clip`).

    Args:
        clip_l, clip_g: which CLIPs the pipeline has.
        t5: the number of T5 among its text encoders; 0 is none.
    """
    known: dict[str, str] = {}
    modules = [*(f"self_attn.{p}" for p in CLIP[:4]), "mlp.fc1", "mlp.fc2"]
    layers = [f"text_model.encoder.layers.{i}.{module}" for i in range(32) for module in modules]
    flat = {path: path.replace(".", "_") for path in layers}
    if clip_l:
        known |= {f"{p}_{flat[path]}": path for path in layers for p in ("lora_te", "lora_te1")}
        known |= {f"text_encoder.{path}": path for path in layers}
    if clip_g:
        known |= {f"lora_te2_{flat[path]}": path for path in layers} | {f"text_encoder_2.{path}": path for path in layers}
        known["lora_te2_text_projection"] = "text_projection"
    if t5:
        names = [f"encoder.block.{i}.layer.{j}.{x}" for i in range(24) for j, xs in T5_LAYERS.items() for x in xs]
        known |= {f"lora_te{t5}_{path.replace('.', '_')}": path for path in names}
    return known


T5_LAYERS = {0: [f"SelfAttention.{x}" for x in "qkvo"], 1: [f"DenseReluDense.{x}" for x in ("wi", "wi_0", "wi_1", "wo")]}


def comfyui_deltas(file: Path, known: dict[str, str]) -> dict[str, Tensor]:
    """Path -> the change of its weight as ComfyUI computes it; every key must be known."""
    tensors = load_file(file)
    assert {key for key in tensors if key.partition(".lora_")[0].removesuffix(".alpha") not in known} == set()
    out = {}
    for name, path in known.items():
        for down, up in (("lora_down", "lora_up"), ("lora_A", "lora_B")):
            if f"{name}.{down}.weight" in tensors:
                A, B = tensors[f"{name}.{down}.weight"], tensors[f"{name}.{up}.weight"]
                out[path] = B @ A * (float(tensors[f"{name}.alpha"]) / A.shape[0] if f"{name}.alpha" in tensors else 1)
    return out


def adapted(model: nn.Module, targets: list[str], config: AdapterConfig | None = None) -> Any:
    config = copy.copy(config or HRAConfig(r=4, init_weights=False))
    config.target_modules = set(targets)
    return randomized(get_peft_model(model, config)).eval()


@pytest.mark.parametrize(
    ("make", "targets", "arguments", "known"),
    [
        pytest.param(clip, CLIP, {}, comfyui_keys(clip_l=True), id="clip"),
        pytest.param(lambda: clip(True), [*CLIP, "text_projection"], {}, comfyui_keys(clip_g=True), id="clip-g"),
        pytest.param(lambda: clip(True), CLIP, {"component": "text_encoder"}, comfyui_keys(clip_l=True), id="clip-l-of-sd3"),
        pytest.param(t5, T5, {"component": "text_encoder_3"}, comfyui_keys(True, True, 3), id="t5-of-sd3"),
        pytest.param(t5, T5, {"component": "text_encoder_2"}, comfyui_keys(True, False, 2), id="t5-of-flux"),
        pytest.param(t5, T5, {"component": "text_encoder"}, comfyui_keys(t5=1), id="t5-of-pixart"),
    ],
)
def test_comfyui_knows_every_key(make, targets, arguments, known, tmp_path: Path):
    """Fails where a key lacks `text_model.`, or names another encoder of the pipeline."""
    model = adapted(make(), targets)
    model.export("lora", tmp_path, runtime="comfyui", **arguments)
    assert check(tmp_path, "comfyui") == []
    found = comfyui_deltas(tmp_path / NAME, known)
    layers = adapted_layers(model.get_base_model())
    assert len(found) == len(layers)
    for path, layer in layers.items():
        W = matrix(layer.base_layer)
        delta = next(d for name, d in found.items() if name.endswith(path))
        assert relative(delta, layer.adapters["default"].weight(W) - W) < 1e-5


def test_which_part_t5_is_must_be_said(tmp_path: Path):
    for runtime in ("comfyui", "diffusers"):
        with pytest.raises(HalotuneError, match=r"cannot tell which part of a pipeline a T5EncoderModel is.*--component"):
            adapted(t5(), T5).export("lora", tmp_path / "out", runtime=runtime)
    with pytest.raises(HalotuneError, match=r"nothing was written\. diffusers: names: .*text_encoder for CLIP alone"):
        adapted(t5(), T5).export("lora", tmp_path / "out", runtime="diffusers", component="text_encoder_3")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["lora_te1_encoder_layers_0_mlp_fc1", "lora_te2_model_layers_0_self_attn_q_proj"])
def test_the_check_knows_the_names(key: str, tmp_path: Path):
    """CLIP without `text_model_`, and a language model: ComfyUI passes over both."""
    tensors = {f"{key}.lora_down.weight": torch.zeros(2, 6), f"{key}.lora_up.weight": torch.zeros(8, 2)}
    save_file(tensors, tmp_path / NAME)
    assert [p.rule.name for p in check(tmp_path, "comfyui")] == ["names"]
    assert [p.rule.name for p in check(tmp_path, "diffusers")] == ["names"]


# -- kohya's files


@pytest.mark.parametrize(
    ("make", "prefix", "targets"),
    [(clip, "lora_te", CLIP), (lambda: clip(True), "lora_te2", CLIP), (t5, "lora_te3", T5)],
    ids=["clip", "clip-g", "t5"],
)
def test_kohyas_names_without_the_base_are_those_with_it(make, prefix, targets, tmp_path: Path):
    model = make()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path / "base")
    adapted(model, targets, LoHaConfig(r=2)).save_pretrained(tmp_path / "peft")
    keys = []
    for base in (None, tmp_path / "base"):
        convert_adapter(tmp_path / "peft", tmp_path / "out.safetensors", "kohya", base=base)
        keys.append(load_file(tmp_path / "out.safetensors").keys())
        assert check(tmp_path / "out.safetensors", "comfyui") == []
    assert keys[0] == keys[1] and all(key.startswith(f"{prefix}_") for key in keys[0])


def test_an_adapter_that_does_not_tell_its_base(tmp_path: Path):
    """Its task does instead; then it is not taken for a UNet's, nor written without a level of its names."""
    config = LoHaConfig(r=2, target_modules=["q_proj"], task_type="FEATURE_EXTRACTION")
    get_peft_model(clip(), config).save_pretrained(tmp_path / "peft")
    with pytest.raises(HalotuneError, match=r"which one the base is cannot be told.*--base.*--prefix"):
        convert_adapter(tmp_path / "peft", tmp_path / "out.safetensors", "kohya")
    with pytest.raises(HalotuneError, match=r"text_model\.encoder\.layers.*Give base"):
        convert_adapter(tmp_path / "peft", tmp_path / "out.safetensors", "kohya", prefix="lora_te1")
    assert not (tmp_path / "out.safetensors").exists()


# -- diffusers


class Pipelines:
    """A pipeline of SDXL, whose text encoders are told by their classes, and one of SD1.5, on disk."""

    def __init__(self, folder: Path) -> None:
        from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline

        self.sd = save_stable_diffusion(folder / "sd")
        self.sdxl = folder / "sdxl"
        tokenizer = transformers.CLIPTokenizer.from_pretrained(self.sd / "tokenizer")
        vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
        encoders = {"text_encoder": clip(), "text_encoder_2": clip(True, 12)}
        rest: dict[str, Any] = {"tokenizer": tokenizer, "tokenizer_2": tokenizer, "scheduler": DDIMScheduler()}
        StableDiffusionXLPipeline(unet=unet(**SDXL), vae=vae, **encoders, **rest).save_pretrained(self.sdxl)

    def load(self, folder: Path) -> Any:
        from diffusers import DiffusionPipeline

        return DiffusionPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Pipelines:
    return Pipelines(tmp_path_factory.mktemp("pipelines"))


@torch.no_grad()
def encoded(model: nn.Module) -> Tensor:
    return model(torch.arange(3, 15).reshape(2, 6))[0]


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("runtime", ["diffusers", "comfyui"])
def test_diffusers_loads_each_of_sdxls_text_encoders(component: str, runtime: str, pipelines: Pipelines, tmp_path: Path):
    pipe = pipelines.load(pipelines.sdxl)
    encoder = getattr(pipe, component)
    plain, others = encoded(encoder), [c for c in ("text_encoder", "text_encoder_2") if c != component]
    model = adapted(copy.deepcopy(encoder), CLIP)
    model.export("lora", tmp_path, runtime=runtime)
    starts = f"{component}.text_model." if runtime == "diffusers" else f"lora_te{1 + (component != 'text_encoder')}_text_model_"
    assert all(key.startswith(f"{starts}encoder") for key in load_file(tmp_path / NAME))
    assert check(tmp_path, ["diffusers", "comfyui"]) == []
    before = [encoded(getattr(pipe, c)) for c in others]
    pipe.load_lora_weights(tmp_path)
    assert relative(encoded(model), plain) > 1e-2
    assert relative(encoded(encoder), encoded(model)) < 1e-5
    assert all(torch.equal(encoded(getattr(pipe, c)), b) for c, b in zip(others, before, strict=True))


def test_the_projection_of_a_text_encoder(pipelines: Pipelines, tmp_path: Path):
    pipe = pipelines.load(pipelines.sdxl)
    model = adapted(copy.deepcopy(pipe.text_encoder_2), [*CLIP, "text_projection"])
    model.export("lora", tmp_path, runtime="diffusers")
    pipe.load_lora_weights(tmp_path)
    assert relative(encoded(pipe.text_encoder_2), encoded(model)) < 1e-5


# -- the command


def command(*arguments: object) -> int:
    return main(["export", *map(str, arguments)])


@pytest.mark.parametrize(
    ("component", "flags"),
    [("unet", []), ("text_encoder", []), ("text_encoder", ["--component", "text_encoder"]), ("text_encoder_2", [])],
)
def test_the_command_finds_every_model_in_its_pipeline(component, flags, pipelines: Pipelines, tmp_path: Path):
    pipe = pipelines.load(pipelines.sdxl)
    model = adapted(getattr(pipe, component), ["to_q"] if component == "unet" else CLIP)
    model.save_pretrained(tmp_path / "hra")
    base = ["--base", pipelines.sdxl, "--output", tmp_path / "out", "--for", "diffusers", "--check", "diffusers"]
    assert command(tmp_path / "hra", *base, *flags) == 0
    assert all(key.startswith(f"{component}.") for key in load_file(tmp_path / "out" / NAME))


def test_the_folder_of_a_whole_pipelines_adapters(pipelines: Pipelines, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pipe = pipelines.load(pipelines.sd)
    adapters = PipelineAdapters(pipe)
    adapters.add({"unet": HRAConfig(r=2, target_modules=["to_q"]), "text_encoder": LoHaConfig(r=2, target_modules=CLIP)}, "dog")
    adapters.save(tmp_path / "dog")
    flags = [tmp_path / "dog", "--base", pipelines.sd, "--output", tmp_path / "out", "--for", "comfyui"]
    assert command(*flags) == 2
    assert "holds adapters of unet, text_encoder. Choose one with --component NAME" in capsys.readouterr().err
    for component, starts in (("unet", "lora_unet_"), ("text_encoder", "lora_te1_text_model_")):
        assert command(*flags, "--component", component, "--check", "comfyui") == 0
        assert all(key.startswith(starts) for key in load_file(tmp_path / "out" / NAME))
    assert command(tmp_path / "dog", "--component", "unet", "--check", "vllm") == 1  # it is found for checking too


def test_parts_of_one_class_must_be_chosen(pipelines: Pipelines, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """As the two first text encoders of Stable Diffusion 3 are."""
    index = json.loads((pipelines.sdxl / "model_index.json").read_text())
    index["text_encoder"] = index["text_encoder_2"]
    folder = tmp_path / "sd3"
    for part in pipelines.sdxl.iterdir():
        if part.is_dir():
            (folder / part.name).parent.mkdir(exist_ok=True)
            (folder / part.name).symlink_to(part)
    (folder / "text_encoder").unlink()
    (folder / "text_encoder").symlink_to(pipelines.sdxl / "text_encoder_2")
    (folder / "model_index.json").write_text(json.dumps(index))
    adapted(clip(True, 12), CLIP).save_pretrained(tmp_path / "hra")
    flags = [tmp_path / "hra", "--base", folder, "--output", tmp_path / "out", "--for", "diffusers"]
    assert command(*flags) == 2
    said = capsys.readouterr().err
    assert "text_encoder and text_encoder_2 are both a CLIPTextModelWithProjection. Give --component" in said
    assert command(*flags, "--component", "text_encoder") == 0
    assert all(key.startswith("text_encoder.text_model.") for key in load_file(tmp_path / "out" / NAME))
    assert command(*flags, "--component", "text_encodr") == 2
    assert "has no component 'text_encodr'; it has " in capsys.readouterr().err
