"""The layers that are adapted when the user names none: one row per group of architectures that name them alike.

A name is the end of a module's path, in whole components: "q_proj" means every module called q_proj, "to_out.0" the
first child of every to_out. The convention is the one that LoRA made common: the query and value projections of
attention, or the fused projection where query, key and value are one matrix. Where peft's LoRA defaults know an
architecture the names here equal those, so that a user who moves over adapts the same layers. For diffusers the
convention is that of its training scripts: to_q, to_k, to_v, to_out.0.

One of the names may be absent from a particular model, as long as another is there: architectures that hold one of
several language models, or whose modules were renamed between releases, list all of the names.
"""

from __future__ import annotations

from collections.abc import Mapping

_QV = ("q_proj", "v_proj")
_DIFFUSION = ("to_q", "to_k", "to_v", "to_out.0")

# (model types, as in `config.model_type`; the names of their layers)
_TRANSFORMERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    # ---- text decoders
    (
        """
        llama llama4 llama4_text mistral ministral3 mixtral qwen2 qwen2_moe qwen3 qwen3_moe
        gemma gemma2 gemma3_text gemma3n_text gemma4_text phimoe gpt_neo gptj opt xglm biogpt stablelm starcoder2
        cohere cohere2 olmo olmo2 olmo3 olmoe granite granitemoe smollm3 gpt_oss glm glm4 glm4_moe minimax_m2
        nemotron exaone4 ernie4_5 seed_oss apertus arcee helium
        """,
        _QV,
    ),
    ("phi", ("q_proj", "v_proj", "fc1", "fc2")),
    ("gpt2 gpt_bigcode", ("c_attn",)),
    ("btlm", ("c_proj", "c_attn")),
    ("gpt_neox bloom falcon RefinedWeb RefinedWebModel chatglm persimmon fuyu", ("query_key_value",)),
    ("phi3 codegen", ("qkv_proj",)),
    ("mpt", ("Wqkv",)),
    # Latent attention: queries and values leave their low-rank bottlenecks through these; q_proj where the queries have
    # no bottleneck (V2-Lite).
    ("deepseek_v2 deepseek_v3 glm4_moe_lite", ("q_proj", "q_b_proj", "kv_b_proj")),
    ("deepseek_v32 glm_moe_dsa", ("q_b_proj", "kv_b_proj")),
    # State-space layers: the fused input projection. Fused CUDA kernels take the weights of out_proj (of Mamba 1, of
    # x_proj and dt_proj too) without calling the modules, so an adapter on these would be passed by.
    ("mamba mamba2 falcon_mamba", ("in_proj",)),
    ("jamba bamba falcon_h1 granitemoehybrid", ("in_proj", "q_proj", "v_proj")),
    ("nemotron_h", ("q_proj", "k_proj", "v_proj", "o_proj")),
    # Linear attention with a full-attention layer in between.
    ("qwen3_next", ("q_proj", "v_proj", "in_proj_qkvz")),
    ("qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text", ("q_proj", "v_proj", "in_proj_qkv")),
    ("rwkv", ("key", "value", "receptance", "output")),
    ("rwkv7", ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value")),
    # ---- text encoders
    (
        """
        bert roberta xlm-roberta xlm-roberta-xl camembert electra albert ernie esm roformer rembert big_bird longformer
        mobilebert megatron-bert layoutlm layoutlmv3
        """,
        ("query", "value"),
    ),
    ("distilbert xlm flaubert", ("q_lin", "v_lin")),
    ("deberta", ("in_proj",)),
    ("deberta-v2", ("query_proj", "value_proj")),
    ("modernbert", ("Wqkv",)),
    ("modernbert-decoder eurobert", _QV),
    ("mpnet", ("q", "v")),
    # ---- encoder-decoders, of text and of speech
    ("t5 mt5 umt5 longt5 switch_transformers udop", ("q", "v")),
    ("bart mbart pegasus marian m2m_100 blenderbot blenderbot-small t5gemma whisper moonshine speecht5", _QV),
    ("led bigbird_pegasus", ("query", "value", "q_proj", "v_proj")),
    # ---- audio
    ("wav2vec2 hubert wavlm", _QV),
    ("wav2vec2-bert wav2vec2-conformer", ("linear_q", "linear_v")),
    ("clap", ("query", "value")),
    # ---- vision
    # query and value up to transformers 5.0, q_proj and v_proj in a later 5.x.
    (
        """
        vit vit_mae deit beit dinov2 dinov2_with_registers swin segformer vivit ijepa audio-spectrogram-transformer
        """,
        ("q_proj", "v_proj", "query", "value"),
    ),
    ("dinov3_vit", _QV),
    ("swinv2 videomae yolos vilt", ("query", "value")),
    ("convnext convnextv2", ("pwconv1", "pwconv2")),  # no attention: the two pointwise convolutions, which are Linear
    ("sam", ("qkv", "q_proj", "v_proj")),
    # ---- vision and language. Towers whose attention is fused (`qkv`) stay as they are: the language model is adapted.
    (
        """
        clip clip_text_model clip_vision_model siglip siglip_vision_model siglip2 siglip2_vision_model
        qwen2_vl qwen2_vl_text qwen2_5_vl qwen2_5_vl_text qwen3_vl qwen3_vl_text qwen3_vl_moe qwen3_vl_moe_text
        llava llava_next llava_next_video llava_onevision idefics2 idefics3 smolvlm paligemma gemma3 mllama mistral3
        pixtral internvl aya_vision glm4v florence2 qwen2_audio
        """,
        _QV,
    ),
    ("blip", ("query", "value", "qkv")),
    ("blip-2 instructblip", ("q", "v", "q_proj", "v_proj")),  # the language model: T5 or OPT / LLaMA
)

# (class names, as in `config._class_name`; the names of their layers)
_DIFFUSERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        """
        ControlNetModel UNet2DModel UNet2DConditionModel UNet3DConditionModel UNetMotionModel UNetSpatioTemporalConditionModel
        AudioLDM2UNet2DConditionModel I2VGenXLUNet Kandinsky3UNet StableCascadeUNet PriorTransformer
        Transformer2DModel DiTTransformer2DModel PixArtTransformer2DModel SD3Transformer2DModel
        FluxTransformer2DModel Flux2Transformer2DModel ChromaTransformer2DModel AuraFlowTransformer2DModel
        SanaTransformer2DModel HunyuanDiT2DModel Lumina2Transformer2DModel CogView3PlusTransformer2DModel
        CogView4Transformer2DModel QwenImageTransformer2DModel ZImageTransformer2DModel StableAudioDiTModel
        AllegroTransformer3DModel CogVideoXTransformer3DModel CosmosTransformer3DModel HunyuanVideoTransformer3DModel
        LatteTransformer3DModel LTXVideoTransformer3DModel LTX2VideoTransformer3DModel MochiTransformer3DModel
        SkyReelsV2Transformer3DModel WanTransformer3DModel
        """,
        _DIFFUSION,
    ),
    ("HiDreamImageTransformer2DModel", ("to_q", "to_k", "to_v", "to_out")),
)

# Composite models that do not take over their language model's names: modules of another tower, which no adapter can
# wrap, have the same names.
_NO_DEFAULT = frozenset({"gemma4"})


def _expand(groups: tuple[tuple[str, tuple[str, ...]], ...]) -> dict[str, tuple[str, ...]]:
    return {name: targets for names, targets in groups for name in names.split()}


TRANSFORMERS_TARGETS: dict[str, tuple[str, ...]] = _expand(_TRANSFORMERS)
DIFFUSERS_TARGETS: dict[str, tuple[str, ...]] = _expand(_DIFFUSERS)
DEFAULT_TARGETS: dict[str, tuple[str, ...]] = TRANSFORMERS_TARGETS | DIFFUSERS_TARGETS


def default_targets(config: object | Mapping | None) -> tuple[str, ...] | None:
    """The names of the layers to adapt in a model with this config, or None where its architecture is not in the table.

    `config` is a transformers config, a diffusers config, or either as a dictionary. A composite model whose own
    `model_type` is unknown takes the names of its `text_config`. A diffusers model that came from its constructor, not
    from a file, has no `_class_name` in its config: pass `{"_class_name": type(model).__name__}`.
    """
    # Only strings: diffusers configs of custom pipelines hold a list there.
    names = [name for key in ("model_type", "_class_name") if isinstance(name := _field(config, key), str)]
    for name in names:
        if name in DEFAULT_TARGETS:
            return DEFAULT_TARGETS[name]
    text_config = _field(config, "text_config")
    if text_config is None or not _NO_DEFAULT.isdisjoint(names):
        return None
    return default_targets(text_config)


def known_architectures() -> list[str]:
    """Every model type and diffusers class that has default targets, sorted."""
    return sorted(DEFAULT_TARGETS)


def _field(config: object | Mapping | None, key: str) -> object:
    return config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)
