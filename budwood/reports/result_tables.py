"""Results as tables of text, for a terminal and for the model card."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from budwood import humanize
from budwood.reports.markdown import escape, table
from budwood.reports.results import (
    Conditions,
    Divergence,
    Pair,
    Perplexity,
    Repetition,
    Result,
    TaskScore,
    Text,
    mean_score,
)

R = TypeVar("R", bound=Result)
NUMBER = re.compile(r"-?\d+\.\d+")
NUMBERS = (1, 6, 8)  # columns of the harness's table: version, value, standard error
ARROWS = {True: "↑", False: "↓", None: ""}


@dataclass(frozen=True)
class ResultTable:
    """One table: its columns, the first of text, and its rows of cells, not escaped."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(results: Sequence[Result]) -> list[ResultTable]:
    """One table for each kind of result that is there; tasks have a form of their own, `harness_table`."""
    made = [
        perplexities(of_kind(results, Perplexity)),
        divergences(of_kind(results, Divergence)),
        repetitions(of_kind(results, Repetition)),
        pairs(of_kind(results, Pair)),
    ]
    return [found for found in made if found.rows]


def of_kind(results: Sequence[Result], kind: type[R]) -> list[R]:
    return [result for result in results if isinstance(result, kind)]


def perplexities(results: Sequence[Perplexity]) -> ResultTable:
    rows = (
        (
            result.text.name,
            f"{result.perplexity:.4f}",
            "-" if result.error is None else f"{result.error:.4f}",
            f"{result.mean_loss:.5f}",
            *described(result.text),
            result.conditions.dtype,
        )
        for result in results
    )
    columns = ("text", "perplexity", "±", "mean loss", "windows", "variant", "bos", "dtype")
    return ResultTable("Perplexity", columns, tuple(rows))


def divergences(results: Sequence[Divergence]) -> ResultTable:
    """The columns of llama.cpp."""
    rows = (
        (
            result.text.name,
            f"{result.kl_mean:.5f} ± {result.kl_error:.5f}",
            f"{result.kl_median:.5f}",
            f"{result.kl_999:.4f}",
            f"{result.ln_ratio:.5f} ± {result.ln_ratio_error:.5f}",
            f"{humanize.share(result.same_top, 3)} ± {humanize.share(result.same_top_error, 3)}",
            humanize.share(result.dp_rms, 3),
            f"{result.dense_perplexity:.4f}",
        )
        for result in results
    )
    columns = (
        "text",
        "KL divergence",
        "median",
        "99.9 %",
        "ln(PPL/PPL dense)",
        "same top token",
        "Δp RMS",
        "PPL dense",
    )
    return ResultTable("Divergence from the dense model", columns, tuple(rows))


def repetitions(results: Sequence[Repetition]) -> ResultTable:
    rows = (
        (
            result.text.name,
            humanize.share(result.share, 1),
            humanize.share(result.dense_share, 1),
            f"{len(result.shares)} x {result.new_tokens} tokens after {result.text.seq_length}",
        )
        for result in results
    )
    return ResultTable("Repeated 4-grams, greedy", ("text", "model", "dense", "continuations"), tuple(rows))


def pairs(results: Sequence[Pair]) -> ResultTable:
    rows = (
        (
            result.subject,
            f"{result.difference:+.5f}",
            "-" if result.low is None else f"{result.low:+.5f} to {result.high:+.5f}",
            "-" if result.p is None else f"{result.p:.2g}",
            f"{result.better} / {result.worse} of {result.count}",
            result.test,
        )
        for result in results
    )
    columns = ("model minus dense, in pairs", "difference", "95 % interval", "p", "better / worse", "test")
    return ResultTable("Paired differences", columns, tuple(rows))


def described(text: Text) -> tuple[str, str, str]:
    """Windows, variant and BOS."""
    return f"{text.windows} x {text.seq_length}", text.variant, text.bos


def harness_table(scores: Sequence[TaskScore]) -> str:
    """The scores as lm-evaluation-harness prints them, padding included."""
    head = ("Tasks", "Version", "Filter", "n-shot", "Metric", "", "Value", "", "Stderr")
    right = (1, 3, 6, 8)
    rows = []
    for score in sorted(scores, key=lambda score: score.task):
        for place, metric in enumerate(score.metrics):
            first = (score.task, score.version) if place == 0 else ("", "")
            error = ("", "") if metric.error is None else ("±", f"{metric.error:.4f}")
            arrow = ARROWS[metric.higher_is_better]
            rows.append([*first, metric.filter, str(score.shots), metric.name, arrow, f"{metric.value:.4f}", *error])
    for column in NUMBERS:
        for row, cell in zip(rows, same_digits([row[column] for row in rows]), strict=True):
            row[column] = cell
    widths = [max(3, *(len(row[column]) for row in (head, *rows))) for column in range(len(head))]
    rule = [("-" * (width - 1) + ":") if column in right else "-" * width for column, width in enumerate(widths)]
    body = [
        [cell.rjust(width) if column in right else cell.ljust(width) for column, (cell, width) in enumerate(zipped)]
        for zipped in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    lines = [[centred(cell, width) for cell, width in zip(head, widths, strict=True)], rule, *body]
    return "\n".join(f"|{'|'.join(line)}|" for line in lines)


def centred(cell: str, width: int) -> str:
    """`cell` in the middle, the odd blank on the right."""
    left = (width - len(cell)) // 2
    return (" " * left + cell).ljust(width)


def same_digits(cells: Sequence[str]) -> list[str]:
    """The numbers of a column with as many decimals as the longest needs; other columns as they are."""
    numbers = [cell for cell in cells if cell]
    if not all(NUMBER.fullmatch(cell) for cell in numbers):
        return list(cells)
    digits = max((len(cell.rstrip("0").partition(".")[2]) for cell in numbers), default=0)
    return [f"{float(cell):.{digits}f}" if cell else "" for cell in cells]


def mean_line(scores: Sequence[TaskScore]) -> str:
    """The mean of several tasks with its error, and the metrics that it is of."""
    value, error = mean_score(scores)
    parts = []
    for metric in dict.fromkeys(score.metric for score in scores):
        parts.append(f"{metric} of {', '.join(score.task for score in scores if score.metric == metric)}")
    spread = "" if error is None else f" ± {error:.4f}"
    return f"mean of {len(scores)}: {value:.4f}{spread} ({'; '.join(parts)})"


def render_results(results: Sequence[Result]) -> str:
    """The section of a model card that `budwood evaluate` fills in. All text is escaped."""
    parts = []
    for found in tables(results):
        rows = [[escape(cell) for cell in row] for row in found.rows]
        parts += [f"**{escape(found.title)}**", table(found.columns, rows)]
    if scores := of_kind(results, TaskScore):
        columns = ("task", "n-shot", "metric", "value", "stderr", "items")
        rows = [
            [
                escape(score.task),
                str(score.shots),
                escape(score.metric),
                f"{score.value:.4f}",
                "-" if score.error is None else f"{score.error:.4f}",
                str(score.items),
            ]
            for score in scores
        ]
        parts += ["**Tasks, by lm-evaluation-harness**", table(columns, rows), f"{escape(mean_line(scores))}."]
    under = dict.fromkeys(conditions_line(result.conditions) for result in results)
    return "\n\n".join([*parts, *(escape(line) for line in under)])


def conditions_line(conditions: Conditions) -> str:
    """Machine, threads, dtype and versions in one line."""
    machine = conditions.machine
    versions = ", ".join(f"{name} {version}" for name, version in conditions.versions.items() if version)
    return (
        f"{machine.get('accelerator') or machine.get('processor')} ({machine.get('instructions')}), "
        f"{conditions.threads} threads, {conditions.dtype}; {versions}."
    )
