"""The report of a run as a record, kept in its folder as `report.json`. Sizes in bytes, times in seconds."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from budwood.checkpoints.files import write_json, write_text
from budwood.checkpoints.lock import alone
from budwood.checkpoints.schema import COUNT, FIVE, MATRIX, NONE, NUMBER, PAIR, POSITIVE, Each, Rule
from budwood.checkpoints.sidecars import read_object
from budwood.errors import RunError
from budwood.reports.card import with_speed

FILE = "report.json"
CARD = "README.md"


class Totals(TypedDict):
    """Sums and means over the pruned matrices; `recovered` is weighted by parameters."""

    parameters: int  # of the source
    parameters_after: NotRequired[int]  # fewer where units were removed
    in_scope: int  # weights of the matrices in scope, dense
    coverage: float  # in_scope / parameters
    density: float  # non-zero weights / weights in scope
    recovered: float | None
    recovered_unweighted: float | None  # mean over matrices
    bytes: int  # of all tensors written
    bytes_dense: int
    bits_per_weight: float  # of the matrices in scope, index and all


class BlockReport(TypedDict):
    name: str
    seconds: float | None  # None for a block that an earlier, interrupted run finished
    relative_error: float | None  # of its outputs on the first batch
    units: NotRequired[dict[str, list[int]]]  # by kind: how many stayed, of how many; empty where none were removed


class MatrixReport(TypedDict):
    shape: list[int]  # [out, in]
    format: str
    nonzeros: int
    density: float
    recovered: float | None
    rounding_error: float | None
    change: NotRequired[float | None]  # norm of what the run changed over the norm before; None where the shape changed
    x4: NotRequired[list[int] | None]  # groups of four adjacent inputs that keep 0, 1, 2, 3, 4 weights
    bytes: int


class Report(TypedDict):
    """JSON-plain. Later verbs add sections; what a newer version added is kept as it is."""

    budwood: str | None
    source: str
    method: str
    created: str
    machine: dict[str, Any]
    versions: NotRequired[dict[str, str | None]]
    data: dict[str, Any] | None
    dtype: str
    compute_dtype: str
    format: str
    needs_budwood: NotRequired[bool]  # to load the folder
    totals: Totals
    blocks: list[BlockReport]
    linears: dict[str, MatrixReport]
    seconds: dict[str, float]
    peak_memory: int | None
    peak_device_memory: NotRequired[int | None]  # of tensors on a GPU, where one was used
    notes: list[str]
    training: NotRequired[list[dict[str, Any]]]  # what retrained or reconstructed the model, in order
    speed: NotRequired[dict[str, Any]]  # what `budwood bench` measured
    results: NotRequired[list[dict[str, Any]]]  # what `budwood evaluate` measured, see `results.py`


STEP_AND_LOSS = Rule(
    "a step and its loss", lambda value: type(value) is list and len(value) == 2 and all(map(NUMBER.holds, value))
)
SECONDS = Rule(
    "seconds by name, `total` among them",
    lambda value: type(value) is dict and "total" in value and all(map(NUMBER.holds, value.values())),
)
# What readers use: the table of a verb, the page, the model card, `bench`. Sections are named for messages and tests.
SECTIONS: dict[str, Any] = {
    "totals": {
        "parameters": POSITIVE,
        "parameters_after?": COUNT,
        "in_scope": COUNT,
        "density": NUMBER,
        "recovered": (NUMBER, NONE),
        "bytes": COUNT,
        "bytes_dense": POSITIVE,
        "bits_per_weight": NUMBER,
        "coverage": NUMBER,
    },
    "blocks": [{"name": str, "relative_error": (NUMBER, NONE), "seconds?": (NUMBER, NONE), "units?": Each(PAIR)}],
    "linears": Each(
        {
            "shape": MATRIX,
            "format": str,
            "nonzeros": COUNT,
            "density": NUMBER,
            "recovered": (NUMBER, NONE),
            "bytes": COUNT,
            "rounding_error?": (NUMBER, NONE),
            "change?": (NUMBER, NONE),
            "x4?": (FIVE, NONE),
        }
    ),
    "seconds": SECONDS,
    "notes": [str],
}
SPEED: dict[str, Any] = {
    "machine?": dict,
    "versions?": dict,
    "model?": dict,
    "matrices?": [
        {"shape": MATRIX, "rows": POSITIVE, "seconds": Each(Each(NUMBER)), "times_dense": NUMBER},
    ],
    "peak_memory?": (COUNT, NONE),
    "warnings?": [str],
}
SCHEMA: dict[str, Any] = {
    **SECTIONS,
    "method": str,
    "source": str,
    "format": str,
    "budwood": (str, NONE),
    "created": str,
    "dtype": str,
    "compute_dtype": str,
    "machine": dict,
    "versions?": dict,
    "peak_memory": (COUNT, NONE),
    "peak_device_memory?": (COUNT, NONE),
    "data": (dict, NONE),
    "training?": [
        {
            "trained": COUNT,
            "trained_share": NUMBER,
            "steps?": COUNT,
            "best_step?": COUNT,
            "held_out?": [STEP_AND_LOSS],
            "loss?": [NUMBER],
            "steps_per_loss?": NUMBER,
            "seconds?": NUMBER,
            "state_bytes?": COUNT,
            "blocks?": [{"error_before?": (NUMBER, NONE), "error_after?": (NUMBER, NONE)}],
        }
    ],
    "speed?": SPEED,
    "results?": list,  # each is checked by `result_json.from_json`
}


def read_report(folder: Path) -> Report | None:
    """The report of a folder; None where there is none. Raises RunError where it is damaged."""
    content = read_object(folder / FILE, SCHEMA, "write the folder again, or delete the file")
    return None if content is None else cast(Report, content)


def add_section(folder: Path, name: str, section: Mapping[str, Any] | Sequence[Any]) -> bool:
    """Adds or replaces one section of the report of a folder; False where the folder has no report."""
    known = read_report(folder)
    if known is None:
        return False
    write_json(folder / FILE, {**known, name: dict(section) if isinstance(section, Mapping) else list(section)})
    return True


def add_speed(folder: Path, speed: Mapping[str, Any]) -> None:
    """Puts what `budwood bench` measured into the report and the model card of a folder, where it has them.

    Raises RunError where one of them cannot be read or written, or another process writes to the folder.
    """
    with alone(folder):
        add_section(folder, "speed", speed)
        change_card(folder, lambda card: with_speed(card, speed))


def change_card(folder: Path, change: Callable[[str], str]) -> None:
    """Changes the model card of a folder, where it has one; RunError where it cannot be read or written."""
    card = folder / CARD
    if card.is_file():
        try:
            text = card.read_text("utf-8")
        except (OSError, ValueError) as error:
            raise RunError(f"{card} cannot be read ({error}); delete it, or write the folder again") from error
        write_text(card, change(text))
