"""Adapters in a diffusers pipeline: scale, several of them, fusing, files, training, and what shares the models."""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halotune import AdapterFileError, HalotuneError, HRAConfig, LoHaConfig, PeftModel, inject_adapter_in_model
from halotune.core.layer import AdaptedLayer
from halotune.engine.injection.modules import adapted_layers
from halotune.integrations.diffusers import INDEX_NAME, PipelineAdapters

from .. import toy_pipelines
from .pipelines import (
    CONFIGS,
    CONVOLUTIONS,
    add,
    configs,
    differ,
    flux_image,
    image,
    load,
    near,
    pixart_image,
    randomize,
)

every_method = pytest.mark.parametrize("method", CONFIGS)


def modules(model: nn.Module) -> list[tuple[str, type]]:
    return [(n, type(m)) for n, m in model.named_modules()]


# -- scale, fusing, files


@every_method
def test_from_adding_to_unloading(pipe: Any, folder: Path, base: Tensor, tmp_path: Path, method: str):
    before = modules(pipe.unet), modules(pipe.text_encoder)
    adapters = PipelineAdapters(pipe)
    adapters.add(configs(method, method), "dog")
    assert type(pipe.unet).__name__ == "UNet2DConditionModel" and pipe.unet.config.sample_size == 8
    assert near(image(pipe), base)  # every method starts at the base
    for model in (pipe.unet, pipe.text_encoder):
        randomize(model, "dog")

    full = image(pipe)
    assert differ(full, base)
    adapters.set("dog", 0.0)
    assert torch.equal(image(pipe), base)
    adapters.set("dog", 0.5)
    half = image(pipe)
    assert differ(half, base) and differ(half, full)
    fused = adapters.fuse()
    assert fused.keys() == {"unet", "text_encoder"} and all(r.total().delta > 0 for r in fused.values())
    assert adapters.fused == ["dog"] and near(image(pipe), half)
    adapters.unfuse()
    assert adapters.fused == [] and torch.equal(image(pipe), half)
    adapters.set("dog")
    assert torch.equal(image(pipe), full)

    adapters.save(tmp_path / "dog")
    other = load(folder)
    assert PipelineAdapters(other).load(tmp_path / "dog") == "dog"
    assert torch.equal(image(other), full)

    with adapters.disabled():
        assert torch.equal(image(pipe), base)
    adapters.disable()
    assert torch.equal(image(pipe), base)
    adapters.enable()
    assert torch.equal(image(pipe), full)
    adapters.unload()
    assert torch.equal(image(pipe), base) and (modules(pipe.unet), modules(pipe.text_encoder)) == before
    assert adapters.names == {} and not {"peft_config", "save_pretrained", "fuse_lora"} & vars(pipe.unet).keys()


@every_method
def test_convolutions(pipe: Any, base: Tensor, method: str):
    """Those of residual blocks too, of which some are 3×3."""
    config = copy.copy(CONFIGS[method])
    config.target_modules = set(CONVOLUTIONS)
    adapters = add(pipe, unet=config)
    kinds = {type(layer.base_layer).__name__ for layer in adapted_layers(pipe.unet).values()}
    assert kinds == {"Linear", "Conv2d"}
    full = image(pipe)
    pipe.unet.to(memory_format=torch.channels_last)
    assert near(image(pipe), full) and differ(full, base)
    adapters.fuse()
    assert near(image(pipe), full)
    adapters.unfuse()
    adapters.set("dog", 0)
    assert near(image(pipe), base)


def test_merge_and_unload(pipe: Any):
    adapters = add(pipe)
    adapters.set("dog", 0.7)
    full, plain = image(pipe), modules(load(pipe.name_or_path).unet)
    adapters.merge_and_unload()
    assert near(image(pipe), full) and modules(pipe.unet) == plain and adapters.names == {}
    assert not {"peft_config", "save_pretrained", "fuse_lora", "_hf_peft_config_loaded"} & vars(pipe.unet).keys()


def test_one_part_that_cannot_be_fused(pipe: Any):
    """All models are fused, or none."""
    adapters = add(pipe)
    add(pipe, "style", unet=HRAConfig(r=2))
    adapters.set("dog")
    full = image(pipe)
    weights = pipe.text_encoder.state_dict()
    next(p for n, p in pipe.unet.named_parameters() if ".dog." in n).data.fill_(torch.nan)
    with pytest.raises(HalotuneError, match=r"merging dog gives \d+ values that are not finite"):
        adapters.fuse("dog")
    assert adapters.fused == []
    assert all(torch.equal(t, weights[n]) for n, t in pipe.text_encoder.state_dict().items())
    with pytest.raises(HalotuneError, match="no adapter named 'cat'; the pipeline has \\['dog', 'style'\\]"):
        adapters.fuse("cat")
    assert torch.isfinite(full).all()


# -- several


def test_several_adapters(pipe: Any, base: Tensor, tmp_path: Path):
    adapters = add(pipe)
    dog = image(pipe)
    add(pipe, "style", unet=CONFIGS["bat"])
    style = image(pipe)
    assert adapters.active == ["style"] and adapters.names == {"dog": ["text_encoder", "unet"], "style": ["unet"]}
    assert str(adapters).splitlines() == [
        "PipelineAdapters of a StableDiffusionPipeline (* active)",
        "  text_encoder: dog",
        "  unet: dog, style*",
    ]

    adapters.set(["style", "dog"], weights=[0.7, 1.0])
    both = image(pipe)
    assert adapters.active == ["style", "dog"]
    assert all(differ(both, other) for other in (base, dog, style))
    adapters.set(["dog", "style"], [1.0, 0.7])
    assert differ(image(pipe), both)  # reflections do not commute with the rest
    adapters.set(["style", "dog"], [0.7, None])
    assert torch.equal(image(pipe), both)
    adapters.fuse()
    assert near(image(pipe), both) and set(adapters.fused) == {"style", "dog"}
    with pytest.warns(UserWarning, match="adapters were merged; the base weights are restored"):
        adapters.set("dog")
    assert torch.equal(image(pipe), dog)

    adapters.set("dog", {"unet": 0.0})
    text_only = image(pipe)
    assert differ(text_only, dog) and differ(text_only, base)
    adapters.set(["dog", "style"], [{"unet": 0.0, "text_encoder": 0.0}, 0.0])
    assert torch.equal(image(pipe), base)

    for name in ("dog", "style"):
        adapters.save(tmp_path / name, name)
    adapters.set(["style", "dog"], [0.7, 1.0])
    other = load(pipe.name_or_path)
    loaded = PipelineAdapters(other)
    loaded.load(tmp_path / "dog", name="hund")
    loaded.load(tmp_path / "style")
    loaded.set(["style", "hund"], [0.7, 1.0])
    assert torch.equal(image(other), both)
    loaded.delete("style")
    with pytest.raises(HalotuneError, match="no adapter named 'style'"):
        loaded.set(["style"])
    loaded.set("hund")
    assert torch.equal(image(other), dog)
    loaded.delete(["hund"])
    assert torch.equal(image(other), base) and loaded.names == {}


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        (["dog", "dog"], None, "names an adapter twice"),
        ("cat", None, "no adapter named 'cat'"),
        (["dog"], [1.0, 2.0], "1 adapters, but 2 weights"),
        ("dog", {"vae": 1.0}, "'dog' is not in 'vae', but in text_encoder, unet"),
        ("dog", float("nan"), "scale of 'dog' in text_encoder is nan"),
        ("dog", "0.7", r"set: 1 adapters, but 3 weights"),
        ("dog", [True], "scale of 'dog' in text_encoder is True"),
    ],
)
def test_settings_that_are_refused(pipe: Any, names: Any, weights: Any, message: str):
    adapters = add(pipe)
    full = image(pipe)
    with pytest.raises(HalotuneError, match=message):
        adapters.set(names, weights)
    assert torch.equal(image(pipe), full)


# -- training


@pytest.mark.parametrize(("method", "checkpointing"), [*((method, False) for method in CONFIGS), ("hra", True), ("bat", True)])
def test_training(pipe: Any, method: str, checkpointing: bool):
    """Each model's adapters get gradients, and nothing else does; checkpointed blocks give the same."""
    adapters = PipelineAdapters(pipe)
    adapters.add(configs(method, method))
    for model in (pipe.unet.train(), pipe.text_encoder.train()):
        randomize(model, "default")
    trained = {n: p for m in (pipe.unet, pipe.text_encoder) for n, p in m.named_parameters() if p.requires_grad}
    assert trained and all(".adapters.default." in n for n in trained)
    assert {id(p) for p in adapters.parameters()} == {id(p) for p in trained.values()}

    latents, noise, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([10, 700])
    noisy = pipe.scheduler.add_noise(latents, noise, t)

    def loss() -> Tensor:
        text = pipe.text_encoder(torch.arange(32).reshape(2, 16))[0]
        return nn.functional.mse_loss(pipe.unet(noisy, t, text).sample, noise)

    expected = torch.autograd.grad(loss(), list(adapters.parameters()))
    assert all(g.abs().max() > 0 for g in expected)
    if checkpointing:
        pipe.unet.enable_gradient_checkpointing()
        encoder = pipe.text_encoder
        getattr(encoder, "activation_checkpointing_enable", encoder.gradient_checkpointing_enable)()  # transformers 5's name
    optimizer = torch.optim.SGD(adapters.parameters(), lr=1e-2)
    before = loss()
    before.backward()
    for p, g in zip(adapters.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, atol=1e-6, rtol=1e-4)
    assert all(p.grad is None for m in (pipe.unet, pipe.text_encoder) for p in m.parameters() if not p.requires_grad)
    optimizer.step()
    assert loss() < before


def test_the_penalty(pipe: Any):
    config = HRAConfig(r=4, orthogonality_weight=0.1)
    adapters = add(pipe, unet=config, text_encoder=config)
    parts = [layer.adapters["dog"] for m in (pipe.unet, pipe.text_encoder) for layer in adapted_layers(m).values()]
    torch.testing.assert_close(adapters.penalty(), sum(a.penalty(*a.parameters()) for a in parts))
    adapters.unload()
    assert adapters.penalty() == 0.0


def test_loaded_adapters_are_frozen_unless_asked(pipe: Any, tmp_path: Path):
    add(pipe).save(tmp_path)
    for trainable in (False, True):
        adapters = PipelineAdapters(load(pipe.name_or_path))
        adapters.load(tmp_path, trainable=trainable)
        assert bool(list(adapters.parameters())) is trainable
        adapters.set("dog", 0.5)
        assert bool(list(adapters.parameters())) is trainable


# -- files


@pytest.mark.parametrize("method", ["hra", "loha", "miss"])
def test_one_model_with_peft(pipe: Any, tmp_path: Path, method: str):
    """Each folder is one in PEFT's format; its HRA has no convolutions of another form than square."""
    peft = pytest.importorskip("peft")
    adapters = add(pipe, unet=CONFIGS[method])
    adapters.save(tmp_path)
    latents, text = torch.randn(2, 4, 8, 8), torch.randn(2, 16, 32)
    theirs = peft.PeftModel.from_pretrained(load(pipe.name_or_path).unet, tmp_path, subfolder="unet")
    ours = PeftModel.from_pretrained(load(pipe.name_or_path).unet, tmp_path, subfolder="unet")
    with torch.no_grad():
        expected = pipe.unet(latents, 3, text).sample
        torch.testing.assert_close(theirs(latents, 3, text).sample, expected, atol=1e-5, rtol=1e-4)
        assert torch.equal(ours(latents, 3, text).sample, expected)

    (tmp_path / INDEX_NAME).unlink()  # as peft's users write it, model by model
    again = load(pipe.name_or_path)
    assert PipelineAdapters(again).load(tmp_path) == "default"
    assert torch.equal(image(again), image(pipe))


def test_bone_for_peft(pipe: Any, tmp_path: Path):
    adapters = add(pipe, unet=CONFIGS["bone"])
    adapters.save(tmp_path, bone_as_miss=True)
    assert json.loads((tmp_path / "unet" / "adapter_config.json").read_text())["peft_type"] == "MISS"
    again = load(pipe.name_or_path)
    PipelineAdapters(again).load(tmp_path)
    assert near(image(again), image(pipe))


def test_the_index(pipe: Any, tmp_path: Path):
    adapters = add(pipe)
    adapters.save(tmp_path)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.*")) == [
        INDEX_NAME,
        *(
            f"{c}/{f}"
            for c in ("text_encoder", "unet")
            for f in ("README.md", "adapter_config.json", "adapter_model.safetensors")
        ),
    ]
    assert json.loads((tmp_path / INDEX_NAME).read_text()) == {
        "adapter_name": "dog",
        "components": {"text_encoder": "CLIPTextModel", "unet": "UNet2DConditionModel"},
        "pipeline": "StableDiffusionPipeline",
    }
    config = json.loads((tmp_path / "unet" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(pipe.name_or_path)

    other = load(pipe.name_or_path)
    PipelineAdapters(other).load(tmp_path, components=["unet"])
    assert PipelineAdapters(other).names == {"dog": ["unet"]}
    adapters.set("dog", {"text_encoder": 0})
    assert torch.equal(image(other), image(pipe))


def test_from_the_hub(pipe: Any, base: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub

    asked = []

    def download(repository: str, filename: str, subfolder: str | None = None, revision: str | None = None) -> str:
        asked.append((repository, subfolder, filename, revision))
        return str(tmp_path / (subfolder or "") / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    add(pipe).save(tmp_path)
    other = load(pipe.name_or_path)
    assert PipelineAdapters(other).load("someone/dog", revision="v1") == "dog"
    assert torch.equal(image(other), image(pipe))
    assert asked[0] == ("someone/dog", None, INDEX_NAME, "v1") and {a[1] for a in asked} == {None, "unet", "text_encoder"}


def broken(folder: Path, what: str) -> None:
    config, weights = folder / "unet" / "adapter_config.json", folder / "unet" / "adapter_model.safetensors"
    index = json.loads((folder / INDEX_NAME).read_text())
    if what == "weights":
        weights.unlink()
    elif what == "truncated":
        weights.write_bytes(weights.read_bytes()[:100])
    elif what == "rank":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 2}))
    elif what == "model":
        (folder / INDEX_NAME).write_text(json.dumps(index | {"components": {"transformer": "SD3Transformer2DModel"}}))
    elif what == "index":
        (folder / INDEX_NAME).write_text(json.dumps({"components": ["unet"]}))
    elif what == "json":
        (folder / INDEX_NAME).write_text("{")
    elif what == "empty":
        for file in (*folder.rglob("*.json"), *folder.rglob("*.safetensors")):
            file.unlink()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("weights", r"unet.adapter_model\.safetensors: there is no such file"),
        ("truncated", r"cannot be read as safetensors \(100 bytes"),
        ("rank", r"unet.*hra_u: expected \(\d+, 2\), found \(\d+, 4\)"),
        ("model", "StableDiffusionPipeline has no model 'transformer'; it has "),
        ("index", rf"{INDEX_NAME}: expected a text under adapter_name"),
        ("json", rf"{INDEX_NAME}: cannot be read as JSON"),
        ("empty", rf"holds neither {INDEX_NAME} nor a folder with adapter_config\.json"),
    ],
)
def test_broken_files(pipe: Any, base: Tensor, tmp_path: Path, what: str, message: str):
    """All models of an adapter are loaded, or none."""
    adapters = add(pipe, "style", text_encoder=LoHaConfig(r=2))
    adapters.fuse()
    full = image(pipe)
    add(other := load(pipe.name_or_path)).save(tmp_path)
    broken(tmp_path, what)
    before = modules(pipe.unet), modules(pipe.text_encoder)
    with pytest.raises(HalotuneError, match=message) as caught:
        adapters.load(tmp_path)
    assert isinstance(caught.value, AdapterFileError) is (what != "model")
    assert (modules(pipe.unet), modules(pipe.text_encoder)) == before
    assert adapters.active == adapters.fused == ["style"] and torch.equal(image(pipe), full) and differ(image(other), full)


def test_what_else_is_refused(pipe: Any, base: Tensor, tmp_path: Path):
    adapters = PipelineAdapters(pipe)
    with pytest.raises(HalotuneError, match="expected a diffusers pipeline; got a UNet2DConditionModel"):
        PipelineAdapters(pipe.unet)
    with pytest.raises(HalotuneError, match=r"has no model 'unte'; it has vae, text_encoder, unet\. Did you mean 'unet'\?"):
        adapters.add({"unte": HRAConfig()})
    with pytest.raises(HalotuneError, match="no model is named"):
        adapters.add({})
    with pytest.raises(HalotuneError, match=r"unet: expected one of halotune's configurations.*got a builtins\.dict"):
        adapters.add({"unet": {"r": 4}})  # type: ignore[dict-item]
    with pytest.raises(HalotuneError, match=r"no module of the model matches.*to_q"):
        adapters.add({"text_encoder": HRAConfig(), "unet": HRAConfig(target_modules=["to_qq"])})
    assert adapters.names == {} and not adapted_layers(pipe.text_encoder)
    with pytest.raises(HalotuneError, match=r"save: the pipeline has the adapters \[\]"):
        adapters.save(tmp_path)

    add(pipe)
    with pytest.raises(HalotuneError, match="unet: there is an adapter named 'dog' already"):
        adapters.add({"unet": HRAConfig()}, "dog")
    full = image(pipe)
    adapters.add({"unet": HRAConfig(r=2)}, "b")
    with pytest.raises(HalotuneError, match=r"save: the pipeline has the adapters \['b', 'dog'\]\. Name one"):
        adapters.save(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(HalotuneError, match="file is a file"):
        adapters.save(tmp_path / "file", "dog")
    adapters.save(tmp_path / "dog", "dog")
    with pytest.raises(HalotuneError, match="holds no adapter for 'vae', but for text_encoder, unet"):
        adapters.load(tmp_path / "dog", "c", ["vae"])
    adapters.set("dog")
    assert torch.equal(image(pipe), full)


# -- saving the pipeline itself


def test_a_pipeline_saves_itself_without_adapters(pipe: Any, base: Tensor, tmp_path: Path):
    adapters = add(pipe)
    full = image(pipe)
    assert "variant" in inspect.signature(pipe.unet.save_pretrained).parameters  # pipelines ask
    assert "state_dict" in inspect.signature(pipe.text_encoder.save_pretrained).parameters
    pipe.save_pretrained(tmp_path / "plain")
    assert torch.equal(image(load(tmp_path / "plain")), base)
    pipe.unet.save_pretrained(tmp_path / "unet", variant="fp16")
    assert (
        type(pipe.unet).from_pretrained(tmp_path / "unet", variant="fp16").state_dict().keys()
        == load(pipe.name_or_path).unet.state_dict().keys()
    )
    assert torch.equal(image(pipe), full)
    adapters.fuse()
    pipe.save_pretrained(tmp_path / "fused")
    assert near(image(load(tmp_path / "fused")), full)
    adapters.unfuse()
    assert torch.equal(image(pipe), full)


def test_copies(pipe: Any, base: Tensor):
    """A copy has adapters of its own."""
    add(pipe)
    full = image(pipe)
    other = copy.deepcopy(pipe)
    mine = PipelineAdapters(other)
    mine.set("dog", 0)
    assert torch.equal(image(other), base) and torch.equal(image(pipe), full)
    mine.unload()
    assert torch.equal(image(other), base) and torch.equal(image(pipe), full)


# -- what shares, or changes, the models


def test_a_controlnet_pipeline_shares_the_adapters(pipe: Any, base: Tensor):
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    adapters = add(pipe)
    full = image(pipe)
    with adapters.plain():
        net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 16))
    assert not adapted_layers(net) and torch.equal(image(pipe), full)
    for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        nn.init.normal_(layer.weight, std=0.1)  # they start at zero
    options = {"requires_safety_checker": False, "controlnet": net}
    control = StableDiffusionControlNetPipeline(**{**pipe.components, **options})
    control.set_progress_bar_config(disable=True)
    hint = {"image": torch.rand(1, 3, 16, 16)}

    shared = PipelineAdapters(control)
    assert shared.names == adapters.names
    with shared.disabled():
        bare = image(control, **hint)
    both = image(control, **hint)
    assert differ(both, bare) and differ(bare, base)
    shared.add({"controlnet": CONFIGS["loha"]}, "hint")
    randomize(net, "hint")
    shared.set(["dog", "hint"])
    assert differ(image(control, **hint), both)
    shared.set("dog", 0)
    assert torch.equal(image(control, **hint), bare) and torch.equal(image(pipe), base)
    shared.delete("dog")
    assert adapters.names == {} and torch.equal(image(pipe), base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(pipe: Any, base: Tensor, dtype: torch.dtype, tmp_path: Path):
    adapters = add(pipe)
    full = image(pipe)
    adapters.save(tmp_path)
    pipe.to(dtype)
    low = image(pipe)
    assert (low - full).norm() < 0.2 * (full - base).norm()
    adapters.set("dog", 0)
    zero = image(pipe)
    adapters.set("dog")
    adapters.fuse()
    adapters.unfuse()
    assert torch.equal(image(pipe), low)
    adapters.unload()
    assert torch.equal(image(pipe), zero)

    adapters.load(tmp_path)  # over a half-precision base, masters in fp32
    assert {p.dtype for layer in adapted_layers(pipe.unet).values() for p in layer.adapters.parameters()} == {torch.float32}
    assert (image(pipe) - full).norm() < 0.2 * (full - base).norm()


def test_attention_processors(pipe: Any, base: Tensor):
    from diffusers.models.attention_processor import AttnProcessor

    adapters = add(pipe)
    full = image(pipe)
    pipe.unet.set_attn_processor(AttnProcessor())
    assert near(image(pipe), full)
    pipe.unet.set_default_attn_processor()
    with pytest.raises(HalotuneError, match="fuse_qkv_projections: it would leave out the adapters of the UNet2DCond"):
        pipe.unet.fuse_qkv_projections()
    adapters.fuse()
    pipe.unet.fuse_qkv_projections()
    assert near(image(pipe), full)


def test_layerwise_casting(pipe: Any, base: Tensor):
    """Weights are kept in float8 and computed with in float32."""
    plain = load(pipe.name_or_path)
    adapters = add(pipe)
    full = image(pipe)
    for p in (pipe, plain):
        p.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stored = {layer.base_layer.weight.dtype for layer in adapted_layers(pipe.unet).values()}
    assert stored == {torch.float8_e4m3fn}
    assert (image(pipe) - full).norm() < 0.5 * (full - base).norm()
    adapters.set("dog", 0)
    assert torch.equal(image(pipe), image(plain))


def test_compiled(pipe: Any):
    """The UNet in one graph, as without adapters; the grid of laws compiles every method."""
    adapters = add(pipe, unet=CONFIGS["hra"])
    inputs = torch.randn(2, 4, 8, 8), torch.tensor(3), torch.randn(2, 16, 32)

    def run(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(*inputs, return_dict=False)[0]

    adapters.set("dog", 0.5)
    expected = run(pipe.unet)
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    torch.testing.assert_close(run(pipe.unet), expected, atol=1e-5, rtol=1e-4)
    assert adapters.names == {"dog": ["unet"]}


def test_injected_otherwise(pipe: Any, base: Tensor):
    """`inject_adapter_in_model` puts adapters into the same place."""
    inject_adapter_in_model(HRAConfig(r=4), pipe.unet, "a")
    adapters = PipelineAdapters(pipe)
    assert adapters.names == {"a": ["unet"]} and adapters.active == ["a"]
    adapters.add({"unet": HRAConfig(r=2)}, "b")
    adapters.set(["a", "b"], [0.5, 0.5])
    adapters.unload()
    assert torch.equal(image(pipe), base)


def test_a_wrapped_model_is_refused(pipe: Any):
    from halotune import HRAModel

    pipe.unet = HRAModel(pipe.unet, HRAConfig(r=4))
    with pytest.raises(HalotuneError, match="the model is a HRAModel already"):
        PipelineAdapters(pipe).add({"unet": HRAConfig(r=4)}, "b")


# -- transformers instead of the UNet


@every_method
@pytest.mark.parametrize("kind", ["flux", "pixart"])
def test_transformers(kind: str, method: str, folder: Path, tmp_path: Path):
    pipe, paint = (toy_pipelines.flux(folder), flux_image) if kind == "flux" else (toy_pipelines.pixart(), pixart_image)
    pipe.set_progress_bar_config(disable=True)
    base, other = paint(pipe), copy.deepcopy(pipe)
    parts = {"transformer": CONFIGS[method]} | ({"text_encoder_2": CONFIGS[method]} if kind == "flux" else {})
    adapters = PipelineAdapters(pipe)
    adapters.add(parts)
    assert near(paint(pipe), base)
    for component in parts:
        randomize(getattr(pipe, component), "default")
    full = paint(pipe)
    assert differ(full, base)
    adapters.fuse()
    assert torch.allclose(paint(pipe), full, atol=1e-4)
    adapters.unfuse()
    assert torch.equal(paint(pipe), full)
    adapters.set("default", 0)
    assert torch.equal(paint(pipe), base)

    adapters.save(tmp_path)
    PipelineAdapters(other).load(tmp_path)
    assert torch.equal(paint(other), full)
    adapters.unload()
    assert torch.equal(paint(pipe), base) and not any(isinstance(m, AdaptedLayer) for m in pipe.transformer.modules())
