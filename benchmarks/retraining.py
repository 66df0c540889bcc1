"""Retraining compared: pruning methods alone, refitted, and followed by a training of what is left.

    python benchmarks/retraining.py MODEL CALIBRATION FOLDER --text wikitext2=wiki.test.raw --text c4=c4.jsonl.gz
    python benchmarks/retraining.py MODEL CALIBRATION FOLDER --row 'graft 9.75 *' --row 'wanda 2:4' --text ...

A text is NAME=DATA as `budwood evaluate --data` reads it; `sotu=sotu:2000-` is always included. `--row` takes names,
also with * as a wildcard, and `--list` shows them. `--ablation` takes the rows of graft's block fit: target x norms x
steps x calibration tokens. Rows of perp that train the whole model prune with the calibration windows and then run
`budwood retrain` on `--train-samples` windows of `--train` (by default the calibration text).

Every cell writes into a folder of its own, so that a killed cell continues where it was, and is then written as a line
of FOLDER/cells.jsonl; the same command measures what is missing. The table is printed and kept as FOLDER/table.json and
FOLDER/table.md. Perplexity: variant plain, the first windows of every text. D = ln(perplexity / dense perplexity), mean
over texts; share: to the D of Wanda 2:4 on the same draw; closed: the part of the D of the same method alone that is
gone. Trained: share of the parameters. Minutes: of pruning and training, of the last process where a cell was
continued. GB: peak memory of the process; GPU GB: of tensors on the GPU.
"""

import argparse
import json
import math
import re
import shutil
import statistics
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from cells import Cell, filled, kept, parser_of, spread, written
from retraining_rows import ROWS, Row, ablation_rows, main_rows

import budwood

YARDSTICK = "wanda 2:4"
DTYPE = "bfloat16"  # of the written weights


def main() -> None:
    parser = parser_of(__doc__, draws=3, num_samples=64, windows=8)
    parser.add_argument("--row", action="append", default=[], metavar="NAME", help="only these, * is a wildcard")
    parser.add_argument("--ablation", action="store_true", help="the rows of graft's block fit")
    parser.add_argument("--list", action="store_true", help="show the rows and stop")
    parser.add_argument("--steps", type=int, default=1000, help="of retraining the whole model")
    parser.add_argument("--fit-steps", type=int, default=64, help="of fitting one block")
    parser.add_argument("--train", metavar="DATA", help="text to retrain on, by default the calibration text")
    parser.add_argument("--train-samples", type=int, default=1024)
    parser.add_argument("--device", default="auto", help="for every verb")
    parser.add_argument("--compute-dtype", default="auto", help="of pruning and retraining")
    parser.add_argument("--keep", action="store_true", help="leave the written models in FOLDER")
    asked = parser.parse_args()
    rows = chosen(asked.row, asked.ablation, parser)
    if asked.list:
        print("\n".join(f"{name}: {ROWS[name].method or 'the model itself'}" for name in rows))
        return
    file = asked.folder / "cells.jsonl"
    texts = {"sotu": "sotu:2000-"} | dict(text.split("=", 1) for text in asked.text)
    wanted = [(row, draw) for draw in range(asked.draws) for row in rows if draw == 0 or ROWS[row].method]
    measure = partial(measured, texts=texts, asked=asked)
    cells = kept(file) if asked.table else filled(file, wanted, measure, asked.cells)
    if not asked.keep:
        shutil.rmtree(asked.folder / "pruned", ignore_errors=True)
    lines = figures(cells)
    text = markdown(lines, cells) if lines else "nothing yet: the dense model comes first"
    asked.folder.mkdir(parents=True, exist_ok=True)
    (asked.folder / "table.json").write_text(json.dumps({"rows": lines, "cells": cells}, indent=1) + "\n")
    (asked.folder / "table.md").write_text(text + "\n")
    print(text)


def chosen(patterns: list[str], ablation: bool, parser: argparse.ArgumentParser) -> list[str]:
    """The rows that are asked for, in the order of the table; the dense model always."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in ROWS):
            parser.error(f"no row is called {pattern!r}; --list shows them all")
    if patterns:
        taken = [name for name in ROWS if any(fnmatchcase(name, pattern) for pattern in patterns)]
    else:
        taken = list(ablation_rows() if ablation else main_rows())
    return list(dict.fromkeys(["dense", *taken]))


def measured(name: str, draw: int, texts: Mapping[str, str], asked: argparse.Namespace) -> Cell:
    """One cell, written by processes of their own, measured here."""
    row = ROWS[name]
    folder, reports, target = asked.model, [], asked.folder / slug(f"{name} {draw}")
    if row.method:
        folder, reports = written_for(name, row, draw, target, asked)
    perplexity = {
        text: budwood.evaluate(
            str(folder), data, seq_length=2048, limit=asked.windows, dtype=asked.dtype, device=asked.device
        )[0].perplexity
        for text, data in texts.items()
    }
    if not asked.keep:
        shutil.rmtree(target, ignore_errors=True)
    samples = samples_of(row, asked)
    return {
        "method": method_of(row, asked),
        "move": row.move,
        "perplexity": perplexity,
        "bits": reports[-1]["totals"]["bits_per_weight"] if reports else 16.0,
        "trained_share": trained_share(row, reports),
        "minutes": sum(report["seconds"]["total"] for report in reports) / 60,
        "memory": max((report["peak_memory"] or 0 for report in reports), default=0),
        "device_memory": max((report.get("peak_device_memory") or 0 for report in reports), default=0),
        "training": [part for report in reports for part in summaries(report)],
        "notes": [note for report in reports for note in report["notes"]],
        "calibration": f"{asked.calibration}, {samples} x {asked.seq_length}, random by the draw",
        "evaluation": f"plain, {asked.windows} x 2048, {asked.dtype}",
    }


def written_for(
    name: str, row: Row, draw: int, target: Path, asked: argparse.Namespace
) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of a row, and the reports of the verbs that made it. A method alone is shared with its retraining."""
    options = {"seq_length": asked.seq_length, "seed": draw, "device": asked.device}
    options["compute_dtype"] = asked.compute_dtype
    method = method_of(row, asked)
    shared = asked.folder / "pruned" / slug(f"{name if row.alone is None else row.alone} {draw}")
    first = shared if row.move or row.alone is None else target
    samples = samples_of(row, asked)
    report = written(
        "prune", asked.model, first, method=method, data=asked.calibration, num_samples=samples, dtype=DTYPE, **options
    )
    if row.move is None:
        return first, [report]
    training = {"steps": asked.steps, "num_samples": asked.train_samples, "move": row.move}
    text = asked.train or asked.calibration
    return target, [report, written("retrain", str(first), target, data=text, **training, **options)]


def method_of(row: Row, asked: argparse.Namespace) -> str | None:
    return None if row.method is None else row.method.format(steps=asked.steps, fit=asked.fit_steps)


def samples_of(row: Row, asked: argparse.Namespace) -> int:
    return int(asked.num_samples if row.tokens is None else max(1, row.tokens // asked.seq_length))


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def trained_share(row: Row, reports: list[dict[str, Any]]) -> float:
    """Of the parameters: as the training says; in a fit of whole blocks the kept weights."""
    if not reports:
        return 0.0
    if reports[-1].get("training"):
        return float(reports[-1]["training"][-1]["trained_share"])
    totals = reports[-1]["totals"]
    fitted = "steps=" in (row.method or "")
    return float(totals["density"] * totals["in_scope"] / totals["parameters"]) if fitted else 0.0


def summaries(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What trained, with its held-out losses."""
    names = ("move", "steps", "best_step", "held_out", "trained", "seconds")
    return [{name: part[name] for name in names if name in part} for part in report.get("training", [])]


def figures(cells: list[Cell]) -> list[dict[str, Any]]:
    """The lines of the table: lists of one value per draw. None without the dense model."""
    dense = next((cell["perplexity"] for cell in cells if cell["row"] == "dense"), None)
    if dense is None:
        return []
    distance = {
        (cell["row"], cell["draw"]): statistics.fmean(math.log(cell["perplexity"][t] / dense[t]) for t in dense)
        for cell in cells
    }
    lines = []
    for name in [name for name in ROWS if any(cell["row"] == name for cell in cells)]:
        found = [cell for cell in cells if cell["row"] == name]
        draws, alone = [cell["draw"] for cell in found], ROWS[name].alone
        lines.append(
            {
                "row": name,
                "method": found[0]["method"],
                "bits": statistics.fmean(cell["bits"] for cell in found),
                "perplexity": {text: [cell["perplexity"][text] for cell in found] for text in dense},
                "D": [distance[name, draw] for draw in draws],
                "share": [distance[name, draw] / distance[YARDSTICK, draw] for draw in draws if has(draw, distance)]
                if name != "dense"
                else [],
                "closed": [1 - distance[name, draw] / distance[alone, draw] for draw in draws]
                if alone and all((alone, draw) in distance for draw in draws)
                else [],
                "trained_share": found[0]["trained_share"],
                "minutes": [cell["minutes"] for cell in found],
                "memory": max(cell["memory"] for cell in found),
                "device_memory": max(cell["device_memory"] for cell in found),
            }
        )
    return lines


def has(draw: int, distance: Mapping[tuple[str, int], float]) -> bool:
    return (YARDSTICK, draw) in distance


def markdown(lines: list[dict[str, Any]], cells: list[Cell]) -> str:
    """One line a row: means over draws, standard deviations in brackets."""
    texts = list(lines[0]["perplexity"])
    head = ["row", "bits", *(f"ppl {text}" for text in texts), "D", "share", "closed", "trained", "minutes"]
    head += ["GB", "GPU GB"]
    table = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
    for line in lines:
        shown = [
            line["row"],
            f"{line['bits']:.3f}",
            *(spread(line["perplexity"][text], 2) for text in texts),
            spread(line["D"], 3),
            spread(line["share"], 3),
            spread(line["closed"], 2),
            f"{100 * line['trained_share']:.3g} %" if line["trained_share"] else "",
            spread(line["minutes"], 1),
            f"{line['memory'] / 1e9:.2f}" if line["memory"] else "",
            f"{line['device_memory'] / 1e9:.2f}" if line["device_memory"] else "",
        ]
        table.append(f"| {' | '.join(shown)} |")
    return "\n".join([*table, "", f"{cells[-1]['calibration']}; {cells[-1]['evaluation']}; weights in {DTYPE}"])


if __name__ == "__main__":
    main()
