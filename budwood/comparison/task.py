"""One run as it is handed to a worker process: plain data, and what identifies each of its steps."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from budwood.checkpoints.files import write_json
from budwood.checkpoints.schema import NUMBER, fault
from budwood.checkpoints.sidecars import read_object
from budwood.comparison.recipe import Recipe
from budwood.comparison.runs import Run, slug
from budwood.comparison.sources import DenseModel
from budwood.data.mix import mix_of
from budwood.errors import RunError
from budwood.reports.record import SCHEMA as REPORT
from budwood.reports.record import SPEED as TIMES

RUNS = "runs"  # folder of the runs in that of the comparison
MODEL = "model"  # of the pruned model in the folder of a run
FILE = "run.json"  # what a run is, in its folder
STEPS = "steps"  # folder of the records of finished steps
PRUNE, SPEED, TASKS, REPETITION = "prune", "speed", "tasks", "repetition"
WITHOUT_EFFECT = ("activation_memory", "device")  # options that do not change what is written

ADVICE = "delete it, and give the command again"


@dataclass(frozen=True)
class Task:
    """JSON-plain but for paths. identity: what the run is. steps: what is asked for, by name: its settings."""

    name: str
    label: str
    folder: Path
    dense: Path  # folder of the dense model
    method: str | None  # expression
    kind: str
    draw: int
    trust_remote_code: bool
    calibration: dict[str, Any]
    prune: dict[str, Any]
    device: str  # of the evaluations
    stream: bool
    batch_size: int  # of tasks
    identity: dict[str, Any]
    steps: dict[str, dict[str, Any]]
    keep: bool  # the model, once all steps are finished

    @property
    def model(self) -> Path:
        """The folder that is evaluated."""
        return self.dense if self.kind == "dense" else self.folder / MODEL

    def id_of(self, step: str) -> str:
        """Digest of all that the record of a step depends on."""
        asked = {"run": self.identity, "step": self.steps[step]}
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:32]

    def record(self, step: str) -> dict[str, Any] | None:
        """What an earlier call found; None where the step is not finished, or was another one."""
        file = self.folder / STEPS / f"{slug(step)}.json"
        found = read_json(file, {"id": str})
        if found is None or found["id"] != self.id_of(step):
            return None
        wrong = fault(found, record_schema(step))
        if wrong:
            raise RunError(f"{file} is damaged: {wrong}; {ADVICE}")
        return found

    def write(self, step: str, content: Mapping[str, Any]) -> None:
        (self.folder / STEPS).mkdir(parents=True, exist_ok=True)
        write_json(self.folder / STEPS / f"{slug(step)}.json", {"id": self.id_of(step), "step": step, **content})

    def missing(self) -> list[str]:
        """The steps that are not finished, in order."""
        return [step for step in self.steps if self.record(step) is None]

    def difference(self) -> str | None:
        """In what the run in its folder is another one than this, as a sentence; None where it is the same or new."""
        found = read_json(self.folder / FILE, {"identity": dict})
        if found is None:
            return None
        for key, mine in self.identity.items():
            theirs = found["identity"].get(key)
            if theirs == mine:
                continue
            if isinstance(mine, dict) and isinstance(theirs, dict):
                both = {**mine, **theirs}
                differ = ((k, mine.get(k), theirs.get(k)) for k in both if mine.get(k) != theirs.get(k))
                key, mine, theirs = next(differ, (key, mine, theirs))  # one may hold a null that the other lacks
            return f"its {key} is {_short(theirs)}, asked for is {_short(mine)}"
        return None


def task_of(recipe: Recipe, run: Run, model: DenseModel, out: Path, keep: bool) -> Task:
    """What a worker needs for a run. Reads the files of the source and of the texts, for their digests."""
    fields = recipe.fields
    prune = run.prune.model_dump()
    calibration = run.calibration.model_dump()
    identity: dict[str, Any] = {
        "source": model.identity,
        "method": "dense" if run.method is None else str(run.method),
    }
    if run.calibrated:
        identity["calibration"] = {**calibration, "seed": run.draw, "sha256": digest(run.calibration.data)}
    if run.method is not None:
        identity["prune"] = {name: value for name, value in prune.items() if name not in WITHOUT_EFFECT}
    assert model.path is not None
    return Task(
        name=run.name,
        label=run.label,
        folder=out / RUNS / run.name,
        dense=model.path,
        method=None if run.method is None else str(run.method),
        kind=run.kind,
        draw=run.draw,
        trust_remote_code=model.trust_remote_code,
        calibration=calibration,
        prune=prune,
        device=fields.evaluate.device,
        stream=fields.evaluate.stream,
        batch_size=fields.evaluate.tasks.batch_size if fields.evaluate.tasks else 1,
        identity=identity,
        steps=steps_of(recipe, run),
        keep=keep and run.kind == "pruned",
    )


def steps_of(recipe: Recipe, run: Run) -> dict[str, dict[str, Any]]:
    """The steps of a run in order, each with the settings that its record depends on."""
    fields, asked = recipe.fields, recipe.fields.evaluate
    shared = {"dtype": asked.dtype}
    texts = {
        name: {**text.model_dump(), "sha256": digest(text.data), "name": name} for name, text in asked.texts.items()
    }
    steps: dict[str, dict[str, Any]] = {} if run.kind == "dense" else {PRUNE: {}}
    for name, text in texts.items():
        steps[f"perplexity {name}"] = {**shared, **text}
    if asked.divergence and run.kind != "dense":
        for name in asked.divergence.texts or list(texts):
            limit = asked.divergence.limit or texts[name]["limit"]
            steps[f"divergence {name}"] = {**shared, **texts[name], "limit": limit}
    if asked.repetition:
        settings = {**asked.repetition.model_dump(), **texts[asked.repetition.text or next(iter(texts))]}
        steps[REPETITION] = {**shared, **settings}
    if asked.tasks:
        steps[TASKS] = {**shared, **asked.tasks.model_dump(exclude={"batch_size"})}
    if fields.speed and run.kind == "pruned":
        steps[SPEED] = fields.speed.model_dump()
    return steps


def digest(data: str | None) -> str | None:
    """Of the content of a file, or of a folder's files; None for a name, whose text follows from it."""
    if data is None:
        return None
    if mix := mix_of(data):
        return hashlib.sha256(" ".join(str(digest(name)) for name, _ in mix.parts).encode()).hexdigest()
    path = Path(data)
    if not path.exists():
        return None
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    found = [_digest_of(file, file.stat().st_mtime_ns, file.stat().st_size) for file in files]
    return found[0] if path.is_file() else hashlib.sha256(" ".join(found).encode()).hexdigest()


@cache
def _digest_of(file: Path, changed: int, size: int) -> str:
    """Of a file that was last changed then."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def begin(task: Task) -> None:
    """Notes in the folder what the run is."""
    task.folder.mkdir(parents=True, exist_ok=True)
    if read_json(task.folder / FILE, {}) is None:
        write_json(task.folder / FILE, {"name": task.name, "label": task.label, "identity": task.identity})


def read_json(file: Path, schema: Any) -> dict[str, Any] | None:
    """The object in a file, as the schema says; None where there is no file. Raises RunError where it is damaged."""
    return read_object(file, schema, ADVICE)


def record_schema(step: str) -> dict[str, Any]:
    """What the rows of the results take from the record of a step."""
    shared: dict[str, Any] = {"id": str, "seconds": NUMBER, "machine": {"versions?": dict}}
    if step == PRUNE:
        return {**shared, "report": REPORT, "size": {"bytes": NUMBER, "bits per weight": NUMBER}}
    return {**shared, "speed": TIMES} if step == SPEED else {**shared, "results": [dict]}


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= 200 else text[:197] + "..."
