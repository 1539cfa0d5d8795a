"""The model that is evaluated: a base, or a base with an adapter, as a command line names them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...cli.loading import BaseModel, Saved, find_device, load_tokenizer, loadable
from ...core.errors import HalotuneError
from ...core.files import WEIGHTS_NAME
from ...report.page import write_page
from ...report.record import write_record
from ..common import processes
from ..common.model import model_source
from ..common.run import PAGE, configuration, digest, read_run, said
from .answers import Answers, Sampling, end_tokens, wanted, write_answers, write_answers_vllm
from .problems import Problem
from .tokens import set_pad_token, set_template

if TYPE_CHECKING:
    from ..math import MathEvaluation


@dataclass(frozen=True)
class Evaluated:
    """What is evaluated.

    Attributes:
        base: the base model's folder or hub id.
        adapter: the adapter's; None for the base alone.
        run: the folder of the run that trained it, where it was one.
    """

    base: str
    adapter: str | None = None
    run: Path | None = None

    @classmethod
    def find(cls, model: str | None, adapter: str | None) -> Evaluated:
        """From --model and --adapter, of which the second may be a run's folder."""
        if adapter is None:
            assert model is not None
            return cls(model_source(model))
        folder = Path(adapter)
        record = read_run(folder) if folder.is_dir() else None
        if record is None:
            named = model or Saved.read(adapter).config.base_model_name_or_path
            if not named:
                raise HalotuneError(f"{adapter}: names no base model. Name it with --model.")
            return cls(model_source(named), adapter)
        if not (folder / "adapter").is_dir():
            raise HalotuneError(
                f"{folder}: the run has no adapter yet ({record.get('status')}). Let it finish: the same command."
            )
        return cls(model_source(model or configuration(record)["model"]), str(folder / "adapter"), folder)

    def default_output(self, suite: str) -> Path:
        name = Path(self.adapter or self.base).name
        return self.run / "predictions" / suite if self.run else Path("evaluations") / f"{name}-{suite}"

    def load(self, precision: str, device: str) -> tuple[Any, Any]:
        """The model, adapter unmerged, and the tokenizer that belongs to it."""
        where = find_device(device)
        if precision == "auto" and where.type == "cpu":
            precision = "float32"  # most processors take several times as long for 16 bits
        if self.adapter is not None:
            saved = Saved.read(self.adapter)
            model = saved.on(BaseModel.load(saved, self.base, precision, where))
            if where.type != "cpu":
                model.cache_weights(gib=8)  # a token then costs what the bare model's costs
            return model, load_tokenizer(saved, self.base)
        from transformers import AutoModelForCausalLM, AutoTokenizer

        with loadable("the model", self.base):
            dtype = "auto" if precision == "auto" else getattr(torch, precision)
            model: Any = AutoModelForCausalLM.from_pretrained(self.base, dtype=dtype)
            return model.to(where).eval(), AutoTokenizer.from_pretrained(self.base)

    def answer(self, config: MathEvaluation, problems: list[Problem], folder: Path) -> Path:
        """Have the model answer all problems that no former call did, each process its share; returns answers.jsonl."""
        state = processes.join(config.device)
        sampling = Sampling(
            max_new_tokens=config.max_new_tokens or 512,
            temperature=config.temperature or 0.0,
            top_p=config.top_p,
            samples=config.samples,
            seed=config.seed,
            stop=tuple(config.stop or ()),
        )
        self._check_same(config, folder, problems)
        problems = problems[: config.limit]
        backend = config.backend
        if backend == "auto":
            alone = processes.count() == 1
            backend = "vllm" if alone and find_spec("vllm") and torch.cuda.is_available() else "transformers"
        if backend == "vllm" and processes.count() > 1:
            raise HalotuneError(
                "backend: vllm shares its work itself; got several processes. Start one, or use --backend transformers."
            )
        answers = Answers(folder / "answers.jsonl", processes.rank())
        state.wait_for_everyone()  # all have read what is there before the first adds to it
        if all((p.id, k) in answers.found for p in problems for k in range(config.samples)):
            said(f"{answers.file}: all answers are there")
        else:
            self._write_missing(config, problems, folder, answers, backend, sampling)
        state.wait_for_everyone()
        if processes.first():
            answers.join()
        return answers.file

    def _write_missing(
        self,
        config: MathEvaluation,
        problems: list[Problem],
        folder: Path,
        answers: Answers,
        backend: str,
        sampling: Sampling,
    ) -> None:
        model, tokenizer = self.load(config.precision, config.device if backend == "transformers" else "cpu")
        set_template(tokenizer, config.template if config.template != "auto" or tokenizer.chat_template else "alpaca")
        set_pad_token(tokenizer)
        all_ = wanted(problems, tokenizer, config.suffix or "", config.samples)
        if backend == "transformers":
            write_answers(answers, all_, model, tokenizer, sampling, config.batch_size)
            return
        ends, lora, rank = end_tokens(model, tokenizer), None, 8
        if self.adapter is not None:
            lora = folder / "lora"
            model.export("lora", lora, runtime="vllm")
            rank = json.loads((lora / "adapter_config.json").read_text(encoding="utf-8"))["r"]
        del model
        write_answers_vllm(answers, all_, tokenizer, self.base, lora, rank, sampling, ends)

    def _check_same(self, config: MathEvaluation, folder: Path, problems: list[Problem]) -> None:
        """Refuse a folder whose answers were asked for in another way."""
        names = ("suite", "data", "template", "suffix", "stop", "max_new_tokens", "temperature", "top_p", "seed", "precision")
        asked = {"base": self.base, "adapter": self.adapter, **{n: getattr(config, n) for n in names}}
        asked["content of data"] = digest(problems)
        if self.adapter and (weights := Path(self.adapter, WEIGHTS_NAME)).is_file():  # it may be trained anew in its folder
            asked["content of adapter"] = digest([weights.read_bytes()])
        file = folder / "asked.json"
        if file.is_file() and any(folder.glob("answers*.jsonl")):
            before = json.loads(file.read_text(encoding="utf-8"))
            differ = [n for n in asked if before.get(n, asked[n]) != asked[n]]
            if differ:
                n = differ[0]
                raise HalotuneError(
                    f"{folder}: holds answers that were asked for with another {n} ({before.get(n)!r}, now {asked[n]!r}). Give "
                    "another --output, or delete the folder."
                )
        if processes.first():
            write_record(file, asked)

    def record(self, suite: str, scores: dict[str, Any]) -> None:
        """The scores among the run's results, and on its page."""
        if self.run is None:
            return
        record = read_run(self.run) or {}
        found = {rule: scores[rule]["accuracy"] for rule in ("strict", "paper")}
        record["results"] = {
            **record.get("results", {}),
            suite: {**found, "low": scores["strict"]["low"], "high": scores["strict"]["high"]},
        }
        write_record(self.run / "run.json", record)
        write_page([self.run], self.run / PAGE)
