"""HRA on the first four layers of a language model only.

python examples/hra_some_layers.py --model facebook/opt-125m
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForCausalLM

from halotune import HRAConfig, PeftModel, get_peft_model


def main(model: str = "facebook/opt-125m") -> PeftModel:
    """The adapted model."""
    config = HRAConfig(
        r=8,
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=[0, 1, 2, 3],
        layers_pattern="layers",  # the name of the list that holds the layers
        apply_GS=True,
    )
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)

    adapted.print_trainable_parameters()
    for layer in adapted.get_layer_status():
        print("adapted:", layer.name)
    return adapted


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--model", help="a causal language model, by its name on the hub or its folder")
    main(**vars(parser.parse_args()))
