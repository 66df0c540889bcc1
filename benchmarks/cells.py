"""What the benchmarks that fill a table share: their options, cells that are kept as they are finished, and verbs in a
process of their own.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Cell = dict[str, Any]
Place = tuple[str, int]  # row and draw


def parser_of(doc: str | None, *, draws: int, num_samples: int, windows: int) -> argparse.ArgumentParser:
    """The options that all tables have, with these defaults."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", action="append", default=[], metavar="NAME=DATA")
    parser.add_argument("--draws", type=int, default=draws)
    parser.add_argument("--num-samples", type=int, default=num_samples)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=windows, help="of 2048 tokens, of each text")
    parser.add_argument("--dtype", default="float32", help="of the forward passes that are measured")
    parser.add_argument("--cells", type=int, help="stop after so many new ones")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    return parser


def filled(file: Path, wanted: Iterable[Place], measure: Callable[[str, int], Cell], most: int | None) -> list[Cell]:
    """All cells of `file`, a line of JSON each, after the wanted ones were measured that it lacks; `most` of them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    cells = kept(file)
    known = {(cell["row"], cell["draw"]) for cell in cells}
    for row, draw in [place for place in wanted if place not in known][:most]:
        cells.append({"row": row, "draw": draw} | measure(row, draw))
        with file.open("a") as lines:
            lines.write(json.dumps(cells[-1]) + "\n")
        print(json.dumps(cells[-1]), file=sys.stderr, flush=True)
    return cells


def kept(file: Path) -> list[Cell]:
    """The cells that are there already."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def pruned(source: str, target: Path, method: str, calibration: str, **options: object) -> dict[str, Any]:
    """Prunes in a process of its own, so that time and memory are its own; the report. options: of `budwood prune`."""
    return written("prune", source, target, data=calibration, method=method, **options)


def written(verb: str, source: str, target: Path, **options: object) -> dict[str, Any]:
    """Runs a verb that writes a folder, in a process of its own; the report. options: of the verb.

    A folder that is finished is not written again, an interrupted one is continued.
    """
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "budwood", verb, source, str(target), "--quiet", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return dict(json.loads((target / "report.json").read_text()))


def spread(values: list[float], digits: int) -> str:
    """Mean, and the standard deviation in brackets; nothing of no values."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ({statistics.stdev(values):.{digits}f})"
