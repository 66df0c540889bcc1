"""One model as a page shows it, whether it comes from a pruned folder or from a row of a comparison."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from budwood.pages.text import number

ALPHA = re.compile(r"\balpha=([0-9]*\.?[0-9]+)")
WRP_ALPHA = 0.25  # where an expression gives none
NAME = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True)
class Shown:
    """One model. `figures` has the keys of `reports.comparison.FIGURES`; what was not measured is absent.

    kind: dense, quantised or pruned. family: what pictures draw alike, such as all points of one grid. report,
    results, speed: the records of the verbs, plain JSON, None or empty where there are none. place: where it is from.
    """

    label: str
    kind: str
    source: str
    method: str | None
    family: str
    place: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    draw: int | None = None
    status: str = "done"
    error: str | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    report: Mapping[str, Any] | None = None
    results: Sequence[Mapping[str, Any]] = ()
    speed: Mapping[str, Any] | None = None
    machine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def alpha(self) -> float | None:
        """The alpha of WRP, where that is the method."""
        if not str(self.method or "").startswith("wrp("):
            return None
        if "alpha" in self.settings:
            return number(self.settings["alpha"])
        if found := ALPHA.search(str(self.method)):
            return float(found[1])
        return None if re.search(r"\b(density|block|k)=", str(self.method)) else WRP_ALPHA

    @property
    def linears(self) -> Mapping[str, Mapping[str, Any]]:
        return mapping(mapping(self.report).get("linears"))

    @property
    def blocks(self) -> Sequence[Mapping[str, Any]]:
        blocks = mapping(self.report).get("blocks")
        return [mapping(block) for block in blocks] if isinstance(blocks, list) else []

    @property
    def training(self) -> Sequence[Mapping[str, Any]]:
        sections = mapping(self.report).get("training")
        return [mapping(section) for section in sections] if isinstance(sections, list) else []

    def of_kind(self, kind: str) -> list[Mapping[str, Any]]:
        """The results of one kind: perplexity, divergence, repetition, task, pair."""
        return [result for result in self.results if result.get("kind") == kind]


def mapping(value: Any) -> Mapping[str, Any]:
    """`value` where it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def family_of(method: str | None) -> str:
    """The outermost name of a method's expression."""
    found = NAME.match(str(method or "dense"))
    return found[0] if found else str(method)


def text_name(result: Mapping[str, Any]) -> str:
    """The name of the text of a result."""
    text = mapping(result.get("text"))
    return str(text.get("name") or text.get("data") or "text")


def figures_of(
    report: Mapping[str, Any], results: Sequence[Mapping[str, Any]], speed: Mapping[str, Any] | None
) -> dict:
    """The figures of a pruned folder, by the keys of `reports.comparison.FIGURES`."""
    totals, model = mapping(report.get("totals")), mapping(mapping(speed).get("model"))
    dense = number(totals.get("bytes_dense"))
    found: dict[str, Any] = {
        "bits per weight": totals.get("bits_per_weight"),
        "density": totals.get("density"),
        "recovered": totals.get("recovered"),
        "bytes": totals.get("bytes"),
        "share of dense": totals["bytes"] / dense if dense and number(totals.get("bytes")) else None,
        "parameters": totals.get("parameters_after", totals.get("parameters")),
        "seconds": mapping(report.get("seconds")).get("total"),
        "peak memory": report.get("peak_memory"),
        "prefill times dense": model.get("prefill_times_dense"),
        "decode times dense": model.get("decode_times_dense"),
    }
    changes = []
    for result in results:
        kind = result.get("kind")
        if kind == "perplexity":
            found[f"perplexity {text_name(result)}"] = result.get("perplexity")
        elif kind == "divergence":
            name = text_name(result)
            found |= {
                f"perplexity {name}": result.get("perplexity"),
                f"D {name}": result.get("ln_ratio"),
                f"KL {name}": result.get("kl_mean"),
                f"same top {name}": result.get("same_top"),
            }
            changes.append(number(result.get("ln_ratio")))
        elif kind == "repetition":
            found["repetition"] = result.get("share")
        elif kind == "task":
            found[f"accuracy {result.get('task')}"] = result.get("value")
    known = [change for change in changes if change is not None]
    if known:
        found["D"] = sum(known) / len(known)
    return {key: value for key, value in ((key, number(value)) for key, value in found.items()) if value is not None}
