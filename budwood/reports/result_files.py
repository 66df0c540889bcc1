"""Results in the report of a model folder: the section `results` of `report.json`, a list."""

from collections.abc import Sequence
from pathlib import Path

from budwood.checkpoints.lock import alone
from budwood.errors import RunError
from budwood.reports.card import with_section
from budwood.reports.hub_results import with_index, write_entries
from budwood.reports.record import FILE, add_section, change_card, read_report
from budwood.reports.result_json import from_json, to_json
from budwood.reports.result_tables import render_results
from budwood.reports.results import Result

SECTION = "results"
HEADING = "## Evaluation"


def read_results(folder: Path) -> tuple[Result, ...]:
    """The results in the report of a folder, in the order in which they were added; none where there is no report.

    Raises RunError where the report is damaged.
    """
    report = read_report(folder)
    section = [] if report is None else report.get("results", [])
    if not isinstance(section, list):
        raise RunError(f"{folder / FILE} is damaged: {SECTION} is no list; delete that section")
    return tuple(from_json(part, f"{folder / FILE}, result {number}") for number, part in enumerate(section, start=1))


def merged(old: Sequence[Result], new: Sequence[Result]) -> list[Result]:
    """Old and new results; of two with the same `key` (kind, data, dtype) the new one."""
    return list({result.key: result for result in (*old, *new)}.values())


def add_results(folder: Path, results: Sequence[Result]) -> bool:
    """Adds the results to the report and the model card of a folder and to `.eval_results`; False without a report.

    Raises RunError where one of them is damaged, or another process writes to the folder.
    """
    if read_report(folder) is None:
        return False
    with alone(folder):
        together = merged(read_results(folder), results)
        add_section(folder, SECTION, [to_json(result) for result in together])
        name = folder.resolve().name
        change_card(
            folder, lambda card: with_index(with_section(card, HEADING, render_results(together)), together, name)
        )
        write_entries(folder, together)
    return True
