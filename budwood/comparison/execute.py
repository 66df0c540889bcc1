"""One run carried out: pruned, evaluated, timed; each step is recorded when it is finished and never done again."""

import os
import shutil
import time
import traceback
from typing import Any

from budwood.checkpoints.files import write_json
from budwood.comparison.measure import MEASURES, Subjects
from budwood.comparison.rounding import Rtn, parse_row
from budwood.comparison.task import PRUNE, SPEED, Task, begin
from budwood.environment import installed, machine
from budwood.errors import DEBUG, RunError, message
from budwood.progress import Progress
from budwood.pruning import prune
from budwood.runs.recipe import FILE, read_recipe
from budwood.runs.target import Target

ERROR = "error.json"  # why the last attempt failed
VERSIONS = ("budwood", "torch", "transformers", "lm_eval")


def execute(task: Task, progress: Progress, speed: bool = True) -> str | None:
    """Carries out what is missing of a run; the sentence of its failure, or None.

    speed: False leaves the timing for a later call, when nothing else runs. The model goes when all is finished and it
    is not to be kept. KeyboardInterrupt passes through; whatever else is raised is recorded in the folder of the run.
    """
    held = None
    try:
        held = Target.claim(task.folder)
        begin(task)
        (task.folder / ERROR).unlink(missing_ok=True)
        models = Subjects(task, progress)
        for step in task.missing():
            if step == SPEED:
                models = Subjects(task, progress)  # those in memory go
            if speed or step != SPEED:
                carry_out(step, models)
        if not task.missing() and not task.keep and task.kind != "dense":
            shutil.rmtree(task.model, ignore_errors=True)
        return None
    except Exception as error:
        if os.environ.get(DEBUG, "0") not in ("", "0"):
            traceback.print_exc()
        sentence = message(error)
        write_json(task.folder / ERROR, {"error": sentence})
        return sentence
    finally:
        if held is not None:
            held.release()


def carry_out(step: str, models: Subjects) -> None:
    """One step with its record. The model is pruned first where it is not there, or was dropped."""
    task, progress = models.task, models.progress
    progress.note(f"{task.name}: {step}")
    if task.kind != "dense" and (step == PRUNE or not (task.model / "config.json").is_file()):
        report, seconds = pruned(task, progress)
        if task.record(PRUNE) is None:
            task.write(PRUNE, {"seconds": seconds, "report": report, "size": size(task, report), **surroundings()})
        if step == PRUNE:
            return
    start = time.perf_counter()
    found = MEASURES[step.partition(" ")[0]](models, task.steps[step])
    task.write(step, {"seconds": time.perf_counter() - start, **found, **surroundings()})


def pruned(task: Task, progress: Progress) -> tuple[dict[str, Any], float]:
    """The report of the pruned model, and the seconds that this call took."""
    method = parse_row(task.method or "")
    assert method is not None
    options = dict(task.prune)
    if isinstance(method, Rtn):
        options |= {"format": "dense", "values": None}
    start = time.perf_counter()
    report = prune(
        task.dense,
        task.model,
        method,
        task.calibration["data"] if method.calibrated else None,
        num_samples=task.calibration["num_samples"],
        seq_length=task.calibration["seq_length"],
        sampling=task.calibration["sampling"],
        bos=task.calibration["bos"],
        seed=task.draw,
        trust_remote_code=task.trust_remote_code,
        progress=progress,
        **options,
    )
    recipe = read_recipe(task.model / FILE)
    if recipe is None or recipe.source.get("content") != task.identity["source"]["content"]:
        raise RunError(f"{task.dense} was changed during the comparison; give a source that stays as it is")
    return dict(report), time.perf_counter() - start


def size(task: Task, report: dict[str, Any]) -> dict[str, float]:
    """Bytes and bits of the model; of a quantised row, those of its codes and scales."""
    totals, method = report["totals"], parse_row(task.method or "")
    if not isinstance(method, Rtn):
        return {"bytes": totals["bytes"], "bits per weight": totals["bits_per_weight"]}
    matrices = report["linears"].values()
    counted = sum(method.nbytes(tuple(matrix["shape"])) for matrix in matrices)
    rest = totals["bytes"] - sum(matrix["bytes"] for matrix in matrices)
    return {"bytes": rest + counted, "bits per weight": 8 * counted / max(1, totals["in_scope"])}


def surroundings() -> dict[str, Any]:
    return {"machine": {**machine(), "versions": {name: installed(name) for name in VERSIONS}}}
