"""Under which conditions a figure was measured, as one line each; equal lines are one footnote of the page."""

from collections.abc import Mapping
from typing import Any

from budwood import humanize
from budwood.pages.shown import Shown, mapping
from budwood.pages.text import number


class Footnotes:
    """Lines with numbers from 1, in the order of their first use."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    @property
    def lines(self) -> list[str]:
        return list(self._numbers)

    def mark(self, line: str | None) -> int | None:
        """The number of a line; None for no line."""
        if not line:
            return None
        return self._numbers.setdefault(line, len(self._numbers) + 1)


def joined(*parts: object) -> str:
    return " · ".join(str(part) for part in parts if part not in (None, "", {}))


def counted(number: float, what: str) -> str:
    """`1 thread`, `2 threads`."""
    return f"{number:,.0f} {what}" if number == 1 else f"{number:,.0f} {what}s"


def machine_text(machine: Any) -> str:
    found = mapping(machine)
    threads = number(found.get("threads"))
    return joined(
        found.get("accelerator") or found.get("processor"),
        found.get("instructions"),
        counted(threads, "thread") if threads else None,
    )


def versions_text(versions: Any, budwood: object = None) -> str:
    found = {"budwood": budwood, **mapping(versions)}
    return ", ".join(f"{name} {version}" for name, version in found.items() if version)


def text_conditions(result: Mapping[str, Any]) -> str:
    """Of a result on windows of a text."""
    text = mapping(result.get("text"))
    windows, length = number(text.get("windows")), number(text.get("seq_length"))
    return joined(
        text.get("data"),
        text.get("variant"),
        f"{counted(windows, 'window')} of {length:,.0f} tokens" if windows and length else None,
        f"bos {text['bos']}" if text.get("bos") else None,
        f"tokens {str(text['sha256'])[:12]}" if text.get("sha256") else None,
        computed(result),
    )


def task_conditions(result: Mapping[str, Any]) -> str:
    """Of a task of lm-evaluation-harness."""
    items, shots = number(result.get("items")), number(result.get("shots"))
    return joined(
        f"{result.get('task')}, version {result.get('version')}",
        result.get("metric"),
        f"{items:,.0f} items" if items else None,
        f"{shots:.0f} shots" if shots is not None else None,
        result.get("rows"),
        computed(result),
    )


def computed(result: Mapping[str, Any]) -> str:
    conditions = mapping(result.get("conditions"))
    return joined(
        conditions.get("dtype"),
        conditions.get("device"),
        machine_text(conditions.get("machine")),
        versions_text(conditions.get("versions")),
        conditions.get("created"),
    )


def sizes(model: Shown) -> str:
    """Of counted figures: bits, bytes, densities."""
    if not model.report:
        return "counted, from the shapes and the dtype of the model"
    return joined(
        "counted from the written files",
        f"stored as {model.report.get('dtype')}, {model.report.get('format')}",
    )


def pruning(model: Shown) -> str | None:
    """Of the time and memory of pruning and of what depends on its calibration text."""
    report = model.report
    if not report:
        return joined(machine_text(model.machine), versions_text(model.machine.get("versions"))) or None
    data = mapping(report.get("data"))
    windows, length = number(data.get("num_samples")), number(data.get("seq_length"))
    return joined(
        f"calibrated on {data.get('data') or data.get('name')}" if data else "no calibration",
        f"{counted(windows, 'window')} of {length:,.0f} tokens, {data.get('sampling')}" if windows and length else None,
        f"draw {data['seed']}" if "seed" in data else None,
        f"text {str(data['sha256'])[:12]}" if data.get("sha256") else None,
        f"computed in {report.get('compute_dtype')}",
        machine_text(report.get("machine")),
        versions_text(report.get("versions"), report.get("budwood")),
        report.get("created"),
    )


def speed(model: Shown) -> str | None:
    found = mapping(model.speed)
    if not found:
        return None
    whole = mapping(found.get("model"))
    return joined(
        f"{whole['prompt']} + {whole['new_tokens']} tokens" if "prompt" in whole and "new_tokens" in whole else None,
        found.get("dtype"),
        found.get("kernels"),
        machine_text(found.get("machine")),
        f"peak memory {humanize.size(number(found['peak_memory']))}" if number(found.get("peak_memory")) else None,
        versions_text(found.get("versions")),
        "medians of rounds in turns",
    )


def of_figure(model: Shown, key: str) -> str | None:
    """The conditions of one figure of a model."""
    kind, _, name = key.partition(" ")
    if key in ("seconds", "peak memory"):
        return pruning(model)
    if key.endswith("times dense"):
        return speed(model)
    if kind in ("perplexity", "D", "KL", "same", "accuracy", "repetition"):
        return measured(model, kind, name.removeprefix("top "))
    return sizes(model)


def measured(model: Shown, kind: str, name: str) -> str | None:
    wanted = {
        "perplexity": ("perplexity", "divergence"),
        "accuracy": ("task",),
        "repetition": ("repetition",),
    }.get(kind, ("divergence", "perplexity"))
    for result in (each for of_kind in wanted for each in model.of_kind(of_kind)):
        if result.get("kind") == "task":
            if not name or result.get("task") == name:
                return task_conditions(result) if name else computed(result)
        elif not name or name in (mapping(result.get("text")).get("name"), mapping(result.get("text")).get("data")):
            return text_conditions(result)
    return None
