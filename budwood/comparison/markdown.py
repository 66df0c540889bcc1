"""The results as Markdown: a line for each point, the mean over draws, published figures beside measured ones."""

import statistics
from collections.abc import Sequence
from typing import Any

from budwood import humanize
from budwood.reports.comparison import FIGURES, PublishedFigure, Results, Row

# Not in the Markdown table, unless a published one has them.
LESS = ("same top", "groups", "times", "recovered", "share of dense", "parameters", "peak memory", "D ")
DIGITS = {"perplexity": 2, "D": 3, "KL": 3, "accuracy": 3, "repetition": 2, "bits per weight": 3, "seconds": 0}


def markdown(results: Results) -> str:
    """Title, a table with the mean over draws, failures, published figures, conditions."""
    rows = results["rows"]
    parts = [f"# {cell(results['title'])}", results["description"].strip(), *table(results)]
    failed = [row for row in rows if row["status"] == "failed"]
    waiting = sum(row["status"] == "waiting" for row in rows)
    parts += [f"- {cell(row['label'])} (draw {row['draw']}) failed: {cell(row['error'] or '')}" for row in failed]
    if waiting:
        parts.append(f"{waiting} of {len(rows)} runs are not finished yet.")
    parts += [published(results), conditions(results), *(cell(note) for note in results["notes"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(results: Results) -> list[str]:
    """The measured figures, and the published ones of the same model and method beside them."""
    rows = [row for row in results["rows"] if row["status"] != "waiting" and row["figures"]]
    if not rows:
        return ["Nothing is measured yet."]
    settings = [name for name in results["columns"] if name not in ("draw", "label")]
    wanted = {known["figure"] for known in results["published"]}
    figures = [name for name in figures_of(rows) if not name.startswith(LESS) or name == "D" or name in wanted]
    beside = [name for name in figures if any(_published(results, row, name) is not None for row in rows)]
    head = ["method", *settings, *(part for name in figures for part in heads(name, name in beside))]
    lines = [line_of(head), line_of(["---", *["---:"] * (len(head) - 1)])]
    for same in points(rows):
        first = same[0]
        values: list[str] = [cell(first["row"])]
        values += [cell(str(first["source"] if n == "source" else first["settings"].get(n, ""))) for n in settings]
        for name in figures:
            values.append(spread([row["figures"][name] for row in same if name in row["figures"]], name))
            if name in beside:
                value = _published(results, first, name)
                values.append("" if value is None else f"{value:.{digits_of(name)}f}")
        lines.append(line_of(values))
    return ["\n".join(lines)]


def heads(name: str, beside: bool) -> list[str]:
    return [cell(name), f"{cell(name)}, published"] if beside else [cell(name)]


def points(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each point, which differ in the draw only."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["source"], row["label"]), []).append(row)
    return list(found.values())


def _published(results: Results, row: Row, figure: str) -> float | None:
    """The published figure of the same model, method and settings."""
    found = (known["value"] for known in results["published"] if known["figure"] == figure and measured(known, row))
    return next(found, None)


def measured(known: PublishedFigure, row: Row) -> bool:
    """Whether a row has the figure of the same model, method and settings."""
    own = known.get("settings") or {}
    same = (known.get("source"), known.get("row")) == (row["source"], row["row"])
    return same and known["figure"] in row["figures"] and all(row["settings"].get(k) == v for k, v in own.items())


def published(results: Results) -> str:
    """Published figures that stand beside no measured one, a table for each published table."""
    found = [known for known in results["published"] if not any(measured(known, row) for row in results["rows"])]
    parts = []
    for title in dict.fromkeys(known["table"] for known in found):
        own = [known for known in found if known["table"] == title]
        options = list(dict.fromkeys(name for known in own for name in known.get("settings") or {}))
        figures = list(dict.fromkeys(known["figure"] for known in own))
        lines: dict[tuple[Any, ...], dict[str, float]] = {}
        for known in own:
            settings = known.get("settings") or {}
            key = (known["model"], known["method"], *(settings.get(name, "") for name in options))
            lines.setdefault(key, {})[known["figure"]] = known["value"]
        text = [line_of(["model", "method", *options, *figures])]
        text.append(line_of(["---", "---", *["---:"] * (len(options) + len(figures))]))
        for key, values in lines.items():
            text.append(line_of([*map(str, key), *(str(values.get(name, "")) for name in figures)]))
        where = own[0].get("conditions")
        parts.append(f"Published: {cell(title)}{f' ({cell(where)})' if where else ''}\n\n" + "\n".join(text))
    return "\n\n".join(parts)


def conditions(results: Results) -> str:
    """On what the figures depend: texts, windows, dtype, machine, versions."""
    done = [row for row in results["rows"] if row["machine"]]
    if not done:
        return ""
    recipe, machine = results["recipe"], done[-1]["machine"]
    calibration = recipe.get("calibration", {})
    parts = []
    if calibration.get("data"):
        parts.append(
            f"calibration {calibration['data']}, {calibration['num_samples']} x {calibration['seq_length']}, "
            f"{calibration['sampling']}"
        )
    for name, text in recipe.get("evaluate", {}).get("texts", {}).items():
        limit = f"first {text['limit']} windows" if text.get("limit") else "all windows"
        parts.append(f"{name}: {text['data']}, {text['variant']}, {limit} of {text['seq_length']}")
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items() if version)
    parts.append(f"{machine.get('processor')} ({machine.get('instructions')}), {machine.get('threads')} threads")
    parts.append(versions)
    return cell("; ".join(parts)) + "."


def spread(values: Sequence[float], figure: str) -> str:
    """The mean, and the standard deviation of several draws."""
    if not values:
        return ""
    if key_of(figure) == "bytes":
        return humanize.size(statistics.fmean(values))
    digits = digits_of(figure)
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ({statistics.stdev(values):.{digits}f})"


def digits_of(figure: str) -> int:
    return DIGITS.get(key_of(figure).removesuffix(" NAME"), 2 if "times" in figure else 4)


def line_of(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def cell(text: str) -> str:
    """Text of a recipe or an error, which must break no table and bring no HTML."""
    flat_text = " ".join(str(text).split())
    return flat_text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def figures_of(rows: Sequence[Row]) -> list[str]:
    """The figures that some row has, in the order of FIGURES."""
    found = list(dict.fromkeys(name for row in rows for name in row["figures"]))
    order = list(FIGURES)
    return sorted(found, key=lambda name: order.index(key_of(name)))


def key_of(figure: str) -> str:
    """The key of FIGURES that a figure is an instance of."""
    return (
        figure
        if figure in FIGURES
        else max((k for k in FIGURES if k.endswith(" NAME") and figure.startswith(k[:-4])), key=len)
    )
