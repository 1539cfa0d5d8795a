"""transformers' Trainer as the recipes use it: its arguments, whole checkpoints, and the lines of metrics.jsonl.

Any Trainer class becomes a recipe's with the mixin in front: `class SFT(RunTrainerMixin, SFTTrainer)`.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import psutil  # accelerate needs it
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.integrations.integration_utils import TensorBoardCallback, get_reporting_integration_callbacks
from transformers.trainer_utils import enable_full_determinism

from ...cli.main import require
from ...core.errors import HalotuneError
from ...engine.training import parameter_groups
from ...integrations.transformers import AdapterTrainerMixin
from . import processes
from .config import RunConfig
from .model import count, write_changes
from .run import FINISHED, Run, said

CHECKPOINT = "checkpoint-"


def arguments(config: RunConfig, run: Run, kind: type[TrainingArguments] = TrainingArguments, **also: Any) -> Any:
    """The Trainer's arguments for a configuration.

    Args:
        kind: their class, for Trainers that have their own.
        also: further arguments, the recipe's own.
    """
    n = processes.count()
    micro = config.micro_batch_size or max(config.batch_size // n, 1)
    if config.batch_size % (micro * n):
        raise HalotuneError(
            f"batch_size: {config.batch_size} examples cannot be shared by {n} processes that take {micro} at once. "
            f"Use a multiple of {micro * n}, or another micro_batch_size."
        )

    warmup = config.warmup or 0.0
    trackers = [] if config.tracker in ("none", "tensorboard") else [config.tracker]
    try:
        for tracker in get_reporting_integration_callbacks(trackers):
            tracker()
    except (ValueError, RuntimeError, ImportError) as e:  # there is none of this name, or it is not installed
        raise HalotuneError(f"tracker: {str(e).rstrip('.')}. Use tensorboard, none, or one that is installed.") from e

    def when(every: int | None) -> dict[str, Any]:
        return {"strategy": "epoch"} if every is None else {"strategy": "steps", "steps": every}

    made = kind(
        **{
            "output_dir": str(run.checkpoints),
            "per_device_train_batch_size": micro,
            "per_device_eval_batch_size": max(micro, 8),
            "gradient_accumulation_steps": config.batch_size // (micro * n),
            "learning_rate": config.learning_rate,
            "lr_scheduler_type": config.schedule,
            "warmup_steps": int(warmup) if warmup >= 1 else warmup,
            "weight_decay": config.weight_decay,
            "max_grad_norm": config.max_grad_norm,
            "num_train_epochs": config.epochs,
            "max_steps": config.max_steps or -1,
            "seed": config.seed,
            "full_determinism": config.deterministic,
            "bf16": config.precision == "bf16",
            "fp16": config.precision == "fp16",
            **(checkpointing(kind) if config.gradient_checkpointing else {}),
            "logging_strategy": "steps",
            "logging_steps": config.log_every,
            "logging_nan_inf_filter": False,
            **{f"eval_{k}": v for k, v in when(config.evaluate_every).items()},
            **{f"save_{k}": v for k, v in when(config.save_every).items()},
            "report_to": trackers,
            "include_num_input_tokens_seen": "non_padding",
            "disable_tqdm": True,  # RunCallback has a bar of its own, with the loss in it
            **placement(config.device),
            "ddp_find_unused_parameters": False,
            "remove_unused_columns": True,
            **also,
        }
    )
    on_one_device(made)
    return made


def seed(config: RunConfig) -> None:
    """Seed everything; with `deterministic` also have torch refuse what differs from run to run.

    Before CUDA starts, which reads the variables that are set here once, and before anything is drawn.
    """
    enable_full_determinism(config.seed) if config.deterministic else set_seed(config.seed)


def placement(device: str) -> dict[str, Any]:
    """Where a Trainer works, and how its processes talk."""
    cpu = processes.on_cpu(device)
    waits = int(processes.PATIENCE.total_seconds())
    return {
        "use_cpu": cpu,
        "ddp_backend": processes.backend(cpu),
        "ddp_timeout": waits,
        "dataloader_pin_memory": not cpu,
    }


def on_one_device(args: TrainingArguments) -> None:
    """A Trainer in one process would hand a batch of its size to each GPU that it sees. Here a process has one of them."""
    args._n_gpu = min(args.n_gpu, 1)


def checkpointing(kind: type[TrainingArguments]) -> dict[str, Any]:
    """Gradient checkpointing under the name that this transformers has for it."""
    names = {f.name for f in fields(kind)}
    name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


class RunTrainerMixin(AdapterTrainerMixin):
    """Put before a Trainer class: it trains into a run's folder.

    - A checkpoint is written under another name and renamed, so it is there as a whole or not at all.
    - Weight decay leaves scale-free parameters, biases and norms alone.

    Args:
        run: the folder.
        best: the metric that says which evaluation is the best, the highest; the adapter of that one is kept in best/.
    """

    def __init__(self, *args: Any, run: Run, best: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)  # RunCallback says it better
        self.run, self.best_name = run, best

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        decayed = {id(p) for group in parameter_groups(model, 1.0) if group["weight_decay"] for p in group["params"]}
        return [name for name, p in model.named_parameters() if id(p) in decayed]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Without groups that are empty, as the decayed one may be: torch's distributed checkpoints lose their settings."""
        optimizer = super().create_optimizer(*args, **kwargs)
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def train_run(self) -> None:
        """Train, from the last checkpoint where there is one."""
        checkpoint, step = self.run.last_checkpoint()
        self.run.rewind(step)
        self.accelerator.wait_for_everyone()  # each reads what is left, to know the best evaluation so far
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # of an earlier run in this process
        self.add_callback(RunCallback(self.run, self.best_name, lambda: self.save_adapter("best")))
        if self.run.record["config"]["tracker"] == "tensorboard" and self.is_world_process_zero():
            self.add_callback(TensorBoardCallback(_events(self.run.folder, step)))
        if checkpoint:
            said(f"{self.run.folder}: going on after step {step}")
        self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        staging = self.run.checkpoints / ".incomplete"
        if self.args.should_save and staging.exists():  # what a killed process left
            shutil.rmtree(staging)
        self.accelerator.wait_for_everyone()
        usual, self.args.output_dir = self.args.output_dir, str(staging)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir = usual
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            name = f"{CHECKPOINT}{self.state.global_step}"
            _flush(staging / name)
            if (self.run.checkpoints / name).exists():
                shutil.rmtree(self.run.checkpoints / name)
            os.replace(staging / name, self.run.checkpoints / name)
            staging.rmdir()
            self.run.keep_checkpoints(self.run.record["config"]["keep_checkpoints"])
        self.accelerator.wait_for_everyone()

    def save_adapter(self, name: str = "adapter") -> None:
        """The adapter as it is now, into a folder of the run that is replaced as a whole."""
        staging = self.run.folder / f".{name}.incomplete"
        if self.args.should_save:  # what a killed process left
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.is_fsdp_enabled:  # where checkpoints are in parts, the Trainer writes no adapter
            state: Any = self.accelerator.get_state_dict(self.model)
            self._save(str(staging), state_dict=state)
        else:
            self.save_model(str(staging), _internal_call=True)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (staging / "training_args.bin").unlink(missing_ok=True)  # a pickle: no one should have to trust it
            _flush(staging)
            old = self.run.folder / f".{name}.old"
            shutil.rmtree(old, ignore_errors=True)
            if (self.run.folder / name).exists():
                os.replace(self.run.folder / name, old)
            os.replace(staging, self.run.folder / name)
            shutil.rmtree(old, ignore_errors=True)

    def finish(self, results: Mapping[str, Any]) -> None:
        """Write what a finished run has: the adapter, what it changed, the results, the page."""
        self.save_adapter()
        model: Any = self.model

        def finished() -> dict[str, Any]:
            lines = self.run.metrics()
            if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # one process cannot read what all of them hold
                write_changes(self.run, model)
            self.run.update(
                status=FINISHED,
                parameters=count(model),
                seconds=max((line.get("seconds", 0.0) for line in lines), default=0.0),
                memory={"peak_bytes": max((line.get("memory_bytes", 0) for line in lines), default=0)},
                results=dict(results),
            )
            self.run.write_page()
            said(f"{self.run.folder}: finished")
            return self.run.record

        self.run.record = processes.from_first(finished)


class RunTrainer(RunTrainerMixin, Trainer):
    """transformers' Trainer, into a run's folder."""


class RunCallback(TrainerCallback):
    """Writes metrics.jsonl, draws the bar, and sees which evaluation is the best.

    A line of a step:       step, epoch, loss, learning_rate, tokens_per_second, memory_bytes, seconds (of training so far)
    A line of an evaluation: step, epoch, evaluation {metric: number}, seconds
    """

    def __init__(self, run: Run, best: str | None, save_best: Callable[[], None]) -> None:
        self.run, self.best_name, self.save_best = run, best, save_best
        lines = run.metrics()  # of a run that goes on, up to its checkpoint
        scores = [line["evaluation"].get(best) for line in lines if "evaluation" in line]
        self.best: float | None = max((s for s in scores if s is not None), default=None)
        self.before: float = lines[-1].get("seconds", 0.0) if lines else 0.0  # seconds of training in earlier sessions
        self.seconds = 0.0  # and in this one
        self.last_tokens = 0
        self.last_seconds = 0.0
        self.bar: tqdm[Any] | None = None
        self.watch = time.perf_counter()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.last_tokens = state.num_input_tokens_seen
        if state.is_world_process_zero and sys.stderr.isatty():
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True, desc="training")
        self.watch = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._count()
        if control.should_save or control.should_training_stop or state.global_step >= state.max_steps:
            control.should_log = True  # so that the sum of losses is empty at a checkpoint, as it is after a resume
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_save:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        passed = max(self.seconds - self.last_seconds, 1e-9)
        speed = (state.num_input_tokens_seen - self.last_tokens) / passed
        self.last_seconds, self.last_tokens = self.seconds, state.num_input_tokens_seen
        shown = {k: v for k, v in logs.items() if k in ("loss", "learning_rate", "grad_norm", "penalty")}
        entries = {"step": state.global_step, "epoch": state.epoch, **shown, "tokens_per_second": round(speed, 1)}
        self.run.append({**entries, "memory_bytes": memory_bytes(), "seconds": round(self.before + self.seconds, 3)})
        rate = f"  {speed:,.0f} tokens/s" if speed else ""  # of pictures no tokens are counted
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {logs['loss']:.4f}{rate}")
        else:
            said(f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.4f}{rate}")

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        found = evaluation(metrics or {})
        entries = {"step": state.global_step, "epoch": state.epoch, "evaluation": found}
        self.run.append({**entries, "seconds": round(self.before + self.seconds, 3)})
        said(f"step {state.global_step}/{state.max_steps}  " + "  ".join(f"{k} {v:.4f}" for k, v in found.items()))
        score = found.get(self.best_name or "")
        if score is not None and math.isfinite(score) and (self.best is None or score > self.best):
            self.best = score
            self.save_best()
        self.watch = time.perf_counter()  # evaluating is no training

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.watch = time.perf_counter()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    def _count(self) -> None:
        now = time.perf_counter()
        self.seconds, self.watch = self.seconds + now - self.watch, now


def evaluation(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics alone, without their prefix and what the Trainer says of its own speed."""
    speed = ("_runtime", "_per_second", "_time", "epoch", "_tokens_seen")
    return {k.removeprefix("eval_"): float(v) for k, v in metrics.items() if not k.endswith(speed)}


def memory_bytes() -> int:
    """The peak of what tensors took on the accelerator; on a CPU what the process takes now."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss


def _events(folder: Path, step: int) -> Any:
    require("nlu", ["tensorboard"])
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)  # what came after is going to be repeated


def _flush(folder: Path) -> None:
    """What a folder holds is on the disk before it gets its name."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb+") as f:
                os.fsync(f.fileno())
