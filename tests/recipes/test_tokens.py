"""What of a conversation counts in the loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from halotune.core.errors import HalotuneError

pytest.importorskip("transformers")
pytest.importorskip("trl")

from halotune.recipes.language.rows import Columns, Conversation, Text, read_examples, understood
from halotune.recipes.language.tokens import (
    IGNORED,
    TEMPLATES,
    encode,
    encode_all,
    prompt_text,
    set_pad_token,
    set_template,
)

from .problems import tokenizer

TURNS = [
    ("system", "Be brief."),
    ("user", "What is 1+1?"),
    ("assistant", "It is 2."),
    ("user", "And 2+2?"),
    ("assistant", "4!"),
]
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]

# What popular models use, in few words: where a turn ends, and what asks for an answer, differ.
FOREIGN = {
    "llama 3": "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m.role + '<|end|>\n\n' + m.content + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}",
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% else %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}",
    "a prompt that thinks": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
}
ENDS = {"llama 3": "<|eot|>", "mistral": "</s>", "a prompt that thinks": "<|im_end|>", "chatml": "<|im_end|>", "plain": "</s>"}


def read(file, columns=Columns(), **how):  # noqa: B008
    return read_examples(str(file), lambda values: understood(values, columns), **how)


def learned(tok: Any, tokens: dict[str, list[int]]) -> list[str]:
    """The runs of tokens that count, as text."""
    runs: list[list[int]] = []
    for token, label, before in zip(tokens["input_ids"], tokens["labels"], [IGNORED, *tokens["labels"]], strict=False):
        assert label in (IGNORED, token)
        if label != IGNORED:
            runs += [[]] if before == IGNORED else []
            runs[-1].append(token)
    return [tok.decode(run) for run in runs]


@pytest.mark.parametrize("name", ENDS)
def test_answers_and_the_marks_of_their_ends_count(name):
    tok = tokenizer(FOREIGN.get(name))
    if name in TEMPLATES:
        set_template(tok, name)
    row = Conversation(MESSAGES, (2, 4))
    tokens = encode(tok, row)
    text = tok.apply_chat_template(MESSAGES, tokenize=False)
    assert tokens["input_ids"] == tok(text, add_special_tokens=False).input_ids
    assert [r.strip() for r in learned(tok, tokens)] == [f"It is 2.{ENDS[name]}", f"4!{ENDS[name]}"]
    one = encode(tok, Conversation(MESSAGES, (4,)))
    assert [r.strip() for r in learned(tok, one)] == [f"4!{ENDS[name]}"]


def test_a_template_with_marks_of_its_own():
    marked = FOREIGN["llama 3"].replace(
        "m.content + '<|eot|>' }}", "'' }}{% generation %}{{ m.content + '<|eot|>' }}{% endgeneration %}"
    )
    tok = tokenizer(marked)
    assert learned(tok, encode(tok, Conversation(MESSAGES[1:3], (1,)))) == ["It is 2.<|eot|>"]


def test_a_template_that_rewrites_earlier_turns_is_refused():
    """Else the loss would count what the model is never asked for."""
    fickle = (
        "{% for m in messages %}{{ m.role + ': ' + (m.content if loop.last or m.role == 'user' else m.content[:2]) + '\n' }}"
    )
    tok = tokenizer(fickle + "{% endfor %}")
    assert encode(tok, Conversation(MESSAGES[1:3], (1,)))
    with pytest.raises(HalotuneError, match=r"changes the assistant's earlier messages.*--template"):
        encode(tok, Conversation(MESSAGES, (2, 4)))


def test_alpaca_learns_the_response_and_the_end():
    tok = tokenizer()
    set_template(tok, "alpaca")
    tokens = encode(
        tok, Conversation([{"role": "user", "content": "What is 1+1?"}, {"role": "assistant", "content": "2"}], (1,))
    )
    assert tokens["labels"][-1] == tok.eos_token_id and learned(tok, tokens) == ["2</s>"]
    asked = prompt_text(tok, "What is 1+1?")
    assert asked.endswith("### Instruction:\nWhat is 1+1?\n\n### Response:")
    assert tok.decode(tokens["input_ids"]) == asked + "2</s>"


def test_text_counts_whole_and_ends():
    tok = tokenizer()
    tokens = encode(tok, Text("Tom has 3 apples."))
    assert tokens["labels"] == tokens["input_ids"] and tokens["input_ids"][-1] == tok.eos_token_id


def test_rows_are_cut_and_those_without_an_answer_left_out():
    tok = tokenizer()
    set_template(tok, "plain")
    short, long = ([{"role": "user", "content": q}, {"role": "assistant", "content": "2"}] for q in ("1+1?", "1+1? " * 50))
    found, cut = encode_all(tok, [Conversation(short, (1,)), Conversation(long, (1,))], 20)
    assert cut == 1 and len(found) == 1


def test_padding_takes_no_new_token():
    tok = tokenizer()
    before = len(tok)
    assert set_pad_token(tok) == "<pad>" and len(tok) == before
    with_none = tokenizer()
    with_none.get_vocab = lambda: {"</s>": 1}
    assert set_pad_token(with_none) == "</s>"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": MESSAGES}, (2, 4)),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]}, (1,)),
        ({"query": "Hi", "response": "Yes", "type": "GSM"}, (1,)),
        ({"instruction": "Add", "input": "1 1", "output": "2"}, (1,)),
        ({"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Yes"}]}, (1,)),
    ],
)
def test_rows_of_every_kind(row, expected, tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([row]))
    [found], _ = read(file)
    assert isinstance(found, Conversation) and found.learned == expected
    assert {m["role"] for m in found.messages} <= {"system", "user", "assistant"}


def test_columns_of_other_names_and_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"q": ["Hi"], "a": ["Yes"]}), tmp_path / "rows.parquet")
    [found], _ = read(tmp_path / "rows.parquet", Columns(prompt="q", response="a"))
    assert found.messages[1]["content"] == "Yes"


def test_bad_rows_are_named_or_left_out(tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"query": "Hi", "response": "Yes"}\n{"query": "Hi"\n{"query": "Hi", "response": 3}\n{"a": 1}\n')
    with pytest.raises(HalotuneError, match=r"rows.jsonl, line 2: is no JSON .*--skip-bad-rows"):
        read(file)
    kept, bad = read(file, skip_bad=True)
    assert len(kept) == 1 and [b.split(": ")[0].rpartition(" ")[2] for b in bad] == ["2", "3", "4"]
    assert "'response'; found 3" in bad[1] and "the columns are a:" in bad[2]


def test_a_data_set_of_the_hub_may_have_a_full_stop_in_its_name(monkeypatch):
    from halotune.recipes.language import rows

    asked: list[str] = []
    monkeypatch.setattr(rows, "_from_hub", lambda source: asked.append(source) or [])
    names = ["teknium/OpenHermes-2.5", "user/data-1.0:test", "user/data"]
    assert [list(rows.find_rows(name)) for name in names] == [[], [], []] and asked == names


@pytest.mark.parametrize("name", ["rows.txt", "rows.jsonl", "./x", "rows"])
def test_what_is_no_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.txt").write_text("Hi")
    with pytest.raises(HalotuneError, match=r"\.jsonl"):
        read(name)


def test_a_file_whose_name_has_a_comma(tmp_path):
    file = tmp_path / "seed=0,r=8.jsonl"
    file.write_text('{"text": "a"}\n')
    assert read(file)[0] == [Text("a")]
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
    assert len(read(f"{tmp_path / 'b.jsonl'}, {tmp_path / 'b.jsonl'}")[0]) == 2


def test_templates_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HalotuneError, match="the template of 'nobody/nothing' cannot be loaded"):
        set_template(tokenizer(), "nobody/nothing")
    (tmp_path / "mine.jinja").write_bytes(b"\xff{{ messages }}")
    with pytest.raises(HalotuneError, match=r"mine.jinja: is not UTF-8 .* Save it as UTF-8"):
        set_template(tokenizer(), str(tmp_path / "mine.jinja"))


def test_an_unknown_template_names_the_nearest():
    with pytest.raises(HalotuneError, match="alpaca"):
        set_template(tokenizer(), "alpacca")
