"""Train HRA with the Trainer of transformers, on a text file with one example a line.

python examples/hra_trainer.py --texts my_texts.txt --output hra_model
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from halotune import HRAConfig, PeftModel, get_peft_model


def main(
    texts: str, model: str = "facebook/opt-125m", output: str = "hra_model", epochs: float = 3.0, lr: float = 3e-4
) -> tuple[PeftModel, Trainer]:
    """The trained model, and the Trainer with its log."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    lines = [line for line in Path(texts).read_text(encoding="utf-8").splitlines() if line.strip()]
    examples = [tokenizer(line, truncation=True, max_length=256) for line in lines]

    config = HRAConfig(
        r=16,
        target_modules=["q_proj", "k_proj", "v_proj", "out_proj"],  # OPT's names; Llama calls the last one o_proj
        apply_GS=True,
        init_weights=True,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    adapted.print_trainable_parameters()

    trainer = Trainer(
        model=adapted,
        args=TrainingArguments(
            output_dir=output,
            per_device_train_batch_size=8,
            learning_rate=lr,
            num_train_epochs=epochs,
            logging_steps=1,
            save_strategy="no",  # the adapter alone is saved, below
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=examples,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    adapted.save_pretrained(output)
    return adapted, trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--texts", required=True, help="a text file with one example a line")
    parser.add_argument("--model", help="a causal language model, by its name on the hub or its folder")
    parser.add_argument("--output", help="the folder that the adapter goes to")
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--lr", type=float)
    main(**vars(parser.parse_args()))
