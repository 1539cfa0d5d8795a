"""`--dry-run`: what a run would do, and what two of its steps cost; nothing of it is kept."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from . import processes
from .model import count
from .run import Run
from .trainer import memory_bytes

STEPS = 2


def dry_run(run: Run, trainer: Trainer, batch_as_text: Callable[[dict[str, Any]], str]) -> None:
    """Print the first batch as text, the trained parameters, what two real steps take, and where the run would be written.

    Args:
        trainer: the recipe's; only `train_run` writes into the run's folder.
        batch_as_text: the recipe's: a batch as its model gets it -> text, with what counts in the loss marked.
    """
    steps = _Steps()
    trainer.add_callback(steps)
    batch = next(iter(trainer.get_train_dataloader()))
    if processes.first():
        print("first batch:\n" + batch_as_text(batch))
    with tempfile.TemporaryDirectory() as scratch:
        args: Any = trainer.args
        whole = args.max_steps if args.max_steps > 0 else round(len(trainer.get_train_dataloader()) * args.num_train_epochs)
        args.output_dir, args.max_steps = scratch, STEPS
        args.eval_strategy = args.save_strategy = args.logging_strategy = "no"
        trainer.train()
    if not processes.first():
        return
    for empty in run.absent:  # the Trainer makes its output_dir when it is made
        with suppress(OSError):  # another process has written into it meanwhile
            empty.rmdir()
    parameters = count(trainer.model)  # type: ignore[arg-type]
    share = parameters["trainable"] / parameters["total"]
    print(f"trained parameters: {parameters['trainable']:,} of {parameters['total']:,} ({share:.2%})")
    first, second = steps.seconds
    print(f"two steps: {first:.2f} s and {second:.2f} s, peak {memory_bytes() / 2**30:.2f} GiB")
    print(f"steps: {whole:,}, about {whole * second / 60:.1f} minutes without evaluations")
    print(f"would be written to {run.folder}/: run.json, config.yaml, metrics.jsonl, adapter/, best/, checkpoints/, index.html")


class _Steps(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)
