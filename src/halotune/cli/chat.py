"""`halotune chat`: a conversation with a model, the adapter's scale at hand."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

from ..core.errors import HalotuneError
from .main import INTERRUPTED
from .options import Commands, add_model_flags, add_parser, add_sampling_flags

if TYPE_CHECKING:
    from ..engine.model import PeftModel
    from .text import Sampling

EXAMPLES = """
halotune chat my-adapter
halotune chat my-adapter --system "Answer in one sentence." --temperature 0
"""
HELP = """/reset            forget the conversation
/scale X          the adapter's scale: 1 is its own, 0 is the base model
/adapter on|off   answer with the adapter, or without
/help             this list
/exit             leave; so does Ctrl-D. Ctrl-C ends an answer"""


def add(commands: Commands) -> None:
    text = "Talk to a model with an adapter, through the tokenizer's chat template.\n\nin the conversation:\n"
    parser = add_parser(commands, "chat", text + textwrap.indent(HELP, "  "), EXAMPLES, _run)
    add_model_flags(parser, device="auto")
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    add_sampling_flags(parser, temperature=0.7, max_new_tokens=512)


def _run(args: argparse.Namespace) -> int:
    from .text import load

    saved, base, tokenizer, sampling = load(args)
    chat = Chat(saved.on(base), tokenizer, sampling, args.system)
    if not tokenizer.chat_template:
        say("The tokenizer has no chat template: messages go to the model as plain lines, for it to continue.")
    say("/help lists the commands; /exit or Ctrl-D leaves.")
    return converse(chat, read_line)


class Chat:
    """A conversation, and the model that takes part in it."""

    def __init__(self, model: PeftModel, tokenizer: Any, sampling: Sampling, system: str | None = None) -> None:
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.start = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.start)

    def answer(self, text: str) -> Generator[str, None, None]:
        """The answer, piece by piece. What came before the iterator is closed is kept as the answer."""
        from .text import stream

        turn = [*self.messages, {"role": "user", "content": text}]
        said: list[str] = []
        with closing(stream(self.model, self.tokenizer, self._encoded(turn), self.sampling)) as pieces:
            try:
                for piece in pieces:
                    said.append(piece)
                    yield piece
            finally:
                if said:
                    self.messages = [*turn, {"role": "assistant", "content": "".join(said)}]

    def _encoded(self, messages: list[dict[str, str]]) -> Any:
        if self.tokenizer.chat_template:
            return self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        return self.tokenizer("".join(f"{m['content']}\n" for m in messages), return_tensors="pt")

    def command(self, line: str) -> str:
        """Obey a line that begins with "/"; returns what to say to the user.

        Raises:
            EOFError: the user wants to leave.
        """
        name, _, value = line.partition(" ")
        value = value.strip()
        match name, value:
            case "/exit" | "/quit", "":
                raise EOFError
            case "/help", "":
                return HELP
            case "/reset", "":
                self.messages = list(self.start)
                return "The conversation begins anew."
            case "/adapter", "on":
                self.model.base_model.enable_adapter_layers()
                return "The adapter is on."
            case "/adapter", "off":
                self.model.base_model.disable_adapter_layers()
                return "The adapter is off: this is the base model."
            case "/scale", _ if _is_number(value):
                self.model.set_scale(self.model.active_adapters[0], float(value))
                return f"The adapter's scale is {float(value):g}."
        return f"{line!r} is no command.\n{HELP}"


def _is_number(text: str) -> bool:
    try:
        return abs(float(text)) < float("inf")
    except ValueError:
        return False


def converse(chat: Chat, read: Callable[[], str]) -> int:
    """Read and answer until the user leaves. Ctrl-C ends an answer; at the prompt, a second one leaves."""
    leaving = False
    while True:
        try:
            line = read().strip()
            leaving = False
            if line.startswith("/"):
                say(chat.command(line))
            elif line:
                _print_answer(chat, line)
        except EOFError:
            return 0
        except KeyboardInterrupt:
            say("")
            if leaving:
                return INTERRUPTED
            leaving = True
            say("Ctrl-C again, /exit or Ctrl-D leaves.")
        except HalotuneError as e:  # too long a conversation, say
            say(f"{e} /reset begins anew.")


def _print_answer(chat: Chat, line: str) -> None:
    with suppress(KeyboardInterrupt), closing(chat.answer(line)) as pieces:  # which ends the answer
        for piece in pieces:
            print(piece, end="", flush=True)
    print(flush=True)


def read_line() -> str:
    """A line of the user's: with a prompt and editing on a terminal, plain from a pipe."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line
    with suppress(ImportError):  # Windows
        import readline  # noqa: F401  (input() then has history and editing)
    try:
        return input("> ")
    except EOFError:
        say("")
        raise


def say(text: str) -> None:
    """To the user, beside the conversation, which alone is on stdout."""
    print(text, file=sys.stderr, flush=True)
