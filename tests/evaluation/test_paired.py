"""Pairs: exact small cases, laws of the intervals, and refusals of what is not the same."""

import math
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as some

from budwood.errors import UsageError
from budwood.evaluation.paired import FEWEST, binomial_cdf, bootstrap, mcnemar, paired_loss, paired_score
from budwood.reports.results import Conditions, Perplexity, TaskMetric, TaskScore, Text

CONDITIONS = Conditions("float32", "cpu", {"threads": 1}, {"torch": "2.6"}, "2026-01-01T00:00:00+00:00")
TEXT = Text("wiki", "wiki.test.raw", "plain", "auto", None, 4, 2048, "a" * 64)


def perplexity(losses, name="one", text=TEXT, conditions=CONDITIONS):
    return Perplexity(name, text, tuple(losses), conditions)


def score(items, name="one", **changes):
    metric = TaskMetric("acc", "none", sum(items) / len(items), 0.1, True, tuple(map(float, items)))
    return replace(
        TaskScore(name, "rte", "1.0", 0, "acc", (metric,), len(items), None, "folder", "b" * 64, CONDITIONS), **changes
    )


def test_windows_that_scatter_more_than_the_models_differ():
    """Each window is harder for the one model by 0.1; the windows themselves differ by 2."""
    losses = [3.0, 2.0, 4.0, 1.0] * 3
    one, other = perplexity([loss + 0.1 for loss in losses]), perplexity(losses, "other")
    pair = paired_loss(one, other)
    assert pair.difference == pytest.approx(0.1)
    assert pair.low == pytest.approx(0.1)
    assert pair.high == pytest.approx(0.1)
    assert (pair.better, pair.worse, pair.count, pair.sha256) == (0, 12, 12, TEXT.sha256)
    assert pair.p < 0.01


@given(some.lists(some.floats(-3, 3), min_size=FEWEST, max_size=30), some.floats(-2, 2))
def test_the_interval_moves_and_turns_with_the_differences(values, shift):
    low, high, p = bootstrap(values, resamples=400)
    mean = math.fsum(values) / len(values)
    assert low <= mean + 1e-9
    assert mean - 1e-9 <= high
    assert 0 < p <= 1
    moved = bootstrap([value + shift for value in values], resamples=400)
    assert moved[:2] == pytest.approx((low + shift, high + shift), abs=1e-9)


@pytest.mark.parametrize("count", [1, FEWEST - 1])
def test_few_windows_have_no_interval(count):
    pair = paired_loss(perplexity([3.0] * count), perplexity([2.0] * count))
    assert (pair.difference, pair.low, pair.high, pair.p) == (1.0, None, None, None)


@given(some.lists(some.floats(0.1, 3), min_size=FEWEST, max_size=16))
def test_p_is_never_below_that_of_the_sign_test(values):
    assert bootstrap(values, resamples=400)[2] >= 2 * 0.5 ** len(values)


def test_equal_models_do_not_differ():
    assert bootstrap([0.0] * FEWEST) == (0.0, 0.0, 1.0)
    assert mcnemar(0, 0, 10) == (0.0, 0.0, 1.0)


@given(some.integers(0, 12), some.integers(0, 12))
def test_mcnemar_is_the_share_of_coins_at_least_as_uneven(better, worse):
    differing = better + worse
    if differing > 9:
        return
    uneven = [sum(coins) for coins in product((0, 1), repeat=differing)]
    expected = sum(abs(2 * heads - differing) >= abs(better - worse) for heads in uneven) / len(uneven)
    low, high, p = mcnemar(better, worse, 40)
    assert p == pytest.approx(min(1.0, expected))
    assert low - 1e-9 <= (better - worse) / 40 <= high + 1e-9
    assert mcnemar(worse, better, 40) == pytest.approx((-high, -low, p))


def test_the_interval_of_mcnemar_is_that_of_clopper_and_pearson():
    low, high, _ = mcnemar(7, 3, 100)
    share_low, share_high = (low * 10 + 1) / 2, (high * 10 + 1) / 2
    assert 1 - binomial_cdf(6, 10, share_low) == pytest.approx(0.025)
    assert binomial_cdf(7, 10, share_high) == pytest.approx(0.025)


def test_items_are_compared_one_by_one():
    pair = paired_score(score([1, 1, 0, 0, 1]), score([0, 1, 1, 0, 0], "other"))
    assert (pair.better, pair.worse, pair.count) == (2, 1, 5)
    assert pair.difference == pytest.approx(0.2)
    assert pair.p == 1.0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"variant": "gptq"}, r"the variant \(plain and gptq\)"),
        ({"seq_length": 512}, r"the length of the windows \(2048 and 512\)"),
        ({"windows": 3}, "the number of windows"),
        ({"bos": "every"}, "the use of a BOS token"),
        ({"sha256": "c" * 64}, "are of different tokens"),
    ],
)
def test_other_windows_are_refused(change, reason):
    with pytest.raises(UsageError, match=reason):
        paired_loss(perplexity([1.0] * 4), perplexity([1.0] * 4, text=replace(TEXT, **change)))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": "2.0"}, "the version of the task"),
        ({"shots": 5}, r"\(0 and 5\)"),
        ({"sha256": "c" * 64}, "different tokens"),
        ({"conditions": replace(CONDITIONS, dtype="bfloat16")}, "different dtypes"),
    ],
)
def test_other_questions_are_refused(change, reason):
    with pytest.raises(UsageError, match=reason):
        paired_score(score([1, 0]), score([1, 0], **change))
    half = score([0.5, 1])
    with pytest.raises(UsageError, match="not just right or wrong"):
        paired_score(half, half)
