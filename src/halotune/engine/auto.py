"""A base model and its adapter from the adapter's folder alone."""

from __future__ import annotations

import importlib
from os import PathLike
from typing import Any, ClassVar

from torch import nn

from ..core.config import AdapterConfig
from ..core.errors import HalotuneError
from ..core.files import WEIGHTS_NAME, locate
from .files.keys import embedding_keys, held_tensors
from .files.state_dict import read_tensors
from .model import PeftModel


class AutoPeftModel:
    """Loads the base model that an adapter names, then the adapter. The subclasses fix the base's class."""

    auto_class: ClassVar[str | None] = None
    task: ClassVar[str | None] = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise HalotuneError(f"{type(self).__name__} is not made itself: use {type(self).__name__}.from_pretrained(folder).")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: AdapterConfig | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """The base model with the adapter on it.

        Args:
            pretrained_model_name_or_path: the adapter's folder, or its repository on the hub.
            adapter_name: what it is called in the model.
            is_trainable: go on training it; else it is frozen.
            config: instead of the stored configuration.
            revision: the adapter's revision on the hub.
            subfolder: the folder in it that holds the adapter.
            kwargs: for the base model's `from_pretrained` (dtype, device_map, …); `token` and `cache_dir` for both.
        """
        hub = {k: kwargs[k] for k in ("token", "cache_dir", "local_files_only") if k in kwargs}
        here = {"subfolder": subfolder, "revision": revision, **hub}
        config = config or AdapterConfig.from_pretrained(pretrained_model_name_or_path, **here)
        base = config.base_model_name_or_path
        if not base:
            raise HalotuneError(
                f"{pretrained_model_name_or_path}: the configuration names no base model (base_model_name_or_path). Load the "
                "base yourself and use PeftModel.from_pretrained(base, folder)."
            )
        model = cls.base_class(config).from_pretrained(base, revision=config.revision, **kwargs)
        tensors = read_tensors(locate(pretrained_model_name_or_path, WEIGHTS_NAME, **here))
        fit_vocabulary(model, {key: t.shape[0] for key, t in tensors.items() if t.dim() == 2})
        return PeftModel.from_pretrained(model, pretrained_model_name_or_path, adapter_name, is_trainable, config, **here)

    @classmethod
    def base_class(cls, config: AdapterConfig) -> Any:
        """The class that loads the base: of the adapter's task, or the one that it was trained on."""
        try:
            transformers = importlib.import_module("transformers")
        except ImportError:
            raise HalotuneError(
                f'{cls.__name__} loads the base with transformers. Install it with: pip install "halotune[transformers]"'
            ) from None
        if cls.auto_class is not None:
            return getattr(transformers, cls.auto_class)
        mapping = config.auto_mapping or {}
        by_task = {c.task: c.auto_class for c in AutoPeftModel.__subclasses__() if c.auto_class}
        if (task := by_task.get(getattr(config.task_type, "value", config.task_type))) is not None:
            return getattr(transformers, task)
        name, library = mapping.get("base_model_class"), str(mapping.get("parent_library", ""))
        if not name or library.split(".")[0] not in ("transformers", "diffusers"):
            raise HalotuneError(
                "AutoPeftModel: the adapter's configuration has neither a task_type nor a base class of transformers or "
                "diffusers. Load the base yourself and use PeftModel.from_pretrained(base, folder)."
            )
        return getattr(importlib.import_module(library), name)


def fit_vocabulary(model: nn.Module, rows: dict[str, int]) -> None:
    """Resize the embeddings to those stored with the adapter, where their number differs."""
    paths = [key.removesuffix(".weight") for key in embedding_keys(model, list(held_tensors(model)))]
    keys = [f"base_model.model.{path}{infix}.weight" for path in paths for infix in ("", ".base_layer")]
    stored = [rows[key] for key in keys if key in rows]
    if stored and model.get_input_embeddings().weight.shape[0] != stored[0]:  # type: ignore[operator]
        model.resize_token_embeddings(stored[0])  # type: ignore[operator]


class AutoPeftModelForCausalLM(AutoPeftModel):
    auto_class, task = "AutoModelForCausalLM", "CAUSAL_LM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    auto_class, task = "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    auto_class, task = "AutoModelForSequenceClassification", "SEQ_CLS"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    auto_class, task = "AutoModelForTokenClassification", "TOKEN_CLS"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    auto_class, task = "AutoModelForQuestionAnswering", "QUESTION_ANS"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    auto_class, task = "AutoModel", "FEATURE_EXTRACTION"
