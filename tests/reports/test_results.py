"""Results: the same after a trip through JSON, damaged ones refused, the newest of a kind kept."""

import json
import math
from dataclasses import replace

import pytest

from budwood.errors import RunError
from budwood.reports.result_files import merged, read_results
from budwood.reports.result_json import from_json, to_json
from budwood.reports.result_tables import render_results, same_digits, tables
from budwood.reports.results import (
    Conditions,
    Divergence,
    Pair,
    Perplexity,
    Repetition,
    TaskMetric,
    TaskScore,
    Text,
    mean_score,
)

UNDER = Conditions("float32", "cpu", {"processor": "A <b>", "threads": 2, "memory": None}, {"torch": "2.6"}, "2026")
TEXT = Text("wi|ki", "wiki.test.raw", "plain", "auto", None, 2, 16, "a" * 64, 1, 40)
PERPLEXITY = Perplexity("m", TEXT, (2.0, 3.0), UNDER, seconds=1.5, notes=("a note",))
METRIC = TaskMetric("acc", "none", 0.5, 0.25, True, (1.0, 0.0))
SCORE = TaskScore("m", "rte", "1.0", 0, "acc", (METRIC,), 2, None, "hub", "b" * 64, UNDER)
FIGURES = {"kl_mean": 0.2, "kl_error": 0.1, "kl_median": 0.1, "kl_99": 1.0, "kl_999": 2.0, "kl_max": 3.0}
DIVERGENCE = Divergence(
    "m", "d", TEXT, 30, (2.0, 3.0), (1.0, 2.0), (0.1, 0.3), (1.0, 0.5), **FIGURES, ln_ratio_error=0.1, dp_rms=0.2,
    conditions=UNDER,
)  # fmt: skip
REPETITION = Repetition("m", TEXT, 128, 4, (0.5, 0.1), UNDER, "d", (0.0, 0.2))
PAIR = Pair("m", "d", "acc of rte", 2, 0.5, None, None, 0.95, "McNemar, exact", 1.0, 1, 0, "b" * 64, UNDER)
RESULTS = (PERPLEXITY, DIVERGENCE, REPETITION, SCORE, PAIR)


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: result.kind)
def test_a_result_is_json_and_back(result):
    text = json.dumps(to_json(result), allow_nan=False)
    content = json.loads(text)
    assert from_json(content) == result
    assert from_json({**content, "of a newer version": 1}) == result
    assert {"kind", *result.derived} <= set(content)


def test_what_follows_from_the_fields():
    assert PERPLEXITY.mean_loss == 2.5
    assert PERPLEXITY.perplexity == math.exp(2.5)
    assert PERPLEXITY.error == pytest.approx(math.exp(2.5) * 0.5)
    assert replace(PERPLEXITY, losses=(2.0,)).error is None
    assert (DIVERGENCE.ln_ratio, DIVERGENCE.same_top) == (1.0, 0.75)
    assert (REPETITION.share, REPETITION.dense_share) == pytest.approx((0.3, 0.1))
    assert mean_score([SCORE, replace(SCORE, metrics=(replace(METRIC, value=1.0),))]) == pytest.approx(
        (0.75, math.sqrt(0.125) / 2)
    )
    assert UNDER.threads == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kind": "guess"}, "is no result: its kind is 'guess'"),
        ({"losses": "much"}, "here, losses is damaged: 'much' is no tuple"),
        ({"losses": [1.0, None]}, "here, losses is damaged"),
        ({"model": 3}, "here, model is damaged: '3' is no str"),
        ({"text": []}, r"here, text is damaged: \[\] stands where a Text should"),
        ({"streamed": 1}, "here, streamed is damaged"),
    ],
)
def test_a_damaged_result_is_refused(change, reason):
    with pytest.raises(RunError, match=reason):
        from_json({**to_json(PERPLEXITY), **change}, "here")
    with pytest.raises(RunError, match="the field losses is missing"):
        from_json({key: value for key, value in to_json(PERPLEXITY).items() if key != "losses"}, "here")


def test_the_newest_of_a_kind_stays():
    newer = replace(PERPLEXITY, losses=(1.0, 1.0))
    other = replace(PERPLEXITY, text=replace(TEXT, sha256="c" * 64))
    assert merged([PERPLEXITY, SCORE], [newer, other]) == [newer, SCORE, other]


def test_a_folder_without_a_report_has_no_results(tmp_path):
    assert read_results(tmp_path) == ()


@pytest.mark.parametrize(
    ("cells", "shown"),
    [
        (["0.7250", "0.7000"], ["0.725", "0.700"]),
        (["0.5000", "1.0000", ""], ["0.5", "1.0", ""]),
        (["1.0", "2.0"], ["1", "2"]),
        (["1.0", "Yaml"], ["1.0", "Yaml"]),
    ],
)
def test_a_column_has_the_decimals_that_its_longest_number_needs(cells, shown):
    assert same_digits(cells) == shown


def test_all_text_of_a_card_is_escaped():
    card = render_results(RESULTS)
    assert "A &lt;b&gt;" in card
    assert r"wi\|ki" in card
    assert len(tables(RESULTS)) == 4
