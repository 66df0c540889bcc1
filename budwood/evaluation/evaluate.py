"""Everything that is asked for, measured on one model: texts, the distance from the dense model, tasks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from budwood.data.evaluation import Variant, evaluation_windows
from budwood.data.named import named_texts
from budwood.data.sources import Data
from budwood.data.tokens import Bos
from budwood.data.windows import Windows
from budwood.errors import UsageError
from budwood.evaluation.divergence import check_tokens, measure_divergence
from budwood.evaluation.paired import paired_loss, paired_score
from budwood.evaluation.perplexity import measure_perplexity, note_on_bos
from budwood.evaluation.repetition import CONTINUATIONS, PROMPT, measure_repetition
from budwood.evaluation.subject import Subject
from budwood.evaluation.task_rows import require_harness, rows_of
from budwood.evaluation.tasks import BATCH_SIZE, measure_tasks
from budwood.progress import Progress, Silent
from budwood.reports.result_files import add_results, read_results
from budwood.reports.results import Divergence, Perplexity, Result


def evaluate(
    model: str,
    data: Data | Mapping[str, Data] | None = None,
    *,
    against: str | None = None,
    tasks: str | Sequence[str] = (),
    variant: Variant = "plain",
    seq_length: int = 2048,
    limit: int | None = None,
    bos: Bos = "auto",
    seed: int = 0,
    stream: bool = False,
    continuations: int | None = None,
    tasks_data: str | Path | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = BATCH_SIZE,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> tuple[Result, ...]:
    """The results, which are also added to the report and the model card of a pruned folder.

    model: folder or hub name, dense or pruned. data: one text, or several: see `named_texts`; variant, bos, seed: see
    `evaluation_windows`. against: the dense model; adds the divergence from it on the same tokens, and paired
    differences of losses and tasks. tasks, tasks_data, num_fewshot, batch_size: see `measure_tasks`. limit: the first
    windows of each text and the first items of each task. continuations: number of prompts from the first text that
    are searched for repetition; None: 32 with a dense model, else none. stream: one block in memory at a time, for
    texts only. Raises UsageError for invalid requests, RunError where the work fails.
    """
    progress = progress or Silent()
    tasks = tasks.split(",") if isinstance(tasks, str) else tasks
    check(data, tasks, stream, continuations)
    if tasks:
        rows_of(tasks, folder_of(tasks_data))
        require_harness()
    folder = Path(model).expanduser()
    read_results(folder)  # a damaged report is refused before the minutes of work
    options = {"dtype": dtype, "device": device, "stream": stream, "trust_remote_code": trust_remote_code}
    subject = Subject(model, **options)  # type: ignore[arg-type]
    dense = None if against is None else Subject(against, **options)  # type: ignore[arg-type]
    texts = {} if data is None else named_texts(data)
    how = Reading(variant, min(seq_length, subject.context), limit, bos, seed)
    read = {name: windows_of(subject, dense, text, how) for name, text in texts.items()}
    prompts = None
    count = (0 if dense is None or stream else CONTINUATIONS) if continuations is None else continuations
    if texts and count:
        first = next(iter(texts))
        length = min(PROMPT, subject.context // 2)
        prompts = first, windows_of(subject, dense, texts[first], Reading("plain", length, count, bos, seed))

    results: list[Result] = []
    for name, text in texts.items():
        results += on_text(subject, dense, name, text, read[name], progress)
    if prompts is not None:
        results.append(measure_repetition(subject, prompts[1], prompts[0], dense, progress=progress))
    add_results(folder, results)
    if tasks:
        asked: dict[str, Any] = {
            "folder": folder_of(tasks_data),
            "limit": limit,
            "shots": num_fewshot,
            "batch_size": batch_size,
            "progress": progress,
        }
        scores = measure_tasks(subject, tasks, **asked)
        results += scores
        if dense is not None:
            theirs = {score.task: score for score in measure_tasks(dense, tasks, **asked)}
            results += [paired_score(score, theirs[score.task]) for score in scores]
        add_results(folder, results)
    return tuple(results)


@dataclass(frozen=True)
class Reading:
    """How windows are cut from a text: the options of `evaluation_windows`."""

    variant: Variant
    seq_length: int
    limit: int | None
    bos: Bos
    seed: int


def check(data: Any, tasks: Sequence[str], stream: bool, continuations: int | None) -> None:
    """UsageError where nothing is asked for, or what cannot be."""
    if data is None and not tasks:
        raise UsageError("nothing to measure: give a text with --data, or tasks with --tasks")
    if tasks and stream:
        raise UsageError("--tasks needs the whole model in memory; leave out --stream, or the tasks")
    if continuations and stream:
        raise UsageError("--continuations needs the whole model in memory; leave out --stream, or the continuations")
    if continuations and data is None:
        raise UsageError("--continuations needs a text whose starts are continued; give one with --data")


def folder_of(tasks_data: str | Path | None) -> Path | None:
    return None if tasks_data is None else Path(tasks_data).expanduser()


def windows_of(subject: Subject, dense: Subject | None, text: Data, how: Reading) -> Windows:
    """The windows of a text by the model's tokenizer, which the dense model's must agree with."""
    tokenizer = subject.tokenizer(text)
    windows = evaluation_windows(text, tokenizer, **vars(how))
    if dense is not None:
        check_tokens(dense, text, windows, **vars(how))
    return windows


def on_text(
    subject: Subject, dense: Subject | None, name: str, text: Data, windows: Windows, progress: Progress
) -> list[Result]:
    """Perplexity on one text; with a dense model also the divergence and the paired difference of losses."""
    tokenizer = subject.tokenizer(text)
    if dense is None:
        return [measure_perplexity(subject, windows, name, tokenizer, progress)]
    divergence = measure_divergence(subject, dense, windows, name, progress)
    note = note_on_bos(subject, windows.ids, tokenizer)
    ours = perplexity_of(divergence, divergence.model, divergence.losses, subject.stream, note)
    theirs = perplexity_of(divergence, divergence.against, divergence.dense_losses, dense.stream)
    return [ours, divergence, paired_loss(ours, theirs)]


def perplexity_of(
    divergence: Divergence, model: str, losses: tuple[float, ...], stream: bool, note: str | None = None
) -> Perplexity:
    """The perplexity of one of the two models of a divergence."""
    return Perplexity(
        model=model,
        text=divergence.text,
        losses=losses,
        conditions=divergence.conditions,
        streamed=stream,
        notes=(note,) if note else (),
    )
