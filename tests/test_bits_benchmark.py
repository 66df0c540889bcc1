"""The benchmark of bits: every row is a method, and table, front and picture say what the cells say."""

import math
import sys
from pathlib import Path

import pytest

from budwood.methods import parse_method

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import bits

        yield bits
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_every_row_is_a_method(benchmark):
    for name, row in benchmark.ROWS.items():
        assert (row.method is None) == (name == "dense")
        if row.method is not None:
            method = benchmark.method_of(row)
            assert row.simulated or parse_method(str(method)) == method
            assert method.fitted_values is None or row.values is None
        assert row.pattern in benchmark.COLOURS
        assert row.kind in benchmark.MARKS


def cell(row, draw, bits, perplexity):
    return {
        "row": row,
        "draw": draw,
        "bits": bits,
        "seconds": 60.0,
        "perplexity": {"one": perplexity, "two": perplexity},
        "microseconds": None,
        "calibration": "text",
        "evaluation": "plain",
        "weights": "bfloat16",
    }


def test_the_table_and_the_front(benchmark, tmp_path):
    assert benchmark.figures([cell("dense int4", 0, 4.1, 15.0)]) == []
    cells = [cell("dense", 0, 16.0, 10.0), cell("dense int4", 0, 4.1, 15.0), cell("dense int8", 0, 8.1, 16.0)]
    cells += [cell("free int4 fitted in 3.3 bits", draw, 3.3, 20.0) for draw in (0, 1)]
    lines = {line["row"]: line for line in benchmark.figures(cells)}
    assert lines["free int4 fitted in 3.3 bits"]["D"] == pytest.approx([math.log(2)] * 2)
    assert [name for name, line in lines.items() if not line["front"]] == ["dense int8"]
    text = benchmark.markdown(list(lines.values()), cells)
    assert "| dense int4 | 4.100 | 15.00 | 15.00 | 0.405 | yes | 1.0 |  |" in text
    pytest.importorskip("matplotlib")
    benchmark.draw_picture(list(lines.values()), tmp_path / "bits.svg")
    assert (tmp_path / "bits.svg").read_text("utf-8").startswith("<?xml")


def test_bits_of_what_no_format_stores_are_counted(benchmark):
    report = {"totals": {"density": 0.5}}
    assert benchmark.ROWS["free 50% int3"].counted(report) == pytest.approx(1 + 1.5 + 19 / 128)
    report = {"totals": {"density": 1.0}}
    assert benchmark.ROWS["dense int3"].counted(report) == pytest.approx(3 + 19 / 128)
