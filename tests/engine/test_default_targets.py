"""The table of default targets against the models it speaks of, built on the meta device, and against peft's table."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from halotune.engine.injection import default_targets as table
from halotune.engine.injection.default_targets import (
    DEFAULT_TARGETS,
    DIFFUSERS_TARGETS,
    TRANSFORMERS_TARGETS,
    default_targets,
    known_architectures,
)

# Model types whose code lives beside their weights: no release of transformers can build them. The names are peft's.
REMOTE_CODE = {"RefinedWeb", "RefinedWebModel", "btlm", "chatglm", "rwkv7"}

# The names these were renamed between: a model has one pair or the other, whole.
RENAMED = ("q_proj", "v_proj", "query", "value")

# peft's entries that are not taken over, with the reason.
DIFFERS_FROM_PEFT = {
    "gemma4": "a regular expression: its vision and audio towers hold q_proj modules that no adapter can wrap",
}

# The changes to a default config without which no model comes of it, or one without some of the layers that the table
# names. Several: every name has to be found in at least one of the models.
MROPE = {"rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20]}}
CONFIGS: dict[str, list[dict]] = {
    "apertus": [{"hidden_act": "silu"}],
    "aya_vision": [{"vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 16}}],
    "bamba": [{"attn_layer_indices": [0]}],
    "blip-2": [{}, {"text_config": {"model_type": "t5"}}],
    "deepseek_v2": [{}, {"q_lora_rank": None}],
    "deepseek_v3": [{}, {"q_lora_rank": None}],
    "esm": [{"vocab_size": 33, "pad_token_id": 1}],
    "gemma3n_text": [{"num_kv_shared_layers": 0}],
    "glm4_moe_lite": [{}, {"q_lora_rank": None}],
    "granitemoehybrid": [{"layer_types": ["mamba", "attention"], "num_hidden_layers": 2}],
    "idefics3": [{"text_config": {"model_type": "llama", "pad_token_id": 0}}],
    "instructblip": [{}, {"text_config": {"model_type": "t5"}}],
    "mllama": [{"text_config": {"rope_scaling": {"rope_type": "default"}}}],
    "nemotron": [{"num_key_value_heads": 8}],
    "qwen3_vl": [{"text_config": MROPE}],
    "qwen3_vl_moe": [{"text_config": MROPE}],
    "qwen3_vl_moe_text": [MROPE],
    "qwen3_vl_text": [MROPE],
    "smolvlm": [{"text_config": {"model_type": "llama", "pad_token_id": 0}}],
}
DIFFUSERS_CONFIGS: dict[str, dict] = {
    "HiDreamImageTransformer2DModel": {"patch_size": 2, "caption_channels": [64, 64], "llama_layers": [0]},
    "HunyuanDiT2DModel": {"patch_size": 2, "in_channels": 4, "sample_size": 32},
    "LatteTransformer3DModel": {"patch_size": 2, "in_channels": 4, "caption_channels": 64},
    "Transformer2DModel": {"in_channels": 32},
}
# Two layers show every kind of layer, but for the hybrids whose attention comes later.
LAYERS = {"jamba": 5} | dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"), 4)


def found(model: nn.Module, suffix: str) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if f".{name}".endswith(f".{suffix}")]


def shorten(config, layers: int) -> None:
    """Cuts a transformers config, and the configs within it, to so many layers: the rest repeat them."""
    from transformers import PretrainedConfig

    for key in ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_decoder_layers"):
        if isinstance(getattr(config, key, None), int):
            setattr(config, key, layers)
    if vars(config).get("layer_types"):  # one entry a layer; some configs compute it
        config.layer_types = config.layer_types[:layers]
    for value in list(vars(config).values()):
        if isinstance(value, PretrainedConfig):
            shorten(value, layers)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # transformers 4 scripts functions
@pytest.mark.parametrize("model_type", sorted(set(TRANSFORMERS_TARGETS) - REMOTE_CODE))
def test_names_are_linear_layers_of_the_transformers_model(model_type: str) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, MODEL_MAPPING
    from transformers.pytorch_utils import Conv1D

    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    counts: Counter[str] = Counter()
    for overrides in CONFIGS.get(model_type, [{}]):
        config = transformers.AutoConfig.for_model(model_type, **overrides)
        shorten(config, LAYERS.get(model_type, 2))
        mapping = MODEL_MAPPING if type(config) in MODEL_MAPPING else MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
        with torch.device("meta"):
            model = mapping[type(config)](config)
        for suffix in TRANSFORMERS_TARGETS[model_type]:
            modules = found(model, suffix)
            assert all(isinstance(module, (nn.Linear, Conv1D)) for module in modules), suffix
            counts[suffix] += len(modules)
    missing = {suffix for suffix in TRANSFORMERS_TARGETS[model_type] if not counts[suffix]}
    if TRANSFORMERS_TARGETS[model_type] == RENAMED:
        assert missing in (set(RENAMED[:2]), set(RENAMED[2:]))
    else:
        assert not missing


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # diffusers warns about its own modules
@pytest.mark.parametrize("class_name", sorted(DIFFUSERS_TARGETS))
def test_names_are_linear_layers_of_the_diffusers_model(class_name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    model_class = getattr(diffusers, class_name, None)
    if model_class is None:
        pytest.skip(f"diffusers {diffusers.__version__} has no {class_name}")
    with torch.device("meta"):
        model = model_class(**DIFFUSERS_CONFIGS.get(class_name, {}))
    for suffix in DIFFUSERS_TARGETS[class_name]:
        modules = found(model, suffix)
        assert modules, suffix
        assert all(isinstance(module, nn.Linear) for module in modules), suffix


def test_table_agrees_with_peft() -> None:
    constants = pytest.importorskip("peft.utils.constants")
    peft_targets = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    ours = {name: set(DEFAULT_TARGETS.get(name, ())) for name in peft_targets if name not in DIFFERS_FROM_PEFT}
    assert ours == {name: set(targets) for name, targets in peft_targets.items() if name not in DIFFERS_FROM_PEFT}


def test_gemma4_has_no_default_since_its_towers_wrap_their_projections() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if "gemma4" not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no gemma4")
    config = transformers.AutoConfig.for_model("gemma4", vision_config={"model_type": "gemma4_vision"})
    shorten(config, 2)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    assert not all(isinstance(module, nn.Linear) for module in found(model, "q_proj"))
    assert default_targets(config) is None
    assert default_targets(config.text_config) == ("q_proj", "v_proj")


@pytest.mark.parametrize("kind", [dict, lambda **fields: SimpleNamespace(**fields)], ids=["mapping", "object"])
def test_config_as_mapping_or_object(kind) -> None:
    assert default_targets(kind(model_type="phi3")) == ("qkv_proj",)
    assert default_targets(kind(_class_name="FluxTransformer2DModel")) == ("to_q", "to_k", "to_v", "to_out.0")
    assert default_targets(kind(model_type="new_vlm", text_config=kind(model_type="gpt2"))) == ("c_attn",)
    # A composite's own entry comes before that of its language model.
    assert default_targets(kind(model_type="blip-2", text_config=kind(model_type="opt"))) == DEFAULT_TARGETS["blip-2"]
    assert default_targets(kind(model_type="new_vlm", text_config=kind(model_type="new_text"))) is None


@pytest.mark.parametrize(
    "config",
    [None, {}, object(), {"model_type": "custom"}, {"model_type": None}, {"_class_name": ["pipeline", "UNet2DModel"]}],
    ids=["none", "empty", "object", "custom", "no-name", "pipeline"],
)
def test_unknown_architecture_has_no_default(config) -> None:
    assert default_targets(config) is None


def test_diffusers_config_names_its_class_once_read_from_a_file(tmp_path) -> None:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        built = diffusers.PriorTransformer(num_layers=1)
        assert default_targets(built.config) is None  # a constructor leaves no class name: the caller gives it
        built.save_config(tmp_path)
        read = diffusers.PriorTransformer.from_config(diffusers.PriorTransformer.load_config(tmp_path))
    assert default_targets(read.config) == DIFFUSERS_TARGETS["PriorTransformer"]
    assert default_targets({"_class_name": type(built).__name__}) == DIFFUSERS_TARGETS["PriorTransformer"]


def test_every_architecture_is_listed_once() -> None:
    groups = table._TRANSFORMERS + table._DIFFUSERS
    listed = [name for names, _ in groups for name in names.split()]
    assert sorted(listed) == known_architectures()
