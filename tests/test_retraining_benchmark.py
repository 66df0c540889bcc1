"""The benchmark of retraining: every row is a method, and the table says what the cells say."""

import math
import sys
from pathlib import Path

import pytest

from budwood.methods import parse_method
from budwood.methods.perp import Perp
from budwood.training.move import parse_move

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import retraining

        yield retraining
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_every_row_is_a_method(benchmark):
    for name, row in benchmark.ROWS.items():
        if row.method:
            method = parse_method(row.method.format(steps=7, fit=5))
            assert parse_method(str(method)) == method
            assert not isinstance(method, Perp) or method.reconstruct == "block"
        assert row.move is None or parse_move(row.move)
        assert row.alone is None or benchmark.ROWS[row.alone].alone is None, name
    assert len({benchmark.slug(name) for name in benchmark.ROWS}) == len(benchmark.ROWS)


def cell(row, draw, perplexity):
    return {
        "row": row,
        "draw": draw,
        "method": None,
        "perplexity": {"one": perplexity, "two": perplexity},
        "bits": 9.0,
        "trained_share": 0.0,
        "minutes": 1.0,
        "memory": 10**9,
        "device_memory": 0,
        "calibration": "text",
        "evaluation": "plain",
    }


def test_the_table(benchmark):
    assert benchmark.figures([cell("wanda 2:4", 0, 9.0)]) == []
    cells = [cell("dense", 0, 10.0)]
    for draw in (0, 1):
        cells += [cell("wanda 2:4", draw, 40.0), cell("perp masklora wanda 2:4", draw, 20.0)]
    lines = {line["row"]: line for line in benchmark.figures(cells)}
    assert lines["wanda 2:4"]["D"] == pytest.approx([math.log(4)] * 2)
    assert lines["perp masklora wanda 2:4"]["share"] == pytest.approx([0.5, 0.5])
    assert lines["perp masklora wanda 2:4"]["closed"] == pytest.approx([0.5, 0.5])
    assert lines["dense"]["share"] == lines["wanda 2:4"]["closed"] == []
    table = benchmark.markdown(list(lines.values()), cells)
    assert "| perp masklora wanda 2:4 | 9.000 | 20.00 (0.00) |" in table
