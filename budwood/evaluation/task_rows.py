"""Where the rows of zero-shot tasks come from: a folder of JSONL files, a package of the index, or the hub.

`dataset` is what the task files of `harness.py` name in place of a data set of the hub.
"""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from budwood.demo_assets import TASK_ROWS
from budwood.environment import installed
from budwood.errors import UsageError

SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class LocalTask:
    """One task of lm-evaluation-harness whose rows can be read without the hub."""

    base: str  # the stock task file, inside lm_eval/tasks
    split: str  # that is evaluated
    file: str  # name of the rows in a folder, without suffix
    arrow: str | None = None  # folder of the rows in the package
    requests: str | None = None  # evaluation requests in the package, from which rows are taken where it has none


TASKS = {
    "piqa": LocalTask("piqa/piqa.yaml", "validation", "piqa_validation", "piqa/plain_text/validation"),
    "hellaswag": LocalTask(
        "hellaswag/hellaswag.yaml", "validation", "hellaswag_validation", "hellaswag/none/validation"
    ),
    "winogrande": LocalTask(
        "winogrande/default.yaml",
        "validation",
        "winogrande_xl_validation",
        "winogrande/winogrande_xl/validation",
    ),
    "openbookqa": LocalTask(
        "openbookqa/openbookqa.yaml", "test", "openbookqa_test", requests="openbookqa/test_rc_5shot"
    ),
    "rte": LocalTask("glue/rte/default.yaml", "validation", "rte_validation", "glue/rte/validation"),
    "arc_easy": LocalTask("arc/arc_easy.yaml", "test", "arc_easy_test", requests="arc_easy/test_rc_5shot"),
    "arc_challenge": LocalTask(
        "arc/arc_challenge.yaml", "test", "arc_challenge_test", requests="arc_challenge/test_rc_5shot"
    ),
    "boolq": LocalTask(
        "super_glue/boolq/default.yaml",
        "validation",
        "boolq_validation",
        requests="boolq/rc_0shot",
    ),
}


@dataclass(frozen=True)
class Rows:
    """Where the rows of a task are: a folder of JSONL files, or that of the package."""

    folder: Path
    name: str  # as results record it


def rows_of(names: Sequence[str], folder: Path | None) -> dict[str, Rows]:
    """Where the rows of each task are; tasks that are not in the answer come from the hub.

    folder: of JSONL files; None: the package is used where it is installed. Raises UsageError where a task is named
    twice or not at all, or the folder lacks a task.
    """
    if not names or not all(names):
        raise UsageError(f"no task is named; give some of {', '.join(TASKS)}, or others of lm-evaluation-harness")
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"the task {name} is named twice")
    if folder is None:
        found = package()
        return {} if found is None else {name: found for name in names if name in TASKS}
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}; give the one that holds the rows of the tasks as JSONL files")
    for name in names:
        if name not in TASKS:
            raise UsageError(f"rows of {name} cannot be read from a folder; the tasks that can are {', '.join(TASKS)}")
        if in_folder(folder, name) is None:
            raise UsageError(
                f"{folder} holds no rows of {name}; they are expected in {TASKS[name].file}.jsonl or .jsonl.gz"
            )
    return {name: Rows(folder, str(folder)) for name in names}


def require_harness() -> None:
    """UsageError with the command that installs lm-evaluation-harness, where it is missing."""
    if find_spec("lm_eval") is None:
        raise UsageError('zero-shot tasks need lm-evaluation-harness; run: pip install "budwood[eval]"')


def package() -> Rows | None:
    """The package with rows; None where it is not installed."""
    try:
        folder = TASK_ROWS.locate().parent
    except UsageError:
        return None
    return Rows(folder, f"package {TASK_ROWS.distribution} {installed(TASK_ROWS.distribution) or TASK_ROWS.version}")


def in_folder(folder: Path, task: str, split: str | None = None) -> Path | None:
    """The file of a task's rows in a folder; None where there is none. split: another one than the evaluated."""
    known = TASKS[task]
    name = known.file if split is None else f"{known.file.removesuffix(known.split)}{split}"
    return next((folder / f"{name}{suffix}" for suffix in SUFFIXES if (folder / f"{name}{suffix}").is_file()), None)


def dataset(task: str, source: str, **_: Any) -> Any:
    """The rows of a task by split, a `datasets.DatasetDict`: called by the harness for the task files of `harness.py`.

    source: a folder of JSONL files, or the folder of the package.
    """
    from datasets import Dataset, DatasetDict, load_from_disk

    known, folder = TASKS[task], Path(source)
    if file := in_folder(folder, task):
        found = {known.split: table(file)}
        if examples := in_folder(folder, task, "train"):
            found["train"] = table(examples)
        return DatasetDict(found)
    if known.arrow:  # in memory: what is computed from rows must not be written beside them
        rows = load_from_disk(str(folder / "hf_datasets" / known.arrow), keep_in_memory=True)
        return DatasetDict({known.split: rows})
    requests = folder / "oe_eval_tasks" / str(known.requests) / "requests.jsonl.gz"
    return DatasetDict({known.split: Dataset.from_list(list(rows_of_requests(requests, task)))})


def json_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file with one JSON object a line. Raises UsageError with the line that is none."""
    from budwood.data.files import lines, parse_row  # which imports torch

    try:
        for number, line in lines(file, str(file)):
            if line.strip():
                yield parse_row(line, f"{file}, line {number}")[1]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read as rows of a task: {error}") from error


def table(file: Path) -> Any:
    """The rows of a file as a `datasets.Dataset`. Raises UsageError where they do not have the same fields."""
    from datasets import Dataset

    rows = list(json_rows(file))
    try:
        return Dataset.from_list(rows)
    except Exception as error:  # of pyarrow and datasets, by what differs
        reason = " ".join(str(error).split())
        raise UsageError(f"the rows of {file} do not fit together ({reason}); give each the same fields") from error


def rows_of_requests(file: Path, task: str) -> Iterator[dict[str, Any]]:
    """The rows that evaluation requests were made of, each once, without the frame of the prompt."""
    seen = set()
    for request in json_rows(file):
        document = request["doc"]
        key = document.get("id", request["doc_id"])
        if key in seen:
            continue
        seen.add(key)
        query = document["query"].removesuffix("\nAnswer:")
        if task == "boolq":
            passage, _, question = query.rpartition("\nQuestion: ")
            answer = document["choices"][document["gold"]].strip()
            yield {"question": question.removesuffix("?"), "passage": passage, "label": int(answer == "yes")}
            continue
        letters = [chr(ord("A") + place) for place in range(len(document["choices"]))]
        yield {
            "id": document["id"],
            "question_stem" if task == "openbookqa" else "question": query.removeprefix("Question: "),
            "choices": {"text": document["choices"], "label": letters},
            "answerKey": letters[document["gold"]],
        }
