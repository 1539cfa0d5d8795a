"""The rules that an adapter must keep for a program to read it rightly: one table, `RULES`, and `check`.

Every rule is what the named program's own loader demands, or silently gets wrong:

- vLLM: `vllm/lora/peft_helper.py` (`validate_legal`), `vllm/lora/utils.py` (`parse_fine_tuned_lora_name`),
  `vllm/config/lora.py` (`MaxLoRARanks`), `vllm/lora/lora_model.py`.
- SGLang: `python/sglang/srt/lora/lora.py` (scale; `normalize_qkv_proj`, `normalize_gate_up_proj`), `lora_config.py`,
  `lora_manager.py` (`validate_new_adapter`), `mem_pool.py` (`load_lora_weight_to_buffer`).
- llama.cpp: `convert_lora_to_gguf.py` (names, `LoraTorchTensor`), `src/llama-adapter.h` (`get_scale`), and the transposed
  weights of GPT-2 in `conversion`.
- diffusers: `loaders/peft.py` (`load_lora_adapter`), `utils/peft_utils.py` (`get_peft_kwargs`), `loaders/lora_base.py`.
- ComfyUI: `comfy/lora.py` (`model_lora_keys_unet`, `model_lora_keys_clip`), `comfy/weight_adapter/lora.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from os import PathLike

from ..core.errors import HalotuneError, closest
from .header import METADATA_KEY, Header
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
    broken: Callable[[Header], str | None]


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
        for rule in rules_of(name):
            found = rule.broken(header)
            if found is not None:
                problems.append(Problem(name, rule, found))
    return problems


def rules_of(runtime: str) -> tuple[Rule, ...]:
    if runtime in RULES:
        return RULES[runtime]
    near = closest(runtime.lower(), list(RULES), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise HalotuneError(f"check: expected one of {', '.join(RULES)}; got {runtime!r}.{hint}")


# -- what a rule looks at


def _shown(keys: Iterable[str]) -> str | None:
    keys = list(keys)
    more = f" … ({len(keys)} in all)" if len(keys) > 3 else ""
    return ", ".join(keys[:3]) + more if keys else None


def _set(entry: str, *harmless: object) -> Callable[[Header], str | None]:
    """Whether an entry of the configuration is set to more than these values."""

    def broken(header: Header) -> str | None:
        value = header.config.get(entry)
        return None if not value or value in harmless else f"{entry}={value!r}"

    return broken


def _keys_unlike(pattern: str) -> Callable[[Header], str | None]:
    """The keys that do not match in full."""
    return lambda header: _shown(k for k in header.shapes if not re.fullmatch(pattern, k))


def _not_lora(header: Header) -> str | None:
    if not header.config:
        return f"no adapter_config.json beside {header.file.name}"
    if header.config.get("peft_type") != "LORA":
        return f"peft_type={header.config.get('peft_type')!r}"
    if header.rank is None:
        return f"r={header.config.get('r')!r}"
    return _shown(f"no entry {k}" for k in ("lora_alpha", "target_modules") if k not in header.config)


_PARTNER = {
    ".lora_A.weight": ".lora_B.weight",
    ".lora_B.weight": ".lora_A.weight",
    ".lora_down.weight": ".lora_up.weight",
    ".lora_up.weight": ".lora_down.weight",
}


def _alone(header: Header) -> str | None:
    def lonely(key: str) -> bool:
        return any(key.endswith(s) and key.removesuffix(s) + p not in header.shapes for s, p in _PARTNER.items())

    return _shown(k for k in header.shapes if lonely(k))


def _pairs(header: Header) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Path -> shapes of A and B."""
    out = {}
    for a, b in ((".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")):
        for key, shape in header.shapes.items():
            path = key.removesuffix(a)
            other = header.shapes.get(path + b, ())
            if path != key and len(shape) > 1 and len(other) > 1:
                out[path] = shape, other
    return out


def _not_matrices(header: Header) -> str | None:
    return _shown(f"{k} {s}" for k, s in header.shapes.items() if ".lora_" in k and k.endswith(".weight") and len(s) != 2)


def _other_rank(header: Header) -> str | None:
    r = header.rank
    return _shown(f"{path} of rank {A[0]}, r={r}" for path, (A, _) in _pairs(header).items() if r is not None and A[0] != r)


def _rank_above(most: int) -> Callable[[Header], str | None]:
    def broken(header: Header) -> str | None:
        highest = max([header.rank or 0, *(A[0] for A, _ in _pairs(header).values())])
        return f"rank {highest}" if highest > most else None

    return broken


def _lone_projections(header: Header) -> str | None:
    """q and v come together, k and up only with those that they are stacked with."""
    needs = {"q_proj": "v_proj", "k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    paths = {re.sub(r"\.lora_[AB]\.weight$", "", key) for key in header.shapes}

    def lacking(path: str) -> str | None:
        parent, _, name = path.rpartition(".")
        stacked = not any(p.startswith(f"{parent}.kv_") for p in paths)  # DeepSeek's attention is not
        return needs[name] if name in needs and stacked and f"{parent}.{needs[name]}" not in paths else None

    return _shown(f"{path} without {other}" for path in sorted(paths) if (other := lacking(path)))


def _scale_lost(header: Header) -> str | None:
    """Files without an alpha of their own are applied with scale 1."""
    entries, alphas = header.config, any(k.endswith(".alpha") for k in header.shapes)
    if METADATA_KEY in header.metadata or alphas or header.rank is None:
        return None
    scaled = {k: v for k in ("use_rslora", "rank_pattern", "alpha_pattern") if (v := entries.get(k))}
    if entries.get("lora_alpha", header.rank) != header.rank:
        scaled["lora_alpha"] = entries["lora_alpha"]
    return ", ".join(f"{k}={v!r}" for k, v in {"r": header.rank, **scaled}.items()) if scaled else None


def _grouped_without_rank(header: Header) -> str | None:
    if METADATA_KEY in header.metadata:
        return None
    return _shown(f"{path}: lora_A {A}, lora_B {B}" for path, (A, B) in _pairs(header).items() if A[0] != B[1])


def _no_product(header: Header) -> str | None:
    return _shown(f"{path}: {A} and {B}" for path, (A, B) in _pairs(header).items() if A[0] != B[1])


# -- the rules

_EXPORT = "Convert it: halotune export ADAPTER --base MODEL --to lora --for {runtime}."
_MERGE = "Merge the adapter into the weights and serve those, or train without."

_LORA = Rule("lora", "Only LoRA is read, from a folder with adapter_config.json.", _EXPORT, _not_lora)
_PAIRS = Rule("pairs", "Every lora_A needs its lora_B, and the other way round.", "Save the adapter again.", _alone)
_MATRICES = Rule("matrices", "Only LoRA of linear layers is read: matrices.", _MERGE, _not_matrices)
_DORA = Rule("dora", "DoRA is not supported.", _MERGE, _set("use_dora"))
_BIAS = Rule("bias", "Trained biases are refused or ignored.", 'Train with bias="none", or merge.', _set("bias", "none"))
_MODULES = Rule("modules-to-save", "Fully fine-tuned modules are refused or ignored.", _MERGE, _set("modules_to_save"))
_NAMES = Rule(
    "names",
    "Keys are X.lora_A.weight and X.lora_B.weight.",
    _EXPORT,
    _keys_unlike(r".*\.lora_[AB]\.weight|.*\.lora_embedding_[AB]|.*\.(embed_tokens|lm_head)\.base_layer\.weight"),
)
_UNIFORM = Rule(
    "one-rank", "All modules have the rank r of the configuration: others are scaled wrongly or fail.", _EXPORT, _other_rank
)
_RANKS = Rule("rank-pattern", "rank_pattern is ignored.", _EXPORT, _set("rank_pattern"))
_ALPHAS = Rule(
    "alpha-pattern", "alpha_pattern is ignored: one lora_alpha holds for all modules.", _EXPORT, _set("alpha_pattern")
)
_RSLORA = Rule("rslora", "use_rslora is ignored: the scale is lora_alpha / r, off by √r.", _EXPORT, _set("use_rslora"))

_COMPONENTS = r"(unet|transformer(_\d)?|text_encoder(_\d)?)\."
_KOHYA = r"(lora_(unet|te\d?|transformer|prior_unet|prior_te)|lycoris)_[^.]+"
_KOHYA_LORA = rf"{_KOHYA}\.(alpha|lora_(up|down|mid)\.weight)"

RULES: dict[str, tuple[Rule, ...]] = {
    "vllm": (
        _LORA,
        _NAMES,
        _PAIRS,
        _MATRICES,
        Rule(
            "rank",
            f"max_lora_rank is at most {RUNTIMES['vllm'].ranks[-1]} (serve with --max-lora-rank at or above the rank).",
            "Truncate it: halotune export … --for vllm --rank R.",
            _rank_above(RUNTIMES["vllm"].ranks[-1]),
        ),
        _UNIFORM,
        _RANKS,
        _ALPHAS,
        _BIAS,
        _MODULES,
        _DORA,
    ),
    "sglang": (
        _LORA,
        _NAMES,
        _PAIRS,
        _MATRICES,
        _UNIFORM,
        _RANKS,
        _ALPHAS,
        _RSLORA,
        Rule(
            "target-names",
            'target_modules is a list of names: a regular expression counts as "all".',
            _EXPORT,
            lambda h: f"target_modules={t!r}" if isinstance(t := h.config.get("target_modules"), str) else None,
        ),
        Rule(
            "stacked",
            "q, k, v and gate, up are stacked: q needs v and v needs q, k needs q, up needs gate.",
            "Adapt both, or serve with another program.",
            _lone_projections,
        ),
        _BIAS,
        _MODULES,
        _DORA,
    ),
    "llama.cpp": (
        _LORA,
        _NAMES,
        _PAIRS,
        _MATRICES,
        _ALPHAS,
        _RSLORA,
        Rule(
            "conv1d",
            "Weights of transformers' Conv1D (GPT-2) are transposed with their LoRA: square ones are silently wrong.",
            _MERGE,
            _set("fan_in_fan_out"),
        ),
        _BIAS,
        _MODULES,
        _DORA,
    ),
    "diffusers": (
        Rule(
            "names",
            "Keys begin with the part of the pipeline and end in lora_A.weight or lora_B.weight (or are kohya's); others are "
            "passed over silently.",
            _EXPORT,
            _keys_unlike(rf"{_COMPONENTS}.*\.lora(_A|_B|\.down|\.up)\.weight|{_KOHYA_LORA}"),
        ),
        _PAIRS,
        Rule("scale", "The scale is 1 unless the file's header or an alpha says more.", _EXPORT, _scale_lost),
        Rule(
            "grouped-rank",
            "The rank is read off lora_B, which is wrong for a grouped convolution, unless the header has it.",
            _EXPORT,
            _grouped_without_rank,
        ),
    ),
    "comfyui": (
        Rule(
            "names",
            "Keys are kohya's (lora_unet_…, lora_te1_…) or, for transformers and text encoders, those of diffusers; others are "
            "passed over with a warning.",
            _EXPORT,
            _keys_unlike(
                rf"(transformer|diffusion_model|text_encoder(_\d)?)\..*\.(lora_[AB]\.weight|lora_(up|down)\.weight|alpha)"
                rf"|{_KOHYA_LORA}|{_KOHYA}\.(dora_scale|hada_(w\d_[ab]|t\d))"
            ),
        ),
        _PAIRS,
        Rule("scale", "The scale is 1 without an alpha beside the factors.", _EXPORT, _scale_lost),
        Rule(
            "product", "lora_up times lora_down must be the weight: peft's grouped convolutions are not.", _EXPORT, _no_product
        ),
    ),
}
