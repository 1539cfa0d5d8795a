"""Fine-tune with transformers' Trainer, resumably: evaluation, the best checkpoint, HRA's orthogonality penalty.

python examples/trainer.py --texts my_texts.txt --output my_adapter

Run it again with the same --output and a larger --epochs: it goes on where it stopped, as if it never had.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from halotune import DEFAULT_LEARNING_RATES, HRAConfig, PeftModel, get_peft_model
from halotune.integrations.transformers import AdapterTrainer


def main(
    texts: str, model: str = "facebook/opt-125m", output: str = "my_adapter", epochs: float = 3.0, penalty: float = 1e-4
) -> tuple[PeftModel, AdapterTrainer]:
    """The trained model, and the Trainer with its log."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    lines = [line for line in Path(texts).read_text(encoding="utf-8").splitlines() if line.strip()]
    examples = [tokenizer(line, truncation=True, max_length=256) for line in lines]
    held_out = max(1, len(examples) // 10)

    config = HRAConfig(r=16, target_modules="all-linear", orthogonality_weight=penalty, task_type="CAUSAL_LM")
    trainer = AdapterTrainer(
        model=get_peft_model(AutoModelForCausalLM.from_pretrained(model), config),
        args=TrainingArguments(
            output_dir=output,
            per_device_train_batch_size=8,
            learning_rate=DEFAULT_LEARNING_RATES["HRA"],
            num_train_epochs=epochs,
            logging_steps=1,
            eval_strategy="epoch",
            save_strategy="epoch",  # a checkpoint holds the adapter and the optimizer's state, not the model
            load_best_model_at_end=True,
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=examples[held_out:],
        eval_dataset=examples[:held_out],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    last = get_last_checkpoint(output) if Path(output).is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model()
    return trainer.model, trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--texts", required=True, help="a text file with one example a line")
    parser.add_argument("--model", help="a causal language model, by its name on the hub or its folder")
    parser.add_argument("--output", help="the folder that the adapter and the checkpoints go to")
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--penalty", type=float, help="the weight of HRA's orthogonality penalty")
    main(**vars(parser.parse_args()))
