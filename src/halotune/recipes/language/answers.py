"""What a model answers to problems: batched, and kept line by line, so that an interrupted run goes on where it was."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ...core.errors import HalotuneError
from ...core.files import write_atomically
from ..common import processes
from ..common.run import read_lines
from .problems import Problem
from .rows import Conversation
from .tokens import encode, prompt_text


@dataclass(frozen=True)
class Sampling:
    """How answers are written; temperature 0 takes the likeliest token each time."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    samples: int = 1
    seed: int = 0
    stop: tuple[str, ...] = ()  # an answer ends before any of these


@dataclass(frozen=True)
class Wanted:
    """One answer to be written."""

    id: int
    sample: int
    prompt: str


def wanted(problems: Sequence[Problem], tokenizer: Any, suffix: str, samples: int) -> list[Wanted]:
    """All answers to be written, the longest prompts first: what runs out of memory does so at once."""
    all_ = [Wanted(p.id, k, prompt_text(tokenizer, p.question) + suffix) for p in problems for k in range(samples)]
    return sorted(all_, key=lambda w: (-len(w.prompt), w.id, w.sample))


class Answers:
    """answers.jsonl: a line for every answer, `id`, `sample`, `answer`, `tokens`, `ended`.

    Of several processes each but the first has a file of its own, answers-1.jsonl …, until all answers are there. What an
    earlier call left in any of them counts, whatever its number of processes was.
    """

    def __init__(self, file: Path, rank: int = 0) -> None:
        self.file = file
        self.own = file.with_stem(f"{file.stem}-{rank}") if rank else file
        self.found = self._read()
        if self.own.exists() and not self.own.read_bytes().endswith(b"\n"):  # a killed process left half a line
            self._write(self.own, read_lines(self.own))

    @property
    def parts(self) -> list[Path]:
        return [self.file, *sorted(self.file.parent.glob(f"{self.file.stem}-*{self.file.suffix}"))]

    def missing(self, all_: Sequence[Wanted]) -> list[Wanted]:
        return [w for w in all_ if (w.id, w.sample) not in self.found]

    def add(self, lines: Sequence[dict[str, Any]]) -> None:
        """Keep these answers; one call of the system writes them."""
        with self.own.open("ab", buffering=0) as f:
            f.write("".join(json.dumps(line) + "\n" for line in lines).encode())

    def join(self) -> None:
        """All answers in one file, in the order of the problems."""
        found = self._read()
        self._write(self.file, [found[key] for key in sorted(found)])
        for part in self.parts[1:]:
            part.unlink()

    def _read(self) -> dict[tuple[int, int], dict[str, Any]]:
        return {(line["id"], line["sample"]): line for part in self.parts for line in read_lines(part)}

    @staticmethod
    def _write(file: Path, lines: Sequence[dict[str, Any]]) -> None:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomically(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_answers(
    answers: Answers, all_: Sequence[Wanted], model: Any, tokenizer: Any, sampling: Sampling, batch_size: int
) -> None:
    """Have transformers write the answers that are missing, this process its share of them."""
    ends = end_tokens(model, tokenizer)
    open_ones, n = answers.missing(all_), processes.count()
    size = max(1, min(batch_size, -(-len(open_ones) // n)))
    silent = not (processes.first() and sys.stderr.isatty())
    with tqdm(total=len(all_), initial=len(all_) - len(open_ones), unit="answer", disable=silent) as bar:
        for batch in list(_batches(open_ones, size))[processes.rank() :: n]:
            answers.add(_generate(batch, model, tokenizer, sampling, ends))
            bar.update(min(len(batch) * n, len(all_) - bar.n))


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the end of a text, and the end of a turn in the template."""
    found = model.generation_config.eos_token_id if getattr(model, "generation_config", None) else None
    ends = {*(found if isinstance(found, list) else [found]), tokenizer.eos_token_id} - {None}
    turn = Conversation([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}], (1,))
    last = next(label for label in reversed(encode(tokenizer, turn)["labels"]) if label >= 0)
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return sorted(ends | ({last} & special))


def _batches(all_: Sequence[Wanted], size: int) -> Iterator[Sequence[Wanted]]:
    return (all_[i : i + size] for i in range(0, len(all_), size))


@torch.no_grad()
def _generate(batch: Sequence[Wanted], model: Any, tokenizer: Any, sampling: Sampling, ends: list[int]) -> list[dict[str, Any]]:
    inputs = tokenizer(
        [w.prompt for w in batch], return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
    )
    room = model.config.get_text_config().max_position_embeddings - inputs.input_ids.shape[1]
    if room < 1:
        raise HalotuneError(
            f"problem {batch[0].id}: its prompt of {inputs.input_ids.shape[1]} tokens fills the model's context. Use a model "
            "with a longer one."
        )
    first = batch[0]
    torch.manual_seed(random.Random(f"{sampling.seed} {first.id} {first.sample}").getrandbits(63))
    drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    out = model.generate(
        input_ids=inputs.input_ids.to(model.device),
        attention_mask=inputs.attention_mask.to(model.device),
        max_new_tokens=min(sampling.max_new_tokens, room),
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        **(drawn if sampling.temperature else greedy),
        **({"stop_strings": list(sampling.stop), "tokenizer": tokenizer} if sampling.stop else {}),
    )
    lines = []
    for w, ids in zip(batch, out[:, inputs.input_ids.shape[1] :].tolist(), strict=True):
        n = next((i for i, token in enumerate(ids) if token in ends), None)
        text = tokenizer.decode(ids[:n], skip_special_tokens=True)
        lines.append(answer_line(w, text, len(ids) if n is None else n + 1, n is not None, sampling.stop))
    return lines


def answer_line(w: Wanted, text: str, tokens: int, ended: bool, stop: Sequence[str]) -> dict[str, Any]:
    """A line of answers.jsonl; `ended` is whether the model ended the answer, rather than the room for it."""
    found = min((i for s in stop if (i := text.find(s)) >= 0), default=None)
    text = text if found is None else text[:found]
    return {"id": w.id, "sample": w.sample, "answer": text.strip(), "tokens": tokens, "ended": ended or found is not None}


def write_answers_vllm(
    answers: Answers,
    all_: Sequence[Wanted],
    tokenizer: Any,
    base: str,
    lora: Path | None,
    rank: int,
    sampling: Sampling,
    ends: list[int],
) -> None:
    """Have vLLM write the answers that are missing, with an adapter in the form of a LoRA."""
    try:
        from vllm import LLM, SamplingParams  # type: ignore[import-not-found]
        from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]
    except ImportError as e:
        raise HalotuneError(f"backend: vllm cannot be imported ({e}). Install vllm, or use --backend transformers.") from e

    options = {"enable_lora": True, "max_lora_rank": next((r for r in (8, 16, 32, 64, 128, 256, 512) if r >= rank), rank)}
    engine = LLM(model=base, seed=sampling.seed, **(options if lora else {}))
    how = SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=sampling.max_new_tokens,
        stop=list(sampling.stop) or None,
        stop_token_ids=ends,
        seed=sampling.seed,
    )
    request = LoRARequest("adapter", 1, str(lora)) if lora else None
    for batch in _batches(answers.missing(all_), 512):  # kept after each
        prompts = [{"prompt_token_ids": tokenizer(w.prompt, add_special_tokens=False).input_ids} for w in batch]
        outputs = engine.generate(prompts, how, lora_request=request)
        done = [o.outputs[0] for o in outputs]
        answers.add(
            [
                answer_line(w, o.text, len(o.token_ids), o.finish_reason == "stop", sampling.stop)
                for w, o in zip(batch, done, strict=True)
            ]
        )
