"""Which fields of a row are its text: chat data through the template, prompts with completions, never an id."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from budwood.data import calibration_windows, evaluation_windows
from budwood.data.sources import read
from budwood.errors import UsageError

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TALK = [{"role": "user", "content": "how are you"}, {"role": "assistant", "content": "well"}]
SHORT = [{"role": "user", "content": "go on"}]


@pytest.fixture
def chatty(bos_tokenizer):
    bos_tokenizer.chat_template = TEMPLATE
    return bos_tokenizer


def written(path, rows):
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (
            [{"id": "a1", "messages": TALK}, {"id": "a2", "messages": SHORT}],
            ("<user>how are you<assistant>well", "<user>go on"),
        ),
        (
            [{"id": "a1", "prompt": "two and two", "completion": " are four"}, {"prompt": "a", "completion": "b"}],
            ("two and two are four", "ab"),
        ),
        (
            [{"id": "a1", "prompt": TALK, "completion": SHORT}],
            ("<user>how are you<assistant>well<user>go on",),
        ),
        ([{"id": "a1", "messages": TALK, "text": "the text"}], ("the text",)),
    ],
)
def test_chat_and_prompts_are_read_as_text(tmp_path, chatty, suffix, rows, expected):
    texts = read(written(tmp_path / f"data{suffix}", rows), "calibration", tokenizer=chatty)
    assert texts.documents == expected
    assert texts.templated == any("<user>" in text for text in expected)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"id": "chat 1 of the set", "conversations": [{"from": "human", "value": "hello"}]}, "id.*conversations"),
        ({"id": "0a1b2c", "score": 3}, "'id' holds values such as '0a1b2c'.*the fields are id, score"),
        ({"url": "https://example.org/a", "stars": 4}, "url"),
        ({"label": "very positive", "n": 4}, "label"),
        ({"prompt": "two and two", "chosen": "four", "rejected": "five"}, "prompt, chosen, rejected"),
        ({"prompt": "two and two are", "completion": 4}, "prompt"),
        ({"id": "a", "messages": {"user": "how are you", "assistant": "well"}}, "messages holds"),
    ],
)
def test_what_is_no_text_is_refused_with_its_fields(tmp_path, chatty, suffix, row, named):
    if row.get("completion") == 4:
        row = {**row, "prompt": 3}
        named = "no field holds a string"
    with pytest.raises(UsageError, match=f"(?s)no field `text`.*{named}.*rename"):
        read(written(tmp_path / f"data{suffix}", [row, row]), "calibration", tokenizer=chatty)


def test_prose_in_scripts_without_spaces_is_text(tmp_path):
    path = written(tmp_path / "data.jsonl", [{"body": "\u6625\u7720\u4e0d\u899a\u6681", "n": 1}])
    assert len(read(path, "calibration").documents) == 1


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "line 1: the chat template.*roles must alternate"),
        ("{{ messages[7].content }}", "line 1: the chat template of the model refuses it"),
        ("{% for %}", "line 1: the chat template of the model refuses it"),
        ("{# nothing #}", "makes no text"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "it does not end"),
    ],
)
def test_a_template_that_fails_is_one_sentence(tmp_path, tokenizer, template, found):
    tokenizer.chat_template = template
    with pytest.raises(UsageError, match=found):
        read(written(tmp_path / "data.jsonl", [{"messages": TALK}]), "calibration", tokenizer=tokenizer)


def test_without_a_tokenizer_a_conversation_is_refused(tmp_path):
    with pytest.raises(UsageError, match="needs a tokenizer"):
        read(written(tmp_path / "data.jsonl", [{"messages": TALK}]), "calibration")


def test_a_row_without_messages_is_named(tmp_path, chatty):
    with pytest.raises(UsageError, match="line 2: no text in the field 'messages'"):
        read(written(tmp_path / "data.jsonl", [{"messages": TALK}, {"messages": []}]), "calibration", tokenizer=chatty)


def test_a_template_writes_the_start_token_itself(tmp_path, chatty):
    """No second one is put before the text."""
    path = written(tmp_path / "data.jsonl", [{"messages": TALK}] * 3)
    for windows in (
        calibration_windows(path, chatty, num_samples=1, seq_length=8, sampling="consecutive"),
        evaluation_windows(path, chatty, seq_length=8, limit=1),
    ):
        assert chatty.decode(windows.ids[0]).replace(" ", "") == "<user>ho"


@pytest.mark.parametrize("escape", ["\\ud800", "\\udfff", "a\\udc80b"])
@pytest.mark.parametrize("row", ['{{"text": "{}"}}', '{{"prompt": "ab", "completion": "{}"}}'])
def test_half_a_surrogate_pair_is_named(tmp_path, tokenizer, escape, row):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a b c", "prompt": "a", "completion": "b"}\n' + row.format(escape) + "\n")
    if "prompt" in row:
        path.write_text(row.format(escape) + "\n")
    with pytest.raises(UsageError, match=r"line \d: character \d is .*surrogate"):
        calibration_windows(path, tokenizer, num_samples=1, seq_length=2)
    with pytest.raises(UsageError, match="document 1 of the list: character 2 is"):
        calibration_windows(["a", "b\ud800"], tokenizer, num_samples=1, seq_length=2)
