"""A pruned folder in another form: its matrices in another format, or their values rounded, without any text."""

import json
import time
from pathlib import Path
from typing import Any

from budwood.bookkeeping import account
from budwood.checkpoints.source import open_source
from budwood.checkpoints.writer import Writer, claim
from budwood.environment import installed
from budwood.errors import UsageError
from budwood.evaluation.report import render_card, render_report
from budwood.formats import count, has_base, known_layout, rounds
from budwood.progress import Progress, Silent
from budwood.stream.arithmetic import name_of
from budwood.stream.block import Linear
from budwood.stream.model import Model


def repack(
    folder: str | Path,
    target: str | Path,
    format: str = "auto",
    values: str | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes the pruned model of `folder` into `target` in another layout; returns the report that is also written.

    The same call goes on where an earlier one was cut off. With values="int8" every matrix is rounded as it is; in
    `prune` later blocks see the rounding of earlier ones.
    Raises UsageError where `folder` was not pruned by budwood or is rounded already, or where `target` is taken.
    """
    started = time.perf_counter()
    progress = progress or Silent()
    layout = known_layout(format, values)
    opened, target = open_source(folder), Path(target).expanduser()
    if target.resolve() == opened.folder.resolve():
        raise UsageError(f"{target} is the folder to export itself; give another folder")
    file = opened.folder / "recipe.json"
    if not file.is_file():
        raise UsageError(f"{folder} holds no recipe.json, so it is no folder that budwood pruned; prune it first")
    made = json.loads(file.read_text("utf-8"))
    if rounds(layout) and any(rounds(entry["format"]) for entry in opened.packed.values()):
        raise UsageError(f"the values of {folder} are int8 already; export the folder that they were rounded from")

    model = Model(opened, skip=made["skip"])
    recipe = {
        "budwood": installed("budwood"),
        "method": made["method"],
        "source": {"name": str(folder), "sha256": opened.fingerprint},
        "data": made["data"],
        "dtype": name_of(model.storage),
        "compute_dtype": made["compute_dtype"],
        "format": layout,
        "skip": made["skip"],
        "repacked": made,  # how the folder came to be that was repacked
    }
    found = claim(target, recipe, overwrite)
    if found and (target / "config.json").is_file() and (target / "report.json").is_file():
        progress.note(f"{target} is finished already; nothing is left to do")
        return dict(json.loads((target / "report.json").read_text("utf-8")))

    writer = Writer(target, recipe, len(model), layout)
    seconds = through_blocks(model, writer, progress)
    writer.write_outside(model.names_outside(), model.read_outside)
    notes = [f"repacked from {folder}, where the output errors of the blocks are reported"]
    report = account(model, writer, seconds, notes, str(folder), made["method"])
    report["seconds"]["total"] = time.perf_counter() - started
    documents = {
        "report.json": json.dumps(report, indent=2) + "\n",
        "report.md": render_report(report),
        "README.md": render_card(report, None, opened.license, type(model.module).__name__),
    }
    writer.finish(opened.folder, made["method"], documents)
    return report


def through_blocks(model: Model, writer: Writer, progress: Progress) -> dict[int, float]:
    """Reads and writes one block after the other; the seconds of every block done here."""
    seconds: dict[int, float] = {}
    before = time.perf_counter()
    progress.start(len(model), f"storing as {writer.layout}")
    try:
        for block in model.blocks(writer=writer):
            for linear in block.linears.values():
                linear.recovered = recovered(linear)
            now = time.perf_counter()
            seconds[block.index], before = now - before, now
            progress.block(block.index, block.name, seconds[block.index])
    finally:
        progress.finish()
    return seconds


def recovered(linear: Linear) -> int | None:
    """The weights beyond a 2:4 part; None where there is no such part, or nothing beyond it."""
    held = count(linear.stored)
    return int(held.recovered) if held.recovered and has_base(linear.shape, held) else None
