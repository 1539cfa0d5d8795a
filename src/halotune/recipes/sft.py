"""Instruction tuning: a causal language model learns to answer, from conversations, from prompts and responses, or from text.

    halotune train sft --model HuggingFaceTB/SmolLM2-135M --template chatml --data chats.jsonl --method hra --r 8

TRL's SFTTrainer trains it. Only what the model itself writes counts in the loss; short examples share a row and do not see
each other; the loss over the vocabulary is computed in pieces. All three give the numbers that they give left out.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import datasets
import torch
from accelerate.utils.other import is_repeated_blocks
from datasets import Dataset, concatenate_datasets
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar
from trl.data_utils import pack_dataset
from trl.trainer.sft_config import SFTConfig as TRLConfig

from ..cli.loading import loadable
from ..core.config import TaskType
from ..core.errors import HalotuneError
from ..engine.model import PeftModel
from ..integrations.trl import AdapterSFTTrainer
from .common import processes
from .common.config import RunConfig, find_method
from .common.dry_run import dry_run as show_dry_run
from .common.model import adapt, load_base, model_source
from .common.run import Run, said
from .common.trainer import RunTrainerMixin, arguments, checkpointing, seed
from .language.packing import PackedCollator, check_isolation, fill, share_mask
from .language.rows import Columns, Example, read_examples, split, understood
from .language.tokens import IGNORED, encode_all, set_pad_token, set_template


@dataclass(kw_only=True)
class SFTConfig(RunConfig):
    """Teach a causal language model to answer.

    Args:
        data: a file (jsonl, json, parquet, csv, tsv) or a data set on the hub (user/name, user/name:split), or several,
            separated by commas; rows hold messages, a prompt and a response, or text.
        evaluation: rows to evaluate on, named like `data`; or the share of the rows that is held out for it (0 for none).
        max_rows: use no more rows of `data` than this.
        prompt_column: what the column of prompts is called, where its name is not one of the usual ones.
        response_column: what the column of responses is called.
        text_column: what the column of plain text is called.
        template: how a conversation becomes text: auto is the tokenizer's own; alpaca, chatml, plain; a .jinja file, or the
            model whose template to take.
        learn: what counts in the loss, the answers or all.
        max_length: tokens of an example, longer ones are cut; and of a row of packed ones.
        packing: put several short examples into one row; they do not see each other.
        attention: an implementation that transformers knows (sdpa, eager, flash_attention_2 …).
        compile: compile every block of the model with torch.compile; by default on a CUDA device with packed rows, whose length
            is fixed, unless `quant` or `deterministic` is set.
        offload_activations: move what is kept until backward to the CPU's memory and back; by default with gradient
            checkpointing of compiled blocks, where it costs no time.
    """

    data: str
    evaluation: float | str = 0.0
    max_rows: int | None = None
    prompt_column: str | None = None
    response_column: str | None = None
    text_column: str | None = None
    template: str = "auto"
    learn: Literal["answers", "all"] = "answers"
    max_length: int = 1024
    packing: bool = True
    attention: str = "sdpa"
    compile: bool | None = None
    offload_activations: bool | None = None
    batch_size: int = 16
    schedule: str = "cosine"
    weight_decay: float = 0.0

    RECIPE: ClassVar[str] = "sft"
    EPOCHS: ClassVar[float] = 1.0
    WARMUP: ClassVar[float] = 0.03

    def fill(self) -> None:
        """A tenth of the method's default rate, which is that of a small encoder: with the whole, HRA's loss rises at once."""
        self.fill_in(learning_rate=0.1 * find_method(str(self.method))[1].learning_rate)

    @property
    def on_cuda(self) -> bool:
        return self.device != "cpu" and torch.cuda.is_available()

    @property
    def compiled(self) -> bool:
        """Whether blocks are compiled, here."""
        if self.compile is not None:
            return self.compile
        return self.on_cuda and self.packing and not self.quant and not self.deterministic

    @property
    def offloads(self) -> bool:
        """Whether what is kept until backward goes to the CPU."""
        if self.offload_activations is not None:
            return self.offload_activations
        return self.on_cuda and self.compiled and self.gradient_checkpointing

    def example(self, values: dict[str, Any]) -> Example:
        """What a row of data means; ValueError where it means nothing."""
        return understood(values, Columns(self.prompt_column, self.response_column, self.text_column))

    def check(self) -> None:
        share = isinstance(self.evaluation, str) or 0 <= self.evaluation < 1
        self.require("evaluation", share, "expected a file, or a share from 0 to below 1", "Use 0.05 for a twentieth.")
        self.require("max_length", self.max_length >= 8, "must be at least 8 tokens", "Use a length such as 1024.")
        columns = (self.prompt_column, self.response_column) if self.text_column else ()
        self.require("text_column", not any(columns), "is for rows without prompts", "Leave out --prompt-column, or this.")
        there = self.on_cuda or not self.offload_activations
        self.require("offload_activations", there, "is for CUDA devices", "Leave it out.")
        self.require("max_rows", self.max_rows is None or self.max_rows >= 1, "must be at least 1", "Leave it out for all.")


def train_sft(
    config: SFTConfig, *, dry_run: bool = False, command: str | None = None, substitutes: Sequence[str] = ()
) -> dict[str, Any]:
    """Train, or go on where a run was interrupted; a finished run is left as it is.

    Args:
        substitutes: what run.json says is not as in the paper that a preset is of.

    Returns:
        what run.json holds.
    """
    run = Run(config, command)
    if not dry_run and run.left_alone():
        return run.record

    quiet()

    # The data, as tokens with labels
    tokenizer = load_tokenizer(config)
    train_rows, eval_rows, bad = read_data(config)
    run.same_data(train_rows, eval_rows)
    train, cut = tokenized(config, tokenizer, train_rows)
    held = tokenized(config, tokenizer, eval_rows)[0] if eval_rows else None
    report_data(config, train, held, cut, bad)

    # The model, with its adapter
    seed(config)  # of the adapter
    model = adapt(load_base(AutoModelForCausalLM, config, attn_implementation=config.attention), config, TaskType.CAUSAL_LM)
    if config.packing:
        share_mask(model.get_base_model())
        check_isolation(model)
    if config.compiled:
        compile_blocks(model, needed=config.compile is True)

    # Training and evaluation
    trainer = make_trainer(config, run, model, tokenizer, train, held)
    if dry_run:
        show_dry_run(run, trainer, lambda batch: marked(tokenizer, batch))
        return run.record
    with run.open():
        rows = {"train": len(train_rows), "evaluation": len(eval_rows), "cut": cut}
        run.update(rows=rows, skipped={"count": len(bad), "rows": bad[:100]}, substitutes=list(substitutes))
        run.update(compiled=config.compiled)
        trainer.train_run()
        trainer.finish(trainer.measured() if held is not None else {})
    return run.record


def quiet() -> None:
    """Progress bars are for terminals, not for log files."""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        disable_progress_bar()


# -- data


def load_tokenizer(config: SFTConfig) -> Any:
    """The base's tokenizer, with the template that the model learns and a token to pad with."""
    with loadable("the tokenizer of", config.model):
        tokenizer = AutoTokenizer.from_pretrained(model_source(config.model), revision=config.revision or "main")
    set_template(tokenizer, config.template)
    set_pad_token(tokenizer)
    tokenizer.padding_side = "right"
    return tokenizer


def read_data(config: SFTConfig) -> tuple[list[Example], list[Example], list[str]]:
    """Rows for training and for evaluation, and what was wrong with those left out."""
    rows, bad = read_examples(config.data, config.example, skip_bad=config.skip_bad_rows)
    rows = rows[: config.max_rows]
    if isinstance(config.evaluation, str):
        held, more = read_examples(config.evaluation, config.example, skip_bad=config.skip_bad_rows)
        return rows, held, bad + more
    if config.evaluation:
        return *split(rows, config.evaluation), bad
    return rows, [], bad


def tokenized(config: SFTConfig, tokenizer: Any, rows: list[Example]) -> tuple[Dataset, int]:
    """The rows as `input_ids` and `labels`, with `seq_lengths` where they are packed; and how many were cut."""
    examples, cut = encode_all(tokenizer, rows, config.max_length)
    if not examples:
        raise HalotuneError(
            f"max_length: of no row does an answer begin within {config.max_length} tokens. Use a greater length."
        )
    if config.learn == "all":
        examples = [{"input_ids": e["input_ids"], "labels": list(e["input_ids"])} for e in examples]
    dataset = Dataset.from_list(examples)
    return (pack_dataset(dataset, config.max_length) if config.packing else dataset), cut


def report_data(config: SFTConfig, train: Dataset, held: Dataset | None, cut: int, bad: list[str]) -> None:
    counted = sum(label != IGNORED for labels in train["labels"] for label in labels)
    said(f"{config.data}: {len(train):,} rows of tokens, {counted:,} tokens count" + (f", {cut} examples cut" if cut else ""))
    if config.packing:
        said(f"packed: {fill(train, config.max_length):.1%} of the tokens are real")
    if held is not None:
        said(f"evaluation: {len(held):,} rows of tokens")
    for line in bad[:5]:
        said(f"left out: {line}")
    if len(bad) > 5:
        said(f"left out: {len(bad) - 5} more rows; run.json lists the first hundred")


def marked(tokenizer: PreTrainedTokenizerBase, batch: dict[str, Any]) -> str:
    """A batch's first row as text, with ⟦ ⟧ around what counts in the loss."""
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    padding = next((i for i in range(len(ids), 0, -1) if ids[i - 1] != tokenizer.pad_token_id), 0)
    text, start = "", 0
    for i in range(1, padding + 1):
        if i == padding or (labels[i] == IGNORED) != (labels[start] == IGNORED):
            piece = str(tokenizer.decode(ids[start:i]))
            text += piece if labels[start] == IGNORED else f"⟦{piece}⟧"
            start = i
    return text


# -- the trainer


class RunSFTTrainer(RunTrainerMixin, AdapterSFTTrainer):
    """TRL's SFTTrainer, into a run's folder."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's; an adapter has its own."""

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        output = super().evaluation_loop(*args, **kwargs)
        loss = output.metrics["eval_loss"]
        output.metrics.update(eval_log_likelihood=-loss, eval_perplexity=math.exp(min(loss, 80.0)))
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log(logs, *args, **kwargs)
        logs.pop("eval_num_tokens", None)  # of training

    def measured(self) -> dict[str, Any]:
        """run.json's results: the last evaluation and the best, of a token that counts."""
        found = {line["step"]: line["evaluation"] for line in self.run.metrics() if "evaluation" in line}
        scores = {step: e["log_likelihood"] for step, e in found.items() if e["log_likelihood"] is not None}  # None: no number
        best = max(scores, key=scores.__getitem__, default=max(found))
        return {"last": found[max(found)], "best": found[best], "best_step": best}


def make_trainer(
    config: SFTConfig, run: Run, model: PeftModel, tokenizer: Any, train: Dataset, held: Dataset | None
) -> RunSFTTrainer:
    varlen = "flash" in config.attention  # kernels that take joined rows, as TRL makes them
    joined = config.packing and varlen
    args = arguments(
        config,
        run,
        TRLConfig,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        padding_free=joined,
        activation_offloading=config.offloads,
        **({} if config.gradient_checkpointing else dict.fromkeys(checkpointing(TRLConfig), False)),
        **({} if held is not None else {"eval_strategy": "no"}),
    )
    if held is not None and processes.count() > 1:
        held = filled(held, args.per_device_eval_batch_size * processes.count(), tokenizer.pad_token_id)
    collator = None
    if config.packing and not varlen:
        collator = PackedCollator(tokenizer.pad_token_id, config.max_length if config.compiled else None)
    return RunSFTTrainer(
        model,
        args=args,
        data_collator=collator,
        train_dataset=train,
        eval_dataset=held,
        processing_class=tokenizer,
        run=run,
        best="log_likelihood" if held is not None else None,
    )


def filled(held: Dataset, rows: int, pad: int) -> Dataset:
    """With rows of which nothing counts, up to a whole batch of every process: accelerate would count some rows twice there."""
    row = {"input_ids": [pad] * 2, "labels": [IGNORED] * 2, "seq_lengths": [2]}
    more = [{name: row[name] for name in held.column_names}] * (-len(held) % rows)
    return concatenate_datasets([held, Dataset.from_list(more, features=held.features)]) if more else held


def compile_blocks(model: PeftModel, needed: bool = True) -> None:
    """Compile the repeated blocks in place: one compilation serves all of them, and names and hooks stay.

    Raises:
        HalotuneError: there are none, and they are `needed`.
    """
    blocks: Any = next((m for m in model.modules() if is_repeated_blocks(m)), None)
    if blocks is None and not needed:
        return
    if blocks is None:
        raise HalotuneError(f"compile: {type(model.get_base_model()).__name__} has no repeated blocks. Leave out --compile.")
    for block in blocks:
        block.compile(backend=thrifty_inductor)


def thrifty_inductor(graph: torch.fx.GraphModule, inputs: Any) -> Any:
    """torch.compile's own backend, but what is cheap (norms, activation functions) is recomputed in the backward, not kept.
    No matrix product and no attention is, where that alone saves a tenth of what is kept."""
    from torch._functorch import config  # no public name of torch sets it for one compilation alone
    from torch._inductor.compile_fx import compile_fx

    with config.patch(activation_memory_budget=0.9):
        return compile_fx(graph, inputs)
