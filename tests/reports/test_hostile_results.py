"""Results, records and cards come from other people: read whole and of the right types, or refused; never expanded."""

import json
import math
import random

import malformed
import pytest

from budwood.errors import BudwoodError, RunError, UsageError
from budwood.reports.comparison import CONTENT, FILE, MOST_RUNS, read_results
from budwood.reports.hub_results import LONGEST, metadata_of, with_index
from budwood.reports.result_json import from_json, to_json
from budwood.reports.results import Perplexity

ROW = {
    **dict.fromkeys(("name", "row", "label", "source"), "a"),
    **{"kind": "pruned", "status": "done", "method": "wanda", "error": None, "settings": {"alpha": 0.1}, "draw": 0},
    **{"seconds": {"prune": 1.0}, "figures": {"D": 0.5}, "report": None, "results": [], "speed": None, "machine": {}},
}
FIGURE = {"table": "T", "model": "M", "method": "W", "figure": "D", "value": 1.0}
RESULTS = {
    **{"schema": 1, "title": "T", "description": "", "complete": True, "rows": [ROW], "published": [FIGURE]},
    "notes": ["n"],
}
TEXT = {"name": "w", "data": "w", "variant": "plain", "bos": "auto", "seed": None, "windows": 1, "seq_length": 8}
CONDITIONS = {"dtype": "float32", "device": "cpu", "machine": {}, "versions": {}, "created": "now"}
PERPLEXITY = {"kind": "perplexity", "model": "m", "text": {**TEXT, "sha256": "0"}, "conditions": CONDITIONS}


def test_any_value_anywhere_is_read_or_is_a_sentence(tmp_path):
    found = malformed.mutations(RESULTS)
    refused: list[str] = []
    for place, value in random.Random(0).sample(found, 400):
        malformed.write(tmp_path / FILE, malformed.changed(RESULTS, place, value))
        try:
            read_results(tmp_path)
        except BudwoodError as error:
            refused.append(str(error))
    assert len(refused) > 200
    assert [sentence for sentence in refused if str(tmp_path) not in sentence] == []
    assert {"rows", "notes", "published"} <= CONTENT.keys()


@pytest.mark.parametrize("kind", [[0], {}, None, 1, "other"])
def test_a_result_of_no_known_kind_is_a_sentence(kind):
    with pytest.raises(RunError, match="here is no result: its kind is"):
        from_json({**PERPLEXITY, "losses": [1.0], "kind": kind}, "here")


@pytest.mark.parametrize("versions", ["\u202e", [], None, 1])
def test_versions_that_are_no_object_are_a_sentence(tmp_path, versions):
    malformed.write(tmp_path / FILE, {**RESULTS, "rows": [{**ROW, "machine": {"versions": versions}}]})
    with pytest.raises(BudwoodError, match=r"versions is .* where an object should be"):
        read_results(tmp_path)


@pytest.mark.parametrize("text", malformed.WHOLE, ids=lambda text: text[:6])
def test_a_file_that_holds_no_results_is_a_sentence(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(BudwoodError, match=FILE):
        read_results(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        {"rows": [ROW] * (MOST_RUNS + 1)},
        {"rows": [{**ROW, "figures": {f"perplexity {number}": 1.0}} for number in range(300)]},
        {"rows": [{**ROW, "settings": {str(number): 1 for number in range(300)}}]},
        {"published": [FIGURE] * 10_000},
    ],
)
def test_a_table_of_more_than_can_be_shown_is_refused(tmp_path, content):
    """Rows times columns are the cells of the page: a small file could ask for gigabytes."""
    (tmp_path / FILE).write_text(json.dumps({**RESULTS, **content}))
    with pytest.raises(RunError, match="at most"):
        read_results(tmp_path)


def test_another_schema_is_named_whatever_it_is(tmp_path):
    (tmp_path / FILE).write_text(json.dumps({**RESULTS, "schema": 10**3000}))
    with pytest.raises(UsageError, match="a very large number"):
        read_results(tmp_path)


@pytest.mark.parametrize("losses", [[], [10**400], [None], ["x"], [True]])
def test_a_result_from_which_nothing_follows_is_refused(losses):
    with pytest.raises(RunError, match="damaged"):
        from_json({**PERPLEXITY, "losses": losses})


def test_a_task_without_its_metric_is_refused():
    task = {"kind": "task", "task": "t", "version": "1", "shots": 0, "metric": "acc", "metrics": [], "items": 1}
    with pytest.raises(RunError, match="value cannot be computed"):
        from_json({**task, "limit": None, "rows": "r", "sha256": "0", "model": "m", "conditions": CONDITIONS})


def test_a_loss_beyond_any_perplexity_is_infinite():
    result = from_json({**PERPLEXITY, "losses": [800.0, 900.0], "text": {**PERPLEXITY["text"], "windows": 2}})
    assert isinstance(result, Perplexity)
    assert result.perplexity == math.inf
    assert to_json(result)["mean_loss"] == 850


LAUGHS = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{level}: &a{level} [{','.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 9)
)
CARDS = {
    "aliases": LAUGHS,
    "deep": f"a: {'[' * 500}{']' * 500}",
    "long": f"a: {'x' * LONGEST}",
    "no date": "a: 2001-99-99",
    "no integer": "a: !!int ''",
    "no truth": "a: !!bool maybe",
    "code": "a: !!python/object/apply:os.system [ls]",
    "a list": "- a",
    "index of a text": "model-index: text",
    "index by number": "model-index: {0: {results: []}}",
    "index of texts": "model-index: [text]",
    "entries of texts": "model-index: [{results: [text]}]",
    "data of a text": "model-index: [{results: [{dataset: text, metrics: [{type: x}]}]}]",
}


@pytest.mark.parametrize("name", CARDS)
def test_a_card_whose_metadata_cannot_be_read_cheaply_is_left_alone(name):
    """The aliases of the first would be written out as a hundred million values."""
    card = f"---\n{CARDS[name]}\n---\n# A model\n"
    assert with_index(card, [from_json({**PERPLEXITY, "losses": [1.0]})], "m") == card


def test_metadata_of_a_usual_card():
    assert metadata_of("license: mit\ntags: [a, b]") == {"license": "mit", "tags": ["a", "b"]}
