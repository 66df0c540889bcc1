"""Evaluation windows in the three published ways."""

import json
import random

import pytest
import torch

from budwood.data import evaluation_windows
from budwood.errors import UsageError


def text_of(windows, tokenizer):
    return "".join(tokenizer.convert_ids_to_tokens(windows.ids.flatten()))


@pytest.fixture
def wiki(tmp_path):
    path = tmp_path / "wiki.raw"
    path.write_text(" \n = a = \n \n b c \n")
    return path


def test_plain_is_the_text_as_one_string(wiki, tokenizer):
    windows = evaluation_windows(wiki, tokenizer, seq_length=17)
    assert text_of(windows, tokenizer) == " \n = a = \n \n b c "
    assert evaluation_windows(wiki, tokenizer, seq_length=3).ids.shape == (6, 3)  # 18 characters


def test_gptq_joins_rows_by_two_newlines(wiki, tokenizer):
    windows = evaluation_windows(wiki, tokenizer, variant="gptq", seq_length=20)
    assert text_of(windows, tokenizer) == "\n\n = a = \n\n\n\n\n b c \n"
    assert windows.record["tokens_available"] == 20


def test_documents_are_rows_and_plain_joins_them_alike(tokenizer):
    plain, gptq = (
        evaluation_windows(["a\nb", "c"], tokenizer, variant=variant, seq_length=6) for variant in ("plain", "gptq")
    )
    assert text_of(plain, tokenizer) == text_of(gptq, tokenizer) == "a\nb\n\nc"


def test_limit_takes_the_first_windows(tokenizer):
    whole = evaluation_windows(["abcdefgh"], tokenizer, seq_length=2)
    part = evaluation_windows(["abcdefgh"], tokenizer, seq_length=2, limit=3)
    assert torch.equal(part.ids, whole.ids[:3])
    assert part.record["windows"] == 3
    assert part.record["tokens_available"] == whole.record["tokens_available"] == 8


def test_the_published_draws_are_reproduced(tokenizer):
    """Document, then start, from Python's random; a document that is too short costs a draw."""
    documents = ["abcdefghijkl"[:length] for length in (12, 3, 9, 5, 8)]
    expected = []
    chance = random.Random(0)
    for _ in range(256):
        while len(document := documents[chance.randint(0, 4)]) < 6:
            pass
        start = chance.randint(0, len(document) - 6 - 1)
        expected.append(document[start : start + 6])
    windows = evaluation_windows(documents, tokenizer, variant="c4-random", seq_length=6)
    assert text_of(windows, tokenizer) == "".join(expected)
    fewer = evaluation_windows(documents, tokenizer, variant="c4-random", seq_length=6, limit=7)
    assert torch.equal(fewer.ids, windows.ids[:7])
    other = evaluation_windows(documents, tokenizer, variant="c4-random", seq_length=6, seed=1)
    assert not torch.equal(other.ids, windows.ids)


def test_a_document_of_exactly_one_window_is_taken(tokenizer):
    windows = evaluation_windows(["abc", "abcdef"], tokenizer, variant="c4-random", seq_length=6, limit=3)
    assert text_of(windows, tokenizer) == "abcdef" * 3


def test_documents_that_are_all_too_short_are_refused(tokenizer):
    with pytest.raises(UsageError, match="window of 6 tokens, the longest of 2 has 3"):
        evaluation_windows(["abc", "ab"], tokenizer, variant="c4-random", seq_length=6)


@pytest.mark.parametrize("variant", ["plain", "gptq", "c4-random"])
def test_the_start_token_goes_before_every_window(bos_tokenizer, variant):
    windows = evaluation_windows(["abcdefghijkl"], bos_tokenizer, variant=variant, seq_length=5, bos="every", limit=3)
    start = bos_tokenizer.bos_token_id
    assert (windows.ids[:, 0] == start).all()
    assert (windows.ids[:, 1:] != start).all()
    assert windows.ids.shape == (3, 5)


@pytest.mark.parametrize(("bos", "count"), [("auto", 1), ("none", 0)])
def test_auto_adds_one_start_token_to_the_whole_text(bos_tokenizer, bos, count):
    windows = evaluation_windows(["abcdefghijkl"], bos_tokenizer, seq_length=4, bos=bos)
    assert (windows.ids == bos_tokenizer.bos_token_id).sum() == count


def test_ids_are_windows_without_a_tokenizer():
    windows = evaluation_windows(torch.arange(10), None, seq_length=4)
    assert windows.ids.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert json.loads(json.dumps(windows.record)) == windows.record


@pytest.mark.parametrize("variant", ["gptq", "c4-random"])
def test_ids_have_no_rows_or_documents(variant):
    with pytest.raises(UsageError, match="no documents or rows"):
        evaluation_windows(torch.arange(10), None, variant=variant, seq_length=4)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"variant": "c4"}, "plain, gptq or c4-random"),
        ({"limit": 0}, "at least 1, not 0"),
        ({"seq_length": 9}, "8 tokens, too few for one window of 9"),
        ({"bos": "once"}, "auto, every or none"),
    ],
)
def test_invalid_options_are_refused(tokenizer, options, found):
    with pytest.raises(UsageError, match=found):
        evaluation_windows(["abcdefgh"], tokenizer, **options)


def test_evaluation_and_calibration_use_different_texts(speeches, tokenizer):
    windows = evaluation_windows("sotu", tokenizer, seq_length=4)
    assert windows.record["data"] == "sotu:2000-"
    assert windows.record["documents"] == 2
