"""`halotune generate` and `halotune chat`: what they say is what the model says."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from halotune import HRAConfig, PeftModel, get_peft_model
from halotune.cli.chat import Chat, converse
from halotune.cli.main import main
from halotune.cli.text import Sampling, stream
from tests.cli.conftest import save_tokenizer

GREEDY = Sampling(max_new_tokens=8, temperature=0.0, top_p=1.0)


@pytest.fixture
def model(adapters: Path, base: Path) -> PeftModel:
    from transformers import AutoModelForCausalLM

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapters / "hra").eval()


@pytest.fixture
def tokenizer(base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


def continued(model: Any, tokenizer: Any, text: str, n: int = 8) -> str:
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=n, do_sample=False)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_continuation(
    adapters: Path,
    model: PeftModel,
    tokenizer: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hra = str(adapters / "hra")
    with model.disable_adapter():
        alone = continued(model, tokenizer, "hello")
    adapted = continued(model, tokenizer, "hello")
    assert alone != adapted
    flags = ["--max-new-tokens", "8", "--device", "cpu"]
    assert main(["generate", hra, "--prompt", "hello", *flags]) == 0
    assert capsys.readouterr().out == adapted + "\n"
    assert main(["generate", hra, "--prompt", "hello", "--no-adapter", *flags]) == 0
    assert capsys.readouterr().out == alone + "\n"
    for prompt in ([], ["--prompt", "-"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
        assert main(["generate", hra, *prompt, *flags]) == 0
        assert capsys.readouterr().out == adapted + "\n"
    drawn = []
    for seed in ("1", "1", "2"):
        assert main(["generate", hra, "--prompt", "hello", "--temperature", "5", "--top-p", "0.9", "--seed", seed, *flags]) == 0
        drawn.append(capsys.readouterr().out)
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_runs_folder_has_the_adapter_inside(adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(adapters / "hra", tmp_path / "run" / "adapter")
    said = []
    for folder in (adapters / "hra", tmp_path / "run"):
        assert main(["generate", str(folder), "--prompt", "hello", "--max-new-tokens", "8", "--device", "cpu"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != "\n"
    assert main(["generate", str(tmp_path), "--prompt", "hello"]) == 2  # neither
    (tmp_path / "run.json").write_text(json.dumps({"recipe": "subject"}))
    assert main(["generate", str(tmp_path), "--prompt", "a dog"]) == 2
    assert "is a run of train subject, which draws pictures. Use halotune generate subject." in capsys.readouterr().err


def test_the_end_of_the_context(model: PeftModel, tokenizer: Any) -> None:
    long = Sampling(max_new_tokens=1000, temperature=1.0, top_p=1.0)
    inputs = tokenizer("x" * 252, return_tensors="pt")
    assert len(tokenizer("".join(stream(model, tokenizer, inputs, long)))["input_ids"]) <= 12  # four tokens, replaced bytes
    with pytest.raises(ValueError, match=r"the prompt has 256 tokens, and the model's context is 256"):
        next(stream(model, tokenizer, tokenizer("x" * 256, return_tensors="pt"), long))


@pytest.mark.parametrize(
    ("arguments", "stdin", "said"),
    [
        pytest.param([], Terminal(), "there is no prompt. Give one with --prompt, or on stdin", id="terminal"),
        pytest.param([], io.StringIO(), "the prompt is empty", id="empty"),
        pytest.param(["--prompt", "a", "--temperature", "-1"], None, "expected a number from 0; got '-1'", id="temperature"),
        pytest.param(["--prompt", "a", "--top-p", "1.5"], None, "expected a number from 0 to 1; got '1.5'", id="top-p"),
        pytest.param(
            ["--prompt", "a", "--max-new-tokens", "0"], None, "expected a whole number from 1 to 2^63 - 1; got '0'", id="tokens"
        ),
        pytest.param(["--prompt", "a", "--device", "cuda:99"], None, "--device cuda:99: cannot be used", id="device"),
        pytest.param(["--prompt", "x" * 270], None, "the model's context is 256", id="context"),
    ],
)
def test_bad_input(
    arguments: list[str],
    stdin: Any,
    said: str,
    adapters: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if stdin is not None:
        monkeypatch.setattr("sys.stdin", stdin)
    assert main(["generate", str(adapters / "hra"), *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out and said in err.splitlines()[-1]


def test_an_encoder_cannot_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import BertConfig, BertModel

    sizes = {"vocab_size": 30, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    BertModel(BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    model = BertModel.from_pretrained(tmp_path / "bert")
    get_peft_model(model, HRAConfig(target_modules=["query"], task_type="FEATURE_EXTRACTION")).save_pretrained(tmp_path / "a")
    assert main(["generate", str(tmp_path / "a"), "--prompt", "a"]) == 2
    assert "a BertModel cannot generate text" in capsys.readouterr().err
    entries = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**entries, "base_model_name_or_path": None}))
    assert main(["chat", str(tmp_path / "a")]) == 2
    assert "names no base model. Name it with --base" in capsys.readouterr().err


def test_errors_of_the_model_reach_the_reader(model: PeftModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.get_base_model(), "generate", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(stream(model, tokenizer, tokenizer("a", return_tensors="pt"), GREEDY))


def test_out_of_memory_is_one_line(adapters: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(torch.nn.Module, "to", full)
    assert main(["generate", str(adapters / "hra"), "--prompt", "a"]) == 1
    assert capsys.readouterr().err.endswith("halotune generate: error: out of memory. Tried to allocate 2 GiB\n")


# -- chat


def lines(*script: str | type[BaseException]) -> Callable[[], str]:
    """What a user types, Ctrl-C and Ctrl-D (at the end, too) included."""
    left = [*script, EOFError]

    def read() -> str:
        line = left.pop(0)
        if isinstance(line, str):
            return line
        raise line

    return read


def test_a_conversation(model: PeftModel, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    chat = Chat(model, tokenizer, GREEDY, "Be.")
    one = continued(model, tokenizer, "<|system|>Be.<|user|>a<|assistant|>")
    two = continued(model, tokenizer, f"<|system|>Be.<|user|>a<|assistant|>{one}<|user|>b<|assistant|>")
    assert converse(chat, lines("a\n", "", "b", "/reset", "a")) == 0
    assert capsys.readouterr().out == f"{one}\n{two}\n{one}\n"
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant"]


def test_the_scale_of_the_adapter(model: PeftModel, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    chat = Chat(model, tokenizer, GREEDY)
    script = ["/scale 0", "a", "/reset", "/scale 1", "/adapter off", "a", "/reset", "/adapter on", "a", "/exit", "never"]
    assert converse(chat, lines(*script)) == 0
    out, err = capsys.readouterr()
    none, off, on = out.splitlines()
    assert none == off != on
    assert "scale is 0.\n" in err and "The adapter is off" in err and "The adapter is on" in err


@pytest.mark.parametrize("line", ["/foo", "/scale", "/scale much", "/scale nan", "/adapter", "/adapter maybe", "/exit now"])
def test_what_is_no_command(line: str, model: PeftModel, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert converse(Chat(model, tokenizer, GREEDY), lines(line)) == 0
    out, err = capsys.readouterr()
    assert not out and f"{line!r} is no command" in err and "/adapter on|off" in err


def test_ctrl_c_ends_an_answer_and_twice_the_conversation(
    model: PeftModel, tokenizer: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(model, tokenizer, Sampling(20, 0.0, 1.0))
    written = []

    def struck(text: str = "", **options: Any) -> None:
        written.append(text)
        if len(written) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("builtins.print", struck)
        assert converse(chat, lines("a")) == 0
    assert chat.messages[-1]["content"] == "".join(written[:2])
    before = len(chat.messages)
    assert converse(chat, lines("b", KeyboardInterrupt, "c", KeyboardInterrupt, KeyboardInterrupt, "never")) == 130
    assert len(chat.messages) == before + 4
    assert capsys.readouterr().err.count("Ctrl-C again") == 2


def test_a_conversation_that_is_too_long(model: PeftModel, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    chat = Chat(model, tokenizer, GREEDY)
    assert converse(chat, lines("x" * 280, "/reset", "a")) == 0
    out, err = capsys.readouterr()
    assert "the model's context is 256" in err and "/reset begins anew" in err
    assert out.strip() and len(chat.messages) == 2


def test_the_command(
    adapters: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((base / name).read_bytes())
    save_tokenizer(tmp_path, template=False)
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n/exit\n"))
    arguments = ["--base", str(tmp_path), "--temperature", "0", "--max-new-tokens", "4", "--device", "cpu"]
    assert main(["chat", str(adapters / "hra"), *arguments]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("\n") and len(out) > 1
    assert "no chat template" in err
