"""HRA on every linear layer of a language model but its output layer.

python examples/hra_all_linear.py --model facebook/opt-125m
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForCausalLM

from halotune import HRAConfig, PeftModel, get_peft_model


def main(model: str = "facebook/opt-125m") -> PeftModel:
    """The adapted model."""
    base = AutoModelForCausalLM.from_pretrained(model)
    # "all-linear" leaves the output layer out by itself; exclude_modules takes more names, or a regular expression.
    config = HRAConfig(r=8, target_modules="all-linear", exclude_modules=["lm_head"], apply_GS=True)
    adapted = get_peft_model(base, config)

    adapted.print_trainable_parameters()
    print("adapted:", ", ".join(sorted(adapted.active_peft_config.target_modules)))
    return adapted


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--model", help="a causal language model, by its name on the hub or its folder")
    main(**vars(parser.parse_args()))
