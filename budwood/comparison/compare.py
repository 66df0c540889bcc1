"""`budwood compare`: a recipe checked, planned, and carried out run by run into a folder that any later call continues.

comparison = Comparison.read("wrp-smollm2.yaml", "out")
with comparison.claimed():
    comparison.bring()
    results = comparison.run()
"""

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from budwood.checkpoints.files import write_text
from budwood.comparison.estimate import Estimate, disk, estimates
from budwood.comparison.presence import check_files, check_packages
from budwood.comparison.published import matched
from budwood.comparison.recipe import Recipe, read_recipe_file
from budwood.comparison.rows import columns_of, rows_of
from budwood.comparison.runs import Run, runs_of
from budwood.comparison.sources import FOLDER as SOURCES
from budwood.comparison.sources import DenseModel, bring, look
from budwood.comparison.tables import write_tables
from budwood.comparison.task import RUNS, SPEED, Task, task_of
from budwood.comparison.workers import run_all
from budwood.environment import installed
from budwood.errors import UsageError
from budwood.pages.page import DEFAULT as PAGE
from budwood.pages.page import report
from budwood.progress import Progress, Silent
from budwood.reports.comparison import FILE, SCHEMA, Results, write_results
from budwood.runs.target import Target

RECIPE = "recipe.yaml"  # the text of the recipe as it was run last


class Comparison:
    """A recipe and the folder of its results. models: the sources of the recipe by name, as far as they are here."""

    def __init__(self, recipe: Recipe, out: Path, jobs: int, keep: bool, progress: Progress, trust: bool = False):
        self.recipe, self.out, self.jobs, self.keep, self.progress = recipe, out, jobs, keep, progress
        self.runs: list[Run] = runs_of(recipe)
        if not trust:
            self.refuse_code()
        self.models: dict[str, DenseModel] = {}
        self.tasks: dict[str, Task] = {}
        for name in self.used:
            self.models[name] = look(name, recipe.fields.sources[name], out)

    @classmethod
    def read(
        cls,
        recipe: str | Path | Recipe,
        out: str | Path,
        *,
        variables: Mapping[str, str] | None = None,
        jobs: int = 1,
        keep_models: bool | None = None,
        trust_remote_code: bool = False,
        progress: Progress | None = None,
    ) -> "Comparison":
        """Reads and checks everything; nothing is written.

        recipe: a YAML file, or one that is read already. variables: values for those of the recipe. jobs: runs at a
        time, each in a process of its own; 0 runs one after the other in this process. keep_models: whether pruned
        models stay once their figures are kept; None: as the recipe says. trust_remote_code: whether the code of those
        sources is run for which the recipe asks for it. Raises UsageError, with the line of the recipe, for what cannot
        be.
        """
        if jobs < 0:
            raise UsageError(f"jobs is the number of runs at a time, or 0 for none beside this process; got {jobs}")
        found = recipe if isinstance(recipe, Recipe) else read_recipe_file(recipe, variables)
        check_packages(found)
        check_files(found)
        folder = Path(out).expanduser()
        check_folder(folder)
        keep = found.fields.keep_models if keep_models is None else keep_models
        return cls(found, folder, jobs, keep, progress or Silent(), trust_remote_code)

    def refuse_code(self) -> None:
        """Raises UsageError where the recipe, which anyone may have written, would run the code of a source."""
        for name in self.used:
            if self.recipe.fields.sources[name].trust_remote_code:
                raise self.recipe.document.error(
                    ("sources", name),
                    f"{name} is to run code that comes with it, which a recipe alone cannot ask for; read that code, "
                    "and give --trust-remote-code (trust_remote_code=True) if you trust it",
                )

    @property
    def used(self) -> list[str]:
        """The names of the sources that some run uses."""
        return list(dict.fromkeys(run.source for run in self.runs))

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Holds the folder: no other process writes to it. Raises UsageError where one does."""
        held = Target.claim(self.out)
        try:
            yield
        finally:
            held.release()

    @property
    def is_here(self) -> bool:
        """Whether all sources are here with their weights, so that everything can be planned before it begins."""
        return all(model.complete for model in self.models.values())

    def bring(self) -> None:
        """Fetches and converts the sources, and finds what is finished. Raises UsageError for runs that are others."""
        for name in self.used:
            if not self.models[name].complete:
                self.progress.note(f"{name}: {self.recipe.fields.sources[name].model} is brought here first")
                self.models[name] = bring(name, self.recipe.fields.sources[name], self.out)
        self.find_tasks()

    def find_tasks(self) -> None:
        """The runs as tasks. Raises UsageError where a folder of one of them holds another run."""
        for run in self.runs:
            task = task_of(self.recipe, run, self.models[run.source], self.out, self.keep)
            difference = task.difference()
            if difference is not None:
                raise self.recipe.document.error(
                    run.place,
                    f"{task.folder} holds another run: {difference}; name the row otherwise, delete that folder, or "
                    "give another folder",
                )
            self.tasks[run.name] = task

    def plan(self) -> dict[str, Any]:
        """Every run with estimated time and disk space, JSON-plain; None where a source is not here yet."""
        if not self.tasks and self.is_here:
            self.find_tasks()
        done = {
            name: sum(float((task.record(step) or {}).get("seconds", 0)) for step in task.steps)
            for name, task in self.tasks.items()
            if not task.missing()
        }
        found = estimates(self.recipe, self.runs, self.models, done)
        return {
            "title": self.recipe.fields.title,
            "runs": [estimate.to_json() for estimate in found],
            "waiting": sum(not estimate.done for estimate in found),
            "seconds": self.seconds(found),
            "disk": disk(found, self.keep, self.jobs),
            "disk_free": free(self.out),
            "keep_models": self.keep,
            "missing": [name for name, model in self.models.items() if model.path is None],
        }

    def seconds(self, found: Sequence[Estimate]) -> float | None:
        """Seconds of forward passes of all runs that are not finished; None where one is unknown."""
        waiting = [estimate.seconds for estimate in found if not estimate.done]
        known = [seconds for seconds in waiting if seconds is not None]
        return sum(known) if len(known) == len(waiting) else None

    def run(self) -> Results:
        """Carries out what is missing; the results, which are also written to the folder after every run.

        A failed run is recorded in them and the rest continues. KeyboardInterrupt passes through; the results are then
        written as far as they are.
        """
        results = self.write()
        write_text(self.out / RECIPE, self.recipe.document.text)
        waiting = [task for task in self.tasks.values() if task.missing()]
        timed = [task for task in waiting if SPEED in task.steps]
        try:
            if self.jobs > 1 and timed:  # timings are taken when nothing else runs
                run_all(waiting, self.jobs, False, self.progress, self.ended)
                # A run that failed before is not tried again here.
                ready = [task for task in timed if task.missing() == [SPEED]]
                run_all(ready, 1, True, self.progress, self.ended)
            else:
                run_all(waiting, self.jobs, True, self.progress, self.ended)
            for task in self.tasks.values():
                if not task.missing() and not task.keep and task.kind != "dense":
                    shutil.rmtree(task.model, ignore_errors=True)  # kept by an earlier call, or half deleted
        finally:
            results = self.write()
        return results

    def page(self) -> None:
        """Writes `report.html`; where it cannot be drawn a note says why, for the figures are there."""
        try:
            report([self.out], self.out / PAGE)
        except UsageError as error:
            self.progress.note(str(error))

    def ended(self, task: Task, sentence: str | None) -> None:
        if sentence is not None:
            self.progress.note(f"{task.name} failed: {sentence}")
        results = self.write()
        left = sum(row["status"] != "done" for row in results["rows"])
        self.progress.note(f"{len(results['rows']) - left} of {len(results['rows'])} runs are done")

    def write(self) -> Results:
        """Writes the results as they are now."""
        results = self.results()
        write_results(self.out, results)
        write_tables(self.out, results)
        return results

    def results(self) -> Results:
        fields = self.recipe.fields
        rows = rows_of(self.runs, self.tasks, self.models)
        dense = any(row["kind"] == "dense" for row in rows)
        return {
            "schema": SCHEMA,
            "budwood": installed("budwood"),
            "title": fields.title,
            "description": fields.description,
            "recipe": fields.model_dump(),
            "sources": {name: model.record() for name, model in self.models.items()},
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "complete": all(row["status"] == "done" for row in rows),
            "columns": columns_of(rows),
            "rows": rows,
            "published": matched(self.recipe.published, rows),
            "notes": [] if dense else ["There is no dense row, so D is not known."],
        }


def check_folder(out: Path) -> None:
    """Raises UsageError where the folder is a file, or holds what no comparison wrote."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; give a folder")
    names = {entry.name for entry in out.iterdir() if not entry.name.startswith(".")} if out.is_dir() else set()
    if names - {RUNS, SOURCES} and FILE not in names:
        raise UsageError(f"{out} is not empty and holds no comparison; give another folder")


def free(out: Path) -> int:
    """Bytes that are free where the folder is, or will be."""
    place = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    return shutil.disk_usage(place).free


def compare(
    recipe: str | Path,
    out: str | Path,
    *,
    variables: Mapping[str, str] | None = None,
    jobs: int = 1,
    keep_models: bool | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Results:
    """Carries out a recipe into the folder `out`: every method on every source and draw, evaluated and timed.

    The same call continues after any interruption, also when rows were added to the recipe; finished runs are never
    done again. See `Comparison.read` for the arguments. A run that fails is a row with status "failed". Raises
    UsageError for recipes that cannot be, before anything is written.
    """
    comparison = Comparison.read(
        recipe,
        out,
        variables=variables,
        jobs=jobs,
        keep_models=keep_models,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    planned = comparison.plan() if comparison.is_here else None  # refuses what cannot be applied, with the line
    with comparison.claimed():
        comparison.bring()
        if not planned:
            comparison.plan()
        return comparison.run()
