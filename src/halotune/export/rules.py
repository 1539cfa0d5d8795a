"""The rules that an adapter must keep for a program to read it rightly: one table, `RULES`, and `check`.

Every rule is what the named program's own loader demands, or silently gets wrong:

- vLLM 0.33: `vllm/lora/peft_helper.py` (`_validate_features`, `validate_legal`, `get_rank_and_scaling`), `vllm/lora/utils.py`
  (`parse_fine_tuned_lora_name`), `vllm/config/lora.py` (`MaxLoRARanks`), `vllm/lora/lora_model.py`.
- SGLang 0.5.23: `sglang/srt/lora/lora.py` (scale; `normalize_qkv_proj`, `normalize_gate_up_proj`), `utils.py`
  (`get_normalized_target_modules`), `lora_manager.py` (`validate_new_adapter`), `mem_pool.py` (`load_lora_weight_to_buffer`).
- llama.cpp: `convert_lora_to_gguf.py` (names, `lm_head`, `LoraTorchTensor`), `src/llama-adapter.h` (`get_scale`), and
  the transposed weights of GPT-2 in `conversion`.
- diffusers 0.42: `loaders/peft.py` (`load_lora_adapter`), `utils/peft_utils.py` (`get_peft_kwargs`), `loaders/lora_base.py`
  (`_load_lora_into_text_encoder`).
- ComfyUI: `comfy/lora.py` (`model_lora_keys_unet`, `model_lora_keys_clip`), `comfy/weight_adapter/{base,lora,loha}.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

from ..core.errors import look_up
from .conditions import (
    Condition,
    alone,
    base_changed,
    entries_set,
    grouped_without_rank,
    head_of_tied_base,
    keys_unlike,
    lone_projections,
    magnitude_of_outputs,
    no_product,
    not_classifier,
    not_lora,
    not_matrices,
    other_rank,
    overridden,
    rank_above,
    scale_lost,
    two_scales,
)
from .header import Header
from .runtimes import RUNTIMES


@dataclass(frozen=True)
class Rule:
    """One thing that a program demands.

    Attributes:
        name: what it is called in reports.
        says: the demand, and what happens where it is not met.
        remedy: what to do; "{runtime}" is replaced by its name.
        broken: what was found, or None where the rule is kept.
    """

    name: str
    says: str
    remedy: str
    broken: Condition


@dataclass(frozen=True)
class Problem:
    """A rule that an adapter breaks."""

    runtime: str
    rule: Rule
    found: str

    def __str__(self) -> str:
        remedy = self.rule.remedy.format(runtime=self.runtime)
        return f"{self.runtime}: {self.rule.name}: {self.rule.says} Found: {self.found}. {remedy}"


def check(adapter: str | PathLike[str] | Header, runtimes: str | Sequence[str]) -> list[Problem]:
    """The rules that an adapter breaks; an empty list where all the programs named read it.

    Args:
        adapter: a folder, or one safetensors file; of any method and from any program. Only its header is read.
        runtimes: names in `RULES`, such as "vllm".

    Raises:
        HalotuneError: for a name that is not there, or files that cannot be read.
    """
    header = adapter if isinstance(adapter, Header) else Header.read(adapter)
    problems = []
    for name in [runtimes] if isinstance(runtimes, str) else runtimes:
        for rule in look_up(RULES, name, "check"):
            found = rule.broken(header)
            if found is not None:
                problems.append(Problem(name, rule, found))
    return problems


# -- the rules

_EXPORT = "Convert it: halotune export ADAPTER --base MODEL --to lora --for {runtime}."
_MERGE = "Merge the adapter into the weights and serve those, or train without."

_LORA = Rule("lora", "Only LoRA is read, from a folder with adapter_config.json.", _EXPORT, not_lora)
_PAIRS = Rule("pairs", "Every lora_A needs its lora_B, and the other way round.", "Save the adapter again.", alone)
_MATRICES = Rule("matrices", "Only LoRA of linear layers is read: matrices.", _MERGE, not_matrices)
_DORA = Rule("dora", "DoRA is not supported.", _MERGE, entries_set("use_dora"))
_BIAS = Rule(
    "bias",
    "Trained biases are refused or ignored.",
    'Train with bias="none", or merge.',
    entries_set("bias", harmless=["none"]),
)
_MODULES = Rule("modules-to-save", "Fully fine-tuned modules are refused or ignored.", _MERGE, entries_set("modules_to_save"))
_BASE = Rule(
    "base-changed",
    "PEFT takes this start (PiSSA, OLoRA, CorDA, LoftQ) out of the base's weights when it loads the adapter; here these stay.",
    "Make it a plain LoRA in PEFT: model.save_pretrained(folder, path_initial_model_for_weight_conversion=START).",
    base_changed,
)
_VARIANTS = ("layer_replication", "lora_bias", "use_bdlora", "use_qalora")
_VARIANT = Rule("variant", "These variants of LoRA are refused or ignored.", _MERGE, entries_set(*_VARIANTS))
_ACTIVATED = Rule("variant", _VARIANT.says, _MERGE, entries_set(*_VARIANTS, "alora_invocation_tokens"))
_KEYS = r".*\.lora_[AB]\.weight|.*\.lora_embedding_[AB]|.*\.(embed_tokens|lm_head)\.base_layer\.weight"
_NAMES = Rule("names", "Keys are X.lora_A.weight and X.lora_B.weight.", _EXPORT, keys_unlike(_KEYS))
_UNIFORM = Rule(
    "one-rank",
    "All modules have the rank r of the configuration: others are scaled wrongly or fail.",
    _EXPORT,
    other_rank(patterns=False),
)
_RANKS = Rule("rank-pattern", "rank_pattern is ignored.", _EXPORT, overridden("rank_pattern", "r"))
_ALPHAS = Rule(
    "alpha-pattern",
    "alpha_pattern is ignored: one lora_alpha holds for all modules.",
    _EXPORT,
    overridden("alpha_pattern", "lora_alpha"),
)
_RSLORA = Rule("rslora", "use_rslora is ignored: the scale is lora_alpha / r, off by √r.", _EXPORT, entries_set("use_rslora"))

_PLAIN, _ALONE = (_LORA, _NAMES, _PAIRS, _MATRICES), (_BIAS, _MODULES, _DORA)

_CLIP = r"encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"
_KOHYA_CLIP = r"(te[12]?|prior_te)_text_model_" + _CLIP.replace(r"\.", "_")
_T5 = r"te[123]_encoder_block_\d+_layer_\d_(SelfAttention_[qkvo]|DenseReluDense_w[io](_\d)?)"
_MODELS = r"(lora_(unet|transformer|prior_unet)|lycoris)_[^.]+"
_LORA_KEYS = r"(alpha|lora_(up|down|mid)\.weight)"

RULES: dict[str, tuple[Rule, ...]] = {
    "vllm": (
        _LORA,
        Rule("names", _NAMES.says, _EXPORT, keys_unlike(rf"{_KEYS}|.*\b(score|classifier)\.(weight|bias)")),
        _PAIRS,
        _MATRICES,
        Rule(
            "rank",
            f"max_lora_rank is at most {RUNTIMES['vllm'].ranks[-1]} (serve with --max-lora-rank at or above the rank).",
            "Truncate it: halotune export … --for vllm --rank R.",
            rank_above(RUNTIMES["vllm"].ranks[-1]),
        ),
        Rule(
            "one-rank",
            "Every module has the rank that r or rank_pattern says: others are scaled wrongly or fail.",
            _EXPORT,
            other_rank(patterns=True),
        ),
        _BASE,
        _ACTIVATED,
        _BIAS,
        Rule("modules-to-save", "Of fully fine-tuned modules one classifier or score is read.", _MERGE, not_classifier),
        _DORA,
    ),
    "sglang": (
        *_PLAIN,
        _UNIFORM,
        _RANKS,
        _ALPHAS,
        _RSLORA,
        Rule(
            "target-names",
            'target_modules is a list of names, or "all-linear": a regular expression is refused.',
            _EXPORT,
            lambda h: (
                f"target_modules={t!r}"
                if isinstance(t := h.config.get("target_modules"), str) and t not in ("all", "all-linear")
                else None
            ),
        ),
        Rule(
            "stacked",
            "q, k, v and gate, up are stacked: q needs v and v needs q, k needs q, up needs gate.",
            "Adapt both, or serve with another program.",
            lone_projections,
        ),
        _BASE,
        _ACTIVATED,
        *_ALONE,
    ),
    "llama.cpp": (
        *_PLAIN,
        _ALPHAS,
        _RSLORA,
        Rule(
            "alpha",
            "lora_alpha of 0 counts as none: the scale is 1.",
            _EXPORT,
            lambda h: "lora_alpha=0" if h.config.get("lora_alpha") == 0 else None,
        ),
        Rule(
            "conv1d",
            "Weights of transformers' Conv1D (GPT-2) are transposed with their LoRA: square ones are silently wrong.",
            _MERGE,
            entries_set("fan_in_fan_out"),
        ),
        Rule(
            "tied-head",
            "lm_head and embeddings that are tied are one tensor there, so a LoRA of lm_head alone is refused.",
            "Leave lm_head out when training, or merge the adapter (which unties them); name the base with --base.",
            head_of_tied_base,
        ),
        _BASE,
        _VARIANT,
        *_ALONE,
    ),
    "diffusers": (
        Rule(
            "names",
            "Keys begin with the part of the pipeline (unet, transformer, and text_encoder for CLIP alone) and end in "
            "lora_A.weight or lora_B.weight (or are kohya's); others are passed over silently.",
            _EXPORT,
            keys_unlike(
                rf"(unet|transformer(_\d)?)\..*\.lora(_A|_B|\.down|\.up)\.weight"
                rf"|text_encoder(_2)?\.(text_model\.)?({_CLIP}|text_projection)\.lora(_A|_B|(_linear_layer)?\.(up|down))\.weight"
                rf"|({_MODELS}|lora_{_KOHYA_CLIP})\.{_LORA_KEYS}"
            ),
        ),
        _PAIRS,
        Rule("scale", "The scale is 1 unless the file's header or an alpha says more.", _EXPORT, scale_lost),
        Rule("two-scales", "A file has alphas, or ranks and scales in its header; both are refused.", _EXPORT, two_scales),
        Rule(
            "grouped-rank",
            "The rank is read off lora_B, which is wrong for a grouped convolution, unless the header has it.",
            _EXPORT,
            grouped_without_rank,
        ),
    ),
    "comfyui": (
        Rule(
            "names",
            "Keys are kohya's (lora_unet_…, lora_te1_text_model_…) or, for transformers and CLIP's layers "
            "(text_encoder.text_model.…), those of diffusers; others are passed over with a warning.",
            _EXPORT,
            keys_unlike(
                rf"((transformer|diffusion_model|text_encoders)\..*|text_encoder(_2)?\.text_model\.{_CLIP})"
                rf"\.(lora_[AB]\.weight|lora_(up|down)\.weight|alpha)"
                rf"|({_MODELS}|lora_({_KOHYA_CLIP}|{_T5}|te[12]_text_projection|prior_te_text_projection))"
                rf"\.({_LORA_KEYS}|dora_scale|hada_(w\d_[ab]|t\d))"
            ),
        ),
        _PAIRS,
        Rule("scale", "The scale is 1 without an alpha beside the factors.", _EXPORT, scale_lost),
        Rule(
            "product", "lora_up times lora_down must be the weight: peft's grouped convolutions are not.", _EXPORT, no_product
        ),
        Rule(
            "magnitude",
            "A magnitude for each output (dora_scale) is divided by the norm of W where it should be that of W + ΔW.",
            "Merge the adapter into the weights, or train with wd_on_out=False.",
            magnitude_of_outputs,
        ),
    ),
}
