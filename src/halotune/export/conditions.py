"""What the rules look at in an adapter's header: each returns what was found, or None where the rule is kept."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from ..core.config import matching
from ..core.errors import few
from .header import METADATA_KEY, Header

Condition = Callable[[Header], "str | None"]


def _shown(keys: Iterable[str]) -> str | None:
    return few(keys) or None


def entries_set(*entries: str, harmless: Iterable[object] = ()) -> Condition:
    """Which of these entries of the configuration are set to more than these values."""
    return lambda h: ", ".join(f"{e}={v!r}" for e in entries if (v := h.config.get(e)) and v not in harmless) or None


def overridden(pattern: str, entry: str) -> Condition:
    """Whether a pattern gives some module another value than the entry that holds for all."""

    def broken(header: Header) -> str | None:
        values = _pattern(header, pattern)
        return f"{pattern}={values!r}" if any(v != header.config.get(entry) for v in values.values()) else None

    return broken


def _pattern(header: Header, name: str) -> dict[str, Any]:
    values = header.config.get(name)
    return values if isinstance(values, dict) else {}


def _at(patterns: dict[str, Any], path: str, default: Any) -> Any:
    """What PEFT gives a module."""
    with suppress(re.error):  # of whatever wrote the file
        return next(iter(matching(patterns, path)), default)
    return default


def base_changed(header: Header) -> str | None:
    """Whether PEFT changes the base's weights when it loads the adapter."""
    start = header.config.get("init_lora_weights")
    harmless = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
    return f"init_lora_weights={start!r}" if isinstance(start, str) and start.lower() not in harmless else None


def not_classifier(header: Header) -> str | None:
    """Whether there are fully fine-tuned modules, other than one head of a classifier."""
    names = header.config.get("modules_to_save")
    return f"modules_to_save={names!r}" if names and names not in (["classifier"], ["score"]) else None


def head_of_tied_base(header: Header) -> str | None:
    heads = [k for k in header.shapes if re.search(r"\blm_head\.lora_", k)]
    if not heads or header.tied is False:
        return None
    return f"{heads[0]}, " + (
        "and the base's embeddings are tied" if header.tied else "and no config.json of the base is at hand"
    )


def keys_unlike(pattern: str) -> Condition:
    """The keys that do not match in full."""
    return lambda header: _shown(k for k in header.shapes if not re.fullmatch(pattern, k))


def not_lora(header: Header) -> str | None:
    if not header.config:
        return f"no adapter_config.json beside {header.file.name}"
    if header.config.get("peft_type") != "LORA":
        return f"peft_type={header.config.get('peft_type')!r}"
    if header.rank is None:
        return f"r={header.config.get('r')!r}"
    return _shown(f"no entry {k}" for k in ("lora_alpha", "target_modules") if k not in header.config)


_HALVES = ((".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight"))


def alone(header: Header) -> str | None:
    ends = (*_HALVES, *((b, a) for a, b in _HALVES))

    def lonely(key: str) -> bool:
        return any(key.endswith(own) and key.removesuffix(own) + other not in header.shapes for own, other in ends)

    return _shown(k for k in header.shapes if lonely(k))


def _pairs(header: Header) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Path -> shapes of A and B."""
    out = {}
    for a, b in _HALVES:
        for key, shape in header.shapes.items():
            path = key.removesuffix(a)
            other = header.shapes.get(path + b, ())
            if path != key and len(shape) > 1 and len(other) > 1:
                out[path] = shape, other
    return out


def not_matrices(header: Header) -> str | None:
    return _shown(f"{k} {s}" for k, s in header.shapes.items() if ".lora_" in k and k.endswith(".weight") and len(s) != 2)


def other_rank(patterns: bool) -> Condition:
    """The modules whose rank is not what the configuration says, be it by `rank_pattern`."""

    def broken(header: Header) -> str | None:
        if header.rank is None:
            return None
        given = _pattern(header, "rank_pattern") if patterns else {}
        said = {p: _at(given, p.removeprefix("base_model.model."), header.rank) for p in _pairs(header)}
        return _shown(f"{p} of rank {A[0]}, r={said[p]}" for p, (A, _) in _pairs(header).items() if A[0] != said[p])

    return broken


def rank_above(most: int) -> Condition:
    def broken(header: Header) -> str | None:
        given = (r for r in _pattern(header, "rank_pattern").values() if isinstance(r, int))
        highest = max([header.rank or 0, *given, *(A[0] for A, _ in _pairs(header).values())])
        return f"rank {highest}" if highest > most else None

    return broken


def lone_projections(header: Header) -> str | None:
    """q and v come together, k and up only with those that they are stacked with."""
    needs = {"q_proj": "v_proj", "k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    paths = {re.sub(r"\.lora_[AB]\.weight$", "", key) for key in header.shapes}

    def lacking(path: str) -> str | None:
        parent, _, name = path.rpartition(".")
        stacked = not any(p.startswith(f"{parent}.kv_") for p in paths)  # DeepSeek's attention is not
        return needs[name] if name in needs and stacked and f"{parent}.{needs[name]}" not in paths else None

    return _shown(f"{path} without {other}" for path in sorted(paths) if (other := lacking(path)))


def scale_lost(header: Header) -> str | None:
    """Files without an alpha of their own are applied with scale 1."""
    entries, alphas = header.config, any(k.endswith(".alpha") for k in header.shapes)
    if METADATA_KEY in header.metadata or alphas or header.rank is None:
        return None
    scaled = {k: v for k in ("use_rslora", "rank_pattern", "alpha_pattern") if (v := entries.get(k))}
    if entries.get("lora_alpha", header.rank) != header.rank:
        scaled["lora_alpha"] = entries["lora_alpha"]
    return ", ".join(f"{k}={v!r}" for k, v in {"r": header.rank, **scaled}.items()) if scaled else None


def grouped_without_rank(header: Header) -> str | None:
    if METADATA_KEY in header.metadata:
        return None
    return _shown(f"{path}: lora_A {A}, lora_B {B}" for path, (A, B) in _pairs(header).items() if A[0] != B[1])


def two_scales(header: Header) -> str | None:
    alphas = [k for k in header.shapes if k.endswith(".alpha")]
    return f"{METADATA_KEY} in the header, and {_shown(alphas)}" if METADATA_KEY in header.metadata and alphas else None


def magnitude_of_outputs(header: Header) -> str | None:
    return _shown(f"{k} {s}" for k, s in header.shapes.items() if k.endswith(".dora_scale") and len(s) > 1 and s[0] > 1)


def no_product(header: Header) -> str | None:
    return _shown(f"{path}: {A} and {B}" for path, (A, B) in _pairs(header).items() if A[0] != B[1])
