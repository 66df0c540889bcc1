"""Sizes, durations, fractions and numbers as text."""

import pytest

from budwood import humanize


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (268_900_000, "268.9 MB"),
        (3.2e12, "3.20 TB"),
        (None, "-"),
    ],
)
def test_size(count, words):
    assert humanize.size(count) == words


@pytest.mark.parametrize(
    ("amount", "words"),
    [(4.21, "4.2 s"), (59.9, "59.9 s"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (None, "-")],
)
def test_seconds(amount, words):
    assert humanize.seconds(amount) == words


def test_share_and_figure():
    assert humanize.share(0.588) == "58.80 %"
    assert humanize.share(None) == "-"
    assert humanize.span([0.031, 0.0825, 0.05]) == "3.10 % to 8.25 %"
    assert humanize.figure(9.3794) == "9.379"
    assert humanize.shape([1536, 576]) == "1536 x 576"


def test_what_cannot_be_seen_becomes_visible():
    assert humanize.printable("a\u202eb\x1b[1m\x00\u200d\u2028\U000e0041") == (
        "a\\u202eb\\x1b[1m\\x00\\u200d\\u2028\\U000e0041"
    )
    assert humanize.printable("ordinary, Größe 模型 \t\n") == "ordinary, Größe 模型 \t\n"
