"""Load a trained adapter onto its base model, and generate text.

python examples/hra_load_and_generate.py --adapter hra_adapter --prompt "Two mirrors"
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from halotune import PeftModel


def main(
    adapter: str, model: str = "facebook/opt-125m", prompt: str = "Two mirrors", max_length: int = 50
) -> tuple[PeftModel, str]:
    """The model with the adapter, and what it wrote."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model)
    adapted = PeftModel.from_pretrained(base, adapter).eval()

    inputs = tokenizer(prompt, return_tensors="pt")
    outputs = adapted.generate(**inputs, max_length=max_length)
    text = tokenizer.decode(outputs[0], skip_special_tokens=True)
    print(text)
    return adapted, text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--adapter", required=True, help="what hra_language_model.py or hra_trainer.py saved")
    parser.add_argument("--model", help="the base model that the adapter was trained on")
    parser.add_argument("--prompt")
    parser.add_argument("--max-length", type=int, help="of prompt and answer together, in tokens")
    main(**vars(parser.parse_args()))
