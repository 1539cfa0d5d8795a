"""A saved adapter and its base model, as a command line names them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import AdapterConfig, TaskType
from ..core.errors import HalotuneError
from ..core.files import CONFIG_NAME, WEIGHTS_NAME, locate
from ..engine.auto import AutoPeftModel, fit_vocabulary
from ..engine.files.state_dict import read_tensors
from ..engine.model import PeftModel, PeftModelForSequenceClassification
from ..methods.registry import method_of
from .main import require


@dataclass(frozen=True)
class Saved:
    """A saved adapter, as read."""

    source: str  # the folder or hub id
    config: AdapterConfig
    file: Path  # of the tensors
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, source: str) -> Saved:
        """From an adapter's folder, a run's, which holds one in adapter/, or the hub."""
        inner = Path(source) / "adapter"
        if (inner / CONFIG_NAME).is_file() and not (Path(source) / CONFIG_NAME).is_file():
            source = str(inner)
        config = AdapterConfig.from_pretrained(source)
        file = locate(source, WEIGHTS_NAME)
        return cls(source, config, file, read_tensors(file))

    @property
    def prefix(self) -> str:
        """What the names of the adapter's own tensors begin with."""
        return method_of(self.config.peft_type).prefix

    def on(self, base: BaseModel) -> PeftModel:
        """The base, which is changed in place, with the adapter."""
        return PeftModel.from_pretrained(base.model, self.source).eval()


@dataclass(frozen=True)
class BaseModel:
    """A base model."""

    name: str  # the folder or hub id
    model: nn.Module
    component: str | None = None  # which part of a diffusers pipeline the model is, if any

    @classmethod
    def load(
        cls,
        saved: Saved,
        name: str | None,
        dtype: str = "auto",
        device: torch.device | str = "cpu",
        component: str | None = None,
    ) -> BaseModel:
        """Load the base model of an adapter: `name`, or the one that its configuration names; of a pipeline, `component`."""
        named = saved.config.base_model_name_or_path
        revision = saved.config.revision if name in (None, named) else None
        name = name or named
        if not name:
            raise HalotuneError(f"{saved.source}: {CONFIG_NAME} names no base model. Name it with --base.")
        if (Path(name) / CONFIG_NAME).is_file() and not (Path(name) / "config.json").is_file():
            raise HalotuneError(f"{name}: is an adapter, not a base model. Give the model that it was trained on.")
        require("transformers", ["transformers"])
        if name.startswith((".", "/", "~")) and not Path(name).is_dir():
            raise HalotuneError(f"the base model {name!r} cannot be loaded: there is no such folder. Give one with --base.")
        if not sys.stderr.isatty():  # progress bars are for terminals, not for log files
            import_module("transformers.utils.logging").disable_progress_bar()
        number = None if dtype == "auto" else getattr(torch, dtype)
        with loadable("the base model", name):
            pipeline = (Path(name) / "model_index.json").is_file()
            kind = _model_class(saved.config, name, revision)
            diffusers = kind.__module__.startswith("diffusers.")
            if diffusers or pipeline:
                component = _component(name, kind, revision, component)
            elif Path(name).is_dir():
                component = None
            inside: dict[str, Any] = {} if component is None else {"subfolder": component}
            if diffusers:
                model = kind.from_pretrained(name, torch_dtype=number, revision=revision, **inside)
            else:
                inside.update(_labels(saved))
                model = kind.from_pretrained(name, dtype=number or "auto", revision=revision or "main", **inside)
        fit_vocabulary(model, {key: t.shape[0] for key, t in saved.tensors.items() if t.dim() == 2})
        return cls(name, model.to(device).eval(), component)


@contextmanager
def loadable(what: str, name: str) -> Iterator[None]:
    """Errors of other libraries' loaders, as one that names the model."""
    from safetensors import SafetensorError

    try:
        yield
    except HalotuneError:
        raise
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as e:
        reason = next(iter(str(e).strip().splitlines()), "") or type(e).__name__
        raise HalotuneError(
            f"{what} {name!r} cannot be loaded: {reason.rstrip('.')}. Give a model's folder or its id on the hub; gated models "
            "need `hf auth login`."
        ) from e


def _model_class(config: AdapterConfig, name: str, revision: str | None) -> Any:
    """A class with `from_pretrained`: as the adapter says (its task, or its base's class), else as the base says."""
    library = str((config.auto_mapping or {}).get("parent_library", "")).split(".")[0]
    if library == "diffusers":
        require("diffusers", ["diffusers"])
    if config.task_type or library in ("transformers", "diffusers"):
        return AutoPeftModel.base_class(config)
    import transformers

    architectures = transformers.AutoConfig.from_pretrained(name, revision=revision or "main").architectures or []
    return getattr(transformers, architectures[0]) if architectures else transformers.AutoModel


def _component(name: str, kind: type, revision: str | None, wanted: str | None) -> str | None:
    """Which component of a pipeline has this class, unless one is wanted; None where `name` is no pipeline."""
    require("diffusers", ["diffusers"])
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    try:
        index: Any = DiffusionPipeline.load_config(name, revision=revision)
    except OSError:  # no model_index.json
        return None
    parts = {part: entry[-1] for part, entry in index.items() if isinstance(entry, (list, tuple)) and entry[-1]}
    found = [part for part, cls in parts.items() if (part == wanted if wanted else cls == kind.__name__)]
    if not found:
        what = (
            f"component {wanted!r}; it has {', '.join(parts)}" if wanted else f"{kind.__name__}, which the adapter belongs to"
        )
        raise HalotuneError(f"{name}: the pipeline has no {what}. Name the part, or the adapter's own base.")
    if len(found) > 1:
        raise HalotuneError(
            f"{name}: {' and '.join(found)} are both a {kind.__name__}. Give --component, or the folder of one as the base."
        )
    return found[0]


def _labels(saved: Saved) -> dict[str, int]:
    """The number of labels of a classifier's head that is stored with the adapter: the base may have another."""
    if saved.config.task_type not in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS):
        return {}
    heads = set(PeftModelForSequenceClassification.heads)
    heads_stored = {key: t for key, t in saved.tensors.items() if f".{saved.prefix}" not in key and heads & {*key.split(".")}}
    rows = [t.shape[0] for t in heads_stored.values() if t.dim() == 2]  # of the last layer: no other is as narrow
    return {"num_labels": min(rows)} if rows else {}


def load_tokenizer(saved: Saved, base: str) -> Any:
    """The tokenizer stored with the adapter, else the base's."""
    from transformers import AutoTokenizer

    source = tokenizer_source(saved, base)
    with loadable("the tokenizer of", source):
        return AutoTokenizer.from_pretrained(source)


def tokenizer_source(saved: Saved, base: str) -> str:
    from transformers.utils.hub import cached_file

    own = cached_file(saved.source, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False)
    return base if own is None else saved.source


def find_device(name: str) -> torch.device:
    """The device of this name; "auto" is the accelerator, if there is one.

    Raises:
        HalotuneError: there is none of this name.
    """
    if name == "auto":
        here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return here or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        reason = str(e).splitlines()[0]
        raise HalotuneError(f"--device {name}: cannot be used ({reason}). Give one that this machine has, such as cpu.") from e
    return device
