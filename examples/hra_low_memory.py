"""Put an adapter into a model without allocating its parameters first, then fill it from a file.

Useful where many adapters are loaded: none is initialised only to be overwritten. `PeftModel.from_pretrained` does the
same in one call; this is the long form, for weights that come from elsewhere.

python examples/hra_low_memory.py --adapter hra_adapter
"""

from __future__ import annotations

import argparse
from pathlib import Path

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from halotune import HRAConfig, HRAModel, set_peft_model_state_dict


def main(adapter: str, model: str = "facebook/opt-125m") -> HRAModel:
    """The model with the adapter."""
    base = AutoModelForCausalLM.from_pretrained(model)
    config = HRAConfig(r=8, target_modules=["q_proj", "v_proj"], apply_GS=True)  # as hra_language_model.py has it
    adapted = HRAModel(base, config, adapter_name="default", low_cpu_mem_usage=True)
    waiting = [name for name, p in adapted.named_parameters() if p.is_meta]
    print(f"{len(waiting)} parameters have a shape but no memory yet")

    tensors = load_file(Path(adapter) / "adapter_model.safetensors")
    set_peft_model_state_dict(adapted, tensors, low_cpu_mem_usage=True)
    print(f"{sum(t.numel() for t in tensors.values()):,d} numbers loaded")
    return adapted


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--adapter", required=True, help="the folder that hra_language_model.py saved")
    parser.add_argument("--model", help="the base model that the adapter was trained on")
    main(**vars(parser.parse_args()))
