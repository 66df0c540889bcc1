"""Results in the two structured forms of the hub: `.eval_results/*.yaml`, and `model-index` in a model card.

`.eval_results/*.yaml` is a list of entries, each with a data set of the hub, a task and a value; results on texts that
are no data set of the hub are left out there. `model-index` takes them under the name that the user gave the text.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from budwood.checkpoints.files import write_text
from budwood.environment import installed
from budwood.errors import RunError
from budwood.humanize import printable
from budwood.reports.results import Divergence, Perplexity, Result, TaskScore

FILE = ".eval_results/budwood.yaml"  # in the folder of the model
FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
LONGEST, DEEPEST = 1 << 16, 20  # characters of a card's metadata, and sections inside sections
TASK = {"type": "text-generation"}


@dataclass(frozen=True)
class HubData:
    """A data set of the hub: its id, configuration and split."""

    id: str
    config: str | None
    split: str | None


TASKS = {
    "piqa": HubData("ybisk/piqa", "plain_text", "validation"),
    "hellaswag": HubData("Rowan/hellaswag", None, "validation"),
    "winogrande": HubData("allenai/winogrande", "winogrande_xl", "validation"),
    "openbookqa": HubData("allenai/openbookqa", "main", "test"),
    "rte": HubData("nyu-mll/glue", "rte", "validation"),
    "arc_easy": HubData("allenai/ai2_arc", "ARC-Easy", "test"),
    "arc_challenge": HubData("allenai/ai2_arc", "ARC-Challenge", "test"),
    "boolq": HubData("aps/super_glue", "boolq", "validation"),
}
TEXTS = {
    "wikitext2": HubData("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    "c4": HubData("allenai/c4", "en", "validation"),
}


def data_of(result: Perplexity | TaskScore) -> HubData | None:
    """The data set of the hub that a result is on; None for a text of the user's own."""
    if isinstance(result, TaskScore):
        return TASKS.get(result.task)
    if not result.text.data.startswith("hf:"):
        return TEXTS.get(result.text.data)
    repo, *rest = result.text.data.removeprefix("hf:").split(":")  # hf:REPO[:CONFIG]:SPLIT[:FIELD]
    config, split = rest[:2] if len(rest) > 1 else ["", *rest, ""][:2]
    return HubData(repo, config or None, split or None)


def headline(results: Sequence[Result]) -> list[Perplexity | TaskScore]:
    """What the hub shows: perplexities and tasks. A divergence has the perplexity of a text that has no other."""
    known = {result.text.sha256 for result in results if isinstance(result, Perplexity)}
    found: list[Perplexity | TaskScore] = []
    for result in results:
        if isinstance(result, Perplexity | TaskScore):
            found.append(result)
        elif isinstance(result, Divergence) and result.text.sha256 not in known:
            found.append(Perplexity(result.model, result.text, result.losses, result.conditions))
    return found


def settings(result: Perplexity | TaskScore) -> dict[str, Any]:
    """The conditions of a result, plain."""
    conditions = result.conditions
    if isinstance(result, TaskScore):
        own: dict[str, Any] = {
            "shots": result.shots,
            "items": result.items,
            "all_items": result.limit is None,
            "task_version": result.version,
            "rows": printable(result.rows),
        }
    else:
        text = result.text
        own = {
            "variant": text.variant,
            "windows": text.windows,
            "window_tokens": text.seq_length,
            "bos": text.bos,
            "tokens_sha256": text.sha256,
        }
    machine = conditions.machine
    return {
        **own,
        "dtype": conditions.dtype,
        "machine": printable(machine.get("accelerator") or machine.get("processor") or conditions.device),
        "threads": machine.get("threads"),
        **{f"{name}_version": version for name, version in conditions.versions.items() if version},
    }


def entries(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The entries of `.eval_results/budwood.yaml`: of the results on data sets of the hub."""
    found = []
    for result in headline(results):
        data = data_of(result)
        if data is None:
            continue
        task = result.task if isinstance(result, TaskScore) else "perplexity"
        value = result.value if isinstance(result, TaskScore) else result.perplexity
        metric = result.metric if isinstance(result, TaskScore) else "perplexity"
        said = ", ".join(f"{name} {value}" for name, value in settings(result).items() if value is not None)
        found.append(
            {
                "dataset": {"id": data.id, "task_id": task},
                "value": value,
                "date": result.conditions.created,
                "notes": f"{metric}; {said}; measured by budwood evaluate",
            }
        )
    return found


def index_entries(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The results for `model-index`."""
    found = []
    for result in headline(results):
        data = data_of(result)
        if isinstance(result, TaskScore):
            name, kind, value, error = result.task, result.metric, result.value, result.error
        else:
            name, kind, value, error = result.text.name, "perplexity", result.perplexity, result.error
        dataset = {"name": printable(name), "type": data.id if data else "text"}
        if data:
            dataset |= {key: value for key, value in (("config", data.config), ("split", data.split)) if value}
        args = settings(result) | ({"standard_error": error} if error is not None else {})
        found.append(
            {
                "task": TASK,
                "dataset": dataset,
                "metrics": [{"type": kind, "value": value, "name": kind, "args": args}],
            }
        )
    return found


def with_index(card: str, results: Sequence[Result], name: str) -> str:
    """The model card with the results in its metadata; those on other data or of other metrics stay.

    A card whose metadata cannot be read is left alone: it is the user's.
    """
    front = FRONT.match(card)
    new = index_entries(results)
    data = metadata_of(front[1]) if front and new else None
    if front is None or data is None:
        return card
    index = data.get("model-index") or [{"name": printable(name), "results": []}]
    if not isinstance(index, list) or not isinstance(index[0], dict):
        return card
    try:
        measured = {identity(entry) for entry in new}
        kept = [entry for entry in index[0]["results"] if identity(entry) not in measured]
    except (AttributeError, TypeError, KeyError, IndexError):
        return card
    data["model-index"] = [{**index[0], "results": [*kept, *new]}, *index[1:]]
    return f"---\n{dumped(data)}---\n{card[front.end() :]}"


def metadata_of(text: str) -> dict[str, Any] | None:
    """The metadata of a model card; None where it is no mapping, or where it would cost more to write than to read.

    The card is foreign: aliases stand for copies, of which a few lines can make gigabytes.
    """
    import yaml

    depth = 0
    try:
        for event in yaml.parse(text[: LONGEST + 1], Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > DEEPEST:
                return None
        data = yaml.safe_load(text) if len(text) <= LONGEST else None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError):  # such as of a date that is none
        return None
    return data if isinstance(data, dict) else None


def identity(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells results of a model index apart: data, metric, and the tokens or items measured."""
    data, metric = entry["dataset"], entry["metrics"][0]
    return (data["type"], data["name"], data.get("config"), data.get("split"), metric["type"])


def dumped(content: Any) -> str:
    """YAML in the order of the content, without anchors."""
    import yaml

    class Plain(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    return yaml.dump(content, Dumper=Plain, sort_keys=False, allow_unicode=True, width=120)


def write_entries(folder: Path, results: Sequence[Result]) -> None:
    """Writes `.eval_results/budwood.yaml`, or removes it where no result is on a data set of the hub.

    Raises RunError where it cannot be written.
    """
    file, found = folder / FILE, entries(results)
    try:
        if not found:
            file.unlink(missing_ok=True)
            return
        file.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise RunError(f"{file} could not be written ({error}); make room, and give the command again") from error
    about = f"# Measured by budwood {installed('budwood') or ''} evaluate, which writes this file again.\n"
    write_text(file, about + dumped(found))
