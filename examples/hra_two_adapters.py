"""Two HRA adapters on one language model: each is trained on its own text, and one call switches between them.

python examples/hra_two_adapters.py --model facebook/opt-125m
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from halotune import HRAConfig, PeftModel, get_peft_model

TEXTS = {
    "task1": "In spring the river carries the snow of the mountains to the sea.",
    "task2": "A compiler turns a program into instructions that a processor runs.",
}


def main(model: str = "facebook/opt-125m", steps: int = 30, lr: float = 1e-2) -> tuple[PeftModel, dict[str, dict[str, float]]]:
    """The adapted model, and the loss of every adapter on every text."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model).to(device)
    batches = {name: tokenizer(text, return_tensors="pt").to(device) for name, text in TEXTS.items()}

    target_modules = ["q_proj", "v_proj"]
    adapted = get_peft_model(base, HRAConfig(r=8, target_modules=target_modules, apply_GS=True), adapter_name="task1")
    adapted.add_adapter("task2", HRAConfig(r=16, target_modules=target_modules, apply_GS=True))

    for name, batch in batches.items():
        adapted.set_adapter(name)  # from here on this one alone is used, and trained
        optimizer = torch.optim.Adam((p for p in adapted.parameters() if p.requires_grad), lr=lr)
        for _ in range(steps):
            adapted(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    losses: dict[str, dict[str, float]] = {}
    for name in TEXTS:
        adapted.set_adapter(name)
        with torch.no_grad():
            losses[name] = {text: adapted(**batch, labels=batch["input_ids"]).loss.item() for text, batch in batches.items()}
        print(f"{name}:", ", ".join(f"loss {loss:.3f} on the text of {text}" for text, loss in losses[name].items()))
    return adapted, losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--model", help="a causal language model, by its name on the hub or its folder")
    parser.add_argument("--steps", type=int, help="for each adapter")
    parser.add_argument("--lr", type=float)
    main(**vars(parser.parse_args()))
