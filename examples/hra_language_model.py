"""Train HRA on a language model and save the adapter, which is a few megabytes.

python examples/hra_language_model.py --model facebook/opt-125m --save hra_adapter
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from halotune import HRAConfig, PeftModel, get_peft_model

TEXTS = [
    "A mirror turns a left hand into a right hand.",
    "Two mirrors that face the same way leave everything as it was.",
    "Two mirrors at an angle turn the world around the line where they meet.",
    "Whoever has enough mirrors can reach any orientation.",
]


def main(
    model: str = "facebook/opt-125m", save: str | None = None, steps: int = 30, lr: float = 1e-2
) -> tuple[PeftModel, list[float]]:
    """The adapted model, and the loss before each step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model).to(device)

    config = HRAConfig(r=8, target_modules=["q_proj", "v_proj"], apply_GS=True, task_type="CAUSAL_LM")
    adapted = get_peft_model(base, config)
    adapted.print_trainable_parameters()

    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt").to(device)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.Adam((p for p in adapted.parameters() if p.requires_grad), lr=lr)
    losses = []
    for _ in range(steps):
        loss = adapted(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f} in {steps} steps")

    if save:
        adapted.save_pretrained(save)
    return adapted, losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--model", help="a causal language model, by its name on the hub or its folder")
    parser.add_argument("--save", help="the folder that the adapter goes to")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--lr", type=float)
    main(**vars(parser.parse_args()))
