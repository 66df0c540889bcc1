"""Calibration windows: one shape, cut from one text, chosen as asked, the same every time."""

import json
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from budwood.data import calibration_windows
from budwood.data.windows import cut, digest
from budwood.errors import UsageError

NOTHING = torch.empty(0, dtype=torch.int64)
TEXT = "abcdefghijklmnopqrstuvwxyz"


def windows_of(tokens, **options):
    return calibration_windows(torch.arange(tokens), None, **options)


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(2, 400),
    seq_length=st.integers(2, 60),
    num_samples=st.integers(1, 50),
    sampling=st.sampled_from(["random", "consecutive"]),
    seed=st.integers(0, 9),
)
def test_windows_are_whole_distinct_pieces_of_the_text(tokens, seq_length, num_samples, sampling, seed):
    options = {"seq_length": seq_length, "num_samples": num_samples, "sampling": sampling, "seed": seed}
    if tokens < seq_length:
        with pytest.raises(UsageError, match=f"holds {tokens} tokens.*{seq_length}"):
            windows_of(tokens, **options)
        return
    windows = windows_of(tokens, **options)
    assert windows.ids.shape == (min(num_samples, tokens // seq_length), seq_length)
    assert windows.ids.dtype == torch.int64
    starts = windows.ids[:, :1]
    assert torch.equal(windows.ids, starts + torch.arange(seq_length))  # each is consecutive text
    assert (starts.flatten().diff() >= seq_length).all()  # in order, and none overlaps the next
    if sampling == "consecutive":
        assert torch.equal(windows.ids.flatten(), torch.arange(windows.ids.numel()))
    again = windows_of(tokens, **options)
    assert torch.equal(again.ids, windows.ids)
    assert again.record == windows.record


def test_the_seed_decides_the_choice():
    first, second = (windows_of(4000, seq_length=8, num_samples=5, seed=seed) for seed in (0, 1))
    assert not torch.equal(first.ids, second.ids)
    assert first.record["sha256"] != second.record["sha256"]


def test_too_little_text_is_used_whole_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING, logger="budwood"):
        windows = windows_of(50, seq_length=8, num_samples=128)
    assert windows.ids.shape == (6, 8)
    assert "6 windows of 8 tokens, fewer than the 128 asked for" in caplog.text


def test_documents_are_one_text_with_empty_lines_between(tokenizer):
    windows = calibration_windows(["abc", "de"], tokenizer, num_samples=1, seq_length=7)
    assert tokenizer.decode(windows.ids[0]).replace(" ", "") == "abc\n\nde"


def test_the_start_token_is_put_where_asked(bos_tokenizer):
    def opened(bos):
        ids = calibration_windows(
            [TEXT], bos_tokenizer, num_samples=9, seq_length=6, sampling="consecutive", bos=bos
        ).ids
        return ["".join(bos_tokenizer.convert_ids_to_tokens(row)) for row in ids]

    assert opened("auto") == ["<s>abcde", "fghijk", "lmnopq", "rstuvw"]
    assert opened("none") == ["abcdef", "ghijkl", "mnopqr", "stuvwx"]
    assert opened("every") == ["<s>abcde", "<s>fghij", "<s>klmno", "<s>pqrst", "<s>uvwxy"]


def test_auto_leaves_a_tokenizer_without_special_tokens_alone(tokenizer):
    auto, none = (
        calibration_windows([TEXT], tokenizer, seq_length=6, num_samples=4, bos=bos) for bos in ("auto", "none")
    )
    assert torch.equal(auto.ids, none.ids)


def test_long_texts_cause_no_warning(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        calibration_windows([TEXT * 9], tokenizer, seq_length=6, num_samples=2)  # its context is 16 tokens
    assert not caplog.text


def test_rows_of_ids_are_never_cut_across():
    rows = torch.arange(30).reshape(3, 10)
    windows = calibration_windows(rows, None, num_samples=6, seq_length=4, sampling="consecutive")
    assert windows.ids[:, 0].tolist() == [0, 4, 10, 14, 20, 24]


def test_the_record_is_plain_and_complete(tokenizer):
    windows = calibration_windows(["abc", TEXT], tokenizer, num_samples=2, seq_length=6, seed=3)
    assert json.loads(json.dumps(windows.record)) == windows.record
    assert windows.record == {
        "data": "list of strings",
        "documents": 2,
        "tokens_available": 3 + 2 + 26,
        "num_samples": 2,
        "seq_length": 6,
        "sampling": "random",
        "seed": 3,
        "bos": "auto",
        "sha256": digest(windows.ids),
    }


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"num_samples": 0}, "at least 1, not 0"),
        ({"seq_length": 1}, "at least 2 tokens, not 1"),
        ({"sampling": "sorted"}, "random or consecutive"),
        ({"bos": "always"}, "auto, every or none"),
        ({"seq_length": 27}, "26 tokens, too few for one window of 27"),
    ],
)
def test_invalid_options_are_refused(tokenizer, options, found):
    with pytest.raises(UsageError, match=found):
        calibration_windows([TEXT], tokenizer, **options)


def test_missing_tokenizers_and_start_tokens_are_refused(tokenizer):
    with pytest.raises(UsageError, match="no tokenizer"):
        calibration_windows([TEXT], None, seq_length=6)
    tokenizer.bos_token = None
    with pytest.raises(UsageError, match="no start token"):
        calibration_windows([TEXT], tokenizer, seq_length=6, bos="every")


def test_ids_of_another_tokenizer_are_refused(tokenizer):
    with pytest.raises(UsageError, match=f"token id 900, but the tokenizer knows {len(tokenizer)}"):
        calibration_windows(torch.tensor([1, 900]), tokenizer, seq_length=2)


def test_a_cut_drops_the_tail():
    assert cut(torch.arange(11)[None], 4, NOTHING, "text").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert cut(torch.arange(11)[None], 4, torch.tensor([99]), "text")[:, 0].tolist() == [99, 99, 99]
