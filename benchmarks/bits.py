"""What a bit buys: the loss of quality against stored bits per weight, of masks, of few bits, and of both together.

    python benchmarks/bits.py MODEL CALIBRATION FOLDER --text wikitext2=wiki.test.raw --text c4=c4.jsonl.gz
    python benchmarks/bits.py MODEL CALIBRATION FOLDER --row 'free 5* int4*' --texts sotu --draws 1

Rows are a pattern (dense; 2:4 and recovered weights; free), the share of weights that it keeps, and their values: bf16,
int8 and int4 rounded to nearest, int4 fitted, and for comparison int3 rounded to nearest, which no format stores: it is
written dense and its bits are counted. `--list` shows the rows, `--row` takes names, * is a wildcard. A text is
NAME=DATA as `budwood evaluate --data` reads it; `sotu=sotu:2000-` is always there, `--texts` takes only some of them.

Every finished cell is written at once as a line of FOLDER/cells.jsonl; the same command measures what is missing and
continues a cell that was cut off. FOLDER/table.md is the table, FOLDER/bits.svg the picture. Perplexity: variant plain,
the first windows of every text. D = ln(perplexity / dense perplexity), mean over texts. Front: no other row has both
fewer bits and a smaller D. Microseconds, with --speed: the product of one row with the largest matrices of the written
model, as packed, mean of their medians; dense is that of torch.
"""

import argparse
import math
import shutil
import statistics
import time
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bits_rows import ROWS, method_of
from cells import Cell, filled, kept, parser_of, spread
from torch import Tensor

import budwood
from budwood.checkpoints.loading import load
from budwood.kernels.linear import SparseLinear

ROUNDS = 30
COLOURS = {"dense": "C7", "2:4": "C1", "free": "C0"}
MARKS = {"bf16": "o", "int8": "s", "int4": "x", "int4 fitted": "D", "int3": "^"}


def main() -> None:
    parser = parser_of(__doc__, draws=3, num_samples=32, windows=6)
    parser.add_argument("--texts", metavar="NAMES", help="only these, separated by commas")
    parser.add_argument("--row", action="append", default=[], metavar="NAME", help="only these, * is a wildcard")
    parser.add_argument("--list", action="store_true", help="show the rows and stop")
    parser.add_argument("--weights", default="bfloat16", help="dtype of the written weights that are no integers")
    parser.add_argument("--speed", action="store_true", help="microseconds of one row too")
    asked = parser.parse_args()
    rows = [row for row in ROWS if row == "dense" or not asked.row or any(fnmatchcase(row, p) for p in asked.row)]
    if asked.row and len(rows) < 2 and asked.row != ["dense"]:
        parser.error(f"no row is called {asked.row[0]!r}; --list shows them all")
    if asked.list:
        print("\n".join(f"{row}: {ROWS[row].method or 'the model itself'}" for row in rows))
        return
    texts = {"sotu": "sotu:2000-"} | dict(text.split("=", 1) for text in asked.text)
    if asked.texts:
        unknown = set(asked.texts.split(",")) - set(texts)
        if unknown:
            parser.error(f"there is no text {min(unknown)}; give it with --text NAME=DATA")
        texts = {name: texts[name] for name in asked.texts.split(",")}
    file = asked.folder / "cells.jsonl"
    wanted = [(row, draw) for draw in range(asked.draws) for row in rows if draw == 0 or ROWS[row].calibrated]
    measure = partial(measured, texts=texts, asked=asked)
    cells = kept(file) if asked.table else filled(file, wanted, measure, asked.cells)
    lines = figures(cells)
    text = markdown(lines, cells) if lines else "nothing yet: the dense model comes first"
    asked.folder.mkdir(parents=True, exist_ok=True)
    (asked.folder / "table.md").write_text(text + "\n")
    if lines:
        draw_picture(lines, asked.folder / "bits.svg")
    print(text)


def measured(name: str, draw: int, texts: Mapping[str, str], asked: argparse.Namespace) -> Cell:
    """One cell: pruned, measured, dropped."""
    row, folder, bits, seconds = ROWS[name], Path(asked.model), 16.0, 0.0
    if row.method is not None:
        folder = asked.folder / f"{name} {draw}".replace(" ", "-").replace(":", "").replace("%", "")
        report = budwood.prune(
            asked.model,
            folder,
            method_of(row),
            asked.calibration if row.calibrated else None,
            num_samples=asked.num_samples,
            seq_length=asked.seq_length,
            seed=draw,
            values=row.values,
            format="dense" if row.simulated else "auto",
            dtype=asked.weights,
            compute_dtype=asked.dtype,
        )
        bits = row.counted(report) if row.counted else report["totals"]["bits_per_weight"]
        seconds = report["seconds"]["total"]
    perplexity = {
        text: budwood.evaluate(str(folder), data, seq_length=2048, limit=asked.windows, dtype=asked.dtype)[0].perplexity
        for text, data in texts.items()
    }
    found: Cell = {
        "method": row.method,
        "values": row.values,
        "bits": bits,
        "seconds": seconds,
        "perplexity": perplexity,
        "microseconds": microseconds(str(folder)) if asked.speed else None,
        "calibration": f"{asked.calibration}, {asked.num_samples} x {asked.seq_length}, random by the draw",
        "evaluation": f"plain, {asked.windows} x 2048, {asked.dtype}",
        "weights": asked.weights,
    }
    if row.method is not None:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def microseconds(folder: str) -> float:
    """One row times each of the largest matrices of a model in turn, so that none is in the cache: mean of medians."""
    model = load(folder, dtype=torch.bfloat16)
    kinds = (SparseLinear, torch.nn.Linear)
    head = model.get_output_embeddings()
    layers = [(m, shape_of(m)) for m in model.modules() if isinstance(m, kinds) and m is not head]
    widest = max(shape[0] * shape[1] for _, shape in layers)
    chosen = [layer for layer, shape in layers if shape[0] * shape[1] == widest]
    x = {shape[1]: torch.randn(1, shape[1]).bfloat16() for _, shape in layers}
    times: dict[int, list[float]] = {index: [] for index in range(len(chosen))}
    with torch.no_grad():
        for _ in range(ROUNDS):
            for index, layer in enumerate(chosen):
                row = x[shape_of(layer)[1]]
                start = time.perf_counter()
                layer(row)
                times[index].append(time.perf_counter() - start)
    return 1e6 * statistics.fmean(statistics.median(found) for found in times.values())


def shape_of(layer: torch.nn.Module) -> tuple[int, int]:
    """[out, in]"""
    if isinstance(layer, SparseLinear):
        return layer.shape
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0], weight.shape[1]


def figures(cells: list[Cell]) -> list[dict[str, Any]]:
    """The lines of the table, by rising bits. None without the dense model."""
    dense = next((cell["perplexity"] for cell in cells if cell["row"] == "dense"), None)
    if dense is None:
        return []
    lines = []
    for name in [name for name in ROWS if any(cell["row"] == name for cell in cells)]:
        found = [cell for cell in cells if cell["row"] == name]
        shared = [text for text in dense if all(text in cell["perplexity"] for cell in found)]
        distances = [
            statistics.fmean(math.log(cell["perplexity"][text] / dense[text]) for text in shared) for cell in found
        ]
        lines.append(
            {
                "row": name,
                "bits": statistics.fmean(cell["bits"] for cell in found),
                "perplexity": {text: [cell["perplexity"][text] for cell in found] for text in shared},
                "D": distances,
                "minutes": [cell["seconds"] / 60 for cell in found],
                "microseconds": [cell["microseconds"] for cell in found if cell["microseconds"] is not None],
            }
        )
    lines.sort(key=lambda line: (line["bits"], statistics.fmean(line["D"])))
    best = math.inf
    for line in lines:
        line["front"] = statistics.fmean(line["D"]) < best
        best = min(best, statistics.fmean(line["D"]))
    return lines


def markdown(lines: list[dict[str, Any]], cells: list[Cell]) -> str:
    """One line a row: means over draws, standard deviations in brackets."""
    texts = list(dict.fromkeys(text for line in lines for text in line["perplexity"]))
    head = ["row", "bits", *(f"ppl {text}" for text in texts), "D", "front", "minutes", "us of one row"]
    table = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
    for line in lines:
        shown = [
            line["row"],
            f"{line['bits']:.3f}",
            *(spread(line["perplexity"].get(text, []), 2) for text in texts),
            spread(line["D"], 3),
            "yes" if line["front"] else "",
            spread(line["minutes"], 1),
            spread(line["microseconds"], 1),
        ]
        table.append(f"| {' | '.join(shown)} |")
    last = cells[-1]
    return "\n".join([*table, "", f"{last['calibration']}; {last['evaluation']}; weights in {last['weights']}"])


def draw_picture(lines: list[dict[str, Any]], file: Path) -> None:
    """D against bits: a point for each row, a line through the front."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    front = [line for line in lines if line["front"]]
    axes.plot([line["bits"] for line in front], [mean_of(line) for line in front], color="0.7", zorder=1)
    named: set[str] = set()
    for line in lines:
        row = ROWS[line["row"]]
        label = f"{row.pattern}, {row.kind}"
        axes.scatter(
            line["bits"],
            mean_of(line),
            color=COLOURS[row.pattern],
            marker=MARKS[row.kind],
            label=None if label in named else label,
            zorder=2,
        )
        named.add(label)
    axes.set(xlabel="bits per weight", ylabel="D = ln(perplexity / dense perplexity)", xscale="log")
    axes.set_xticks([2, 3, 4, 5, 6, 8, 10, 12, 16], [str(tick) for tick in (2, 3, 4, 5, 6, 8, 10, 12, 16)])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)


def mean_of(line: Mapping[str, Any]) -> float:
    """The mean D over draws."""
    return statistics.fmean(line["D"])


if __name__ == "__main__":
    main()
