"""The evaluations of one run by the name of their step: what each finds, as the record of the step has it."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from budwood.benchmarking import bench
from budwood.comparison.task import REPETITION, SPEED, TASKS, Task
from budwood.data.evaluation import evaluation_windows
from budwood.data.windows import Windows
from budwood.evaluation.divergence import check_tokens, measure_divergence
from budwood.evaluation.perplexity import measure_perplexity
from budwood.evaluation.repetition import measure_repetition
from budwood.evaluation.subject import Subject
from budwood.evaluation.tasks import measure_tasks
from budwood.progress import Progress
from budwood.reports.result_json import to_json
from budwood.reports.results import Result

Settings = dict[str, Any]
DENSE = "dense"  # what results call the dense model


class Subjects:
    """The model of a run and its dense one, each loaded at the first use for all evaluations."""

    def __init__(self, task: Task, progress: Progress):
        self.task, self.progress = task, progress

    @cached_property
    def own(self) -> Subject:
        return self.dense if self.task.kind == "dense" else self.opened(self.task.model)

    @cached_property
    def dense(self) -> Subject:
        return self.opened(self.task.dense)

    def opened(self, folder: Path) -> Subject:
        dtypes = {str(step["dtype"]) for name, step in self.task.steps.items() if "dtype" in step and name != SPEED}
        return Subject(
            str(folder),
            dtype=next(iter(dtypes), "auto"),
            device=self.task.device,
            stream=self.task.stream,
            trust_remote_code=self.task.trust_remote_code,
        )

    def record(self, results: Sequence[Result]) -> dict[str, Any]:
        """The results under the label of the run in place of a folder."""
        names = {"model": self.task.label, **({"against": DENSE} if self.task.kind != "dense" else {})}
        found: list[Any] = []
        for result in results:
            known = {field.name for field in dataclasses.fields(result)}
            if getattr(result, "against", None) is None:
                known -= {"against"}
            changed: Any = {name: value for name, value in names.items() if name in known}
            found.append(dataclasses.replace(result, **changed))
        return {"results": [to_json(result) for result in found]}


def windows_of(subject: Subject, asked: Settings, **changed: Any) -> Windows:
    """The windows of a text of the recipe."""
    options = reading(subject, asked) | changed
    return evaluation_windows(asked["data"], subject.tokenizer(asked["data"]), **options)


def reading(subject: Subject, asked: Settings) -> dict[str, Any]:
    options = {name: asked[name] for name in ("variant", "limit", "bos", "seed")}
    return {**options, "seq_length": min(asked["seq_length"], subject.context)}


def perplexity(models: Subjects, asked: Settings) -> dict[str, Any]:
    tokenizer = models.own.tokenizer(asked["data"])
    windows = windows_of(models.own, asked)
    return models.record([measure_perplexity(models.own, windows, asked["name"], tokenizer, models.progress)])


def divergence(models: Subjects, asked: Settings) -> dict[str, Any]:
    windows = windows_of(models.own, asked)
    check_tokens(models.dense, asked["data"], windows, **reading(models.own, asked))
    return models.record([measure_divergence(models.own, models.dense, windows, asked["name"], models.progress)])


def repetition(models: Subjects, asked: Settings) -> dict[str, Any]:
    length = min(asked["prompt"], models.own.context // 2)
    prompts = windows_of(models.own, asked, seq_length=length, limit=asked["continuations"], variant="plain")
    found = measure_repetition(models.own, prompts, asked["name"], new_tokens=asked["new"], progress=models.progress)
    return models.record([found])


def tasks(models: Subjects, asked: Settings) -> dict[str, Any]:
    found = measure_tasks(
        models.own,
        asked["names"],
        folder=None if asked["data"] is None else Path(asked["data"]),
        limit=asked["limit"],
        shots=asked["num_fewshot"],
        batch_size=models.task.batch_size,
        progress=models.progress,
    )
    return models.record(found)


def speed(models: Subjects, asked: Settings) -> dict[str, Any]:
    return {"speed": bench(models.task.model, models.task.dense, progress=models.progress, **asked)}


MEASURES: dict[str, Callable[[Subjects, Settings], dict[str, Any]]] = {
    "perplexity": perplexity,
    "divergence": divergence,
    REPETITION: repetition,
    TASKS: tasks,
    SPEED: speed,
}
