"""One run of a verb that writes a model folder: claimed, resumed, filled block by block, finished with its report.

    with Run.open(target, recipe, source, overwrite=overwrite) as run:
        if run.report is not None:
            return run.report  # an earlier call finished it
        run.start(model, arithmetic)
        for block in run.blocks(windows):
            change(block)
        return run.finish(notes)

After any interruption the same command continues the run. This rests on `Target` (lock, staging, manifest), the
id in every shard, and `config.json`, which is written last.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from budwood.checkpoints.companions import companions, copy_companions, left_out
from budwood.checkpoints.description import describe
from budwood.checkpoints.files import TEMPORARY, write_json, write_text
from budwood.checkpoints.reader import shard_files
from budwood.checkpoints.shard_digests import FILE as SHARDS
from budwood.checkpoints.shard_digests import ShardDigests
from budwood.checkpoints.source import Source
from budwood.checkpoints.work import Work
from budwood.checkpoints.writer import Writer
from budwood.errors import BudwoodError, RunError, UsageError
from budwood.progress import Progress, Silent
from budwood.reports.card import render_card
from budwood.reports.markdown import render_report
from budwood.reports.measure import measure
from budwood.reports.record import Report, read_report
from budwood.runs.reading import READS, Reading
from budwood.runs.recipe import FILE, Recipe, read_recipe
from budwood.runs.target import MANIFEST, Target
from budwood.stream.block import Block
from budwood.stream.model import Model

DOCUMENTS = ("report.json", "report.md", "README.md")
PLANNED = ("config.json", FILE, MANIFEST, "*.safetensors", "*.safetensors.index.json", *DOCUMENTS)


class Run:
    """recipe: what the run is. report: that of an earlier call that finished it, else None. work: see `Work`.

    recorded: the arithmetic that an interrupted run began with, None where it begins now.
    """

    def __init__(self, target: Target, recipe: Recipe, source: Source, progress: Progress):
        self.target, self.recipe, self.source, self.progress = target, recipe, source, progress
        self.reading = Reading(source)
        self.report: Report | None = None
        self.recorded: Mapping[str, Any] | None = None
        self.work = Work(target.work)
        self.companions: list[str] = []  # names of the files that are copied from the source
        self.notes: list[str] = []
        self.sections: dict[str, Any] = {}  # of the report, in addition to what is counted
        self.outside: dict[str, Callable[[Tensor], Tensor]] = {}  # changes of tensors outside the blocks, by full name
        self._began = time.perf_counter()
        self._seconds: dict[int, float] = {}
        self._rewrites = 0

    @classmethod
    def open(
        cls,
        target: str | Path,
        recipe: Recipe,
        source: Source,
        *,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> "Run":
        """Claims the folder for this run; a context manager. source: the model that is read.

        An empty folder is filled, an interrupted run of the same recipe continued, a finished one reported. With
        `overwrite` anything else is replaced once the new folder is complete; until then it stays as it is.
        Raises UsageError where the folder is in use, or holds anything else and `overwrite` is not set.
        """
        held = Target.claim(Path(target))
        try:
            run = cls(held, recipe, source, progress or Silent())
            run.companions = [file.name for file in companions(source.folder)]
            if not source.folder.is_dir():  # a folder that went away has no companions
                raise RunError(f"{source.folder} is gone; put it back and give the same command again")
            run._choose_folder(overwrite, [*PLANNED, *run.companions])
            run.work = Work(held.work, run._keep_reads)
        except BaseException:
            held.release()
            raise
        return run

    def _choose_folder(self, overwrite: bool, planned: list[str]) -> None:
        held, path = self.target, self.target.path
        found = _recipe_in(path, tolerant=overwrite)
        again = overwrite and not held.swapped and _is_complete(path)  # all of it, whatever is there
        difference = found.difference(self.recipe) if found and again else self._difference(found, path)
        same = found is not None and difference is None
        if not held.entries():
            held.fill_in_place(planned)
        elif same and not _is_complete(path):
            held.fill_in_place(planned)
            if (path / "config.json").is_file():  # it was finished, and lacks shards since
                held.complete()
                (path / "config.json").unlink()
            self.recorded = found.chosen if found else None
        elif same and (not overwrite or held.swapped):  # the swap ended the run that is asked for
            self.report = read_report(path)
            if self.report is not None:
                held.complete()  # a kill may have kept intermediate results
                self.progress.note(f"{path} is finished already; nothing is left to do")
            else:
                held.fill_in_place(planned)
                self.recorded = found.chosen if found else None
        elif not overwrite:
            raise UsageError(
                f"{path} holds another run: {difference}; give another folder, or --overwrite"
                if difference
                else f"{path} is not empty and holds no budwood run; give another folder, or --overwrite"
            )
        else:
            held.stage(planned)
            begun = _recipe_in(held.folder, tolerant=True)
            if begun is not None and self._difference(begun, held.folder) is None:
                self.recorded = begun.chosen
            else:
                held.abandon_stage()

    def _difference(self, found: Recipe | None, folder: Path) -> str | None:
        """How the run in a folder differs from this one, as a sentence: by its recipe, or by what its source was."""
        if found is None:
            return None
        difference = found.difference(self.recipe) or self.reading.difference(found, folder)
        if difference is None and "content" in found.source:
            self.recipe = self.recipe.with_content(found.source["content"])
        return difference

    def _keep_reads(self) -> None:
        self.reading.keep(self.target.work)

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self.report is None:
            self._clear_if_empty()
        self.target.release()

    def _clear_if_empty(self) -> None:
        """A run that failed before anything was finished leaves nothing behind."""
        kept = list(self.folder.glob("*.safetensors")) + list(self.work.folder.rglob("*.*"))
        if all(file.name.endswith((TEMPORARY, READS, SHARDS)) for file in kept):
            self.target.discard()

    @property
    def folder(self) -> Path:
        """Where the run writes: the target, or the staging folder inside it."""
        return self.target.folder

    def note(self, sentence: str | None) -> None:
        """A note for the user: shown immediately and kept in the report."""
        if sentence:
            self.notes.append(sentence)
            self.progress.note(sentence)

    def start(self, model: Model, arithmetic: Mapping[str, Any]) -> None:
        """Writes the recipe; from here on the folder is this run's."""
        self.dense = model
        self.recipe = self.recipe.with_arithmetic(arithmetic)
        self.stream(model)
        for file in self.folder.glob(f".*{TEMPORARY}"):
            file.unlink()  # of a process that was killed: the folder is locked
        write_json(self.folder / FILE, self.recipe.to_json())

    def stream(self, model: Model) -> None:
        """The model whose blocks are written from here on: the one that the run started with, or a reduced one."""
        self.model = model
        model.progress = self.progress
        indices = [self.folder / f"{stem}.safetensors.index.json" for stem in ("sparse", "model")]
        digests = ShardDigests(self.target.work / SHARDS, indices)
        self.writer = Writer(self.folder, self.recipe.id, len(model), self.recipe.format, self._keep_reads, digests)
        # Rewritten shards have an id of their own: without the work folder that says how far the rewriting came, their
        # blocks are done again from the start.
        self.writer.accepted |= {self._rewrite_id(file.stem) for file in self.work.folder.glob("rewrite-*.ready")}
        shards = [self.writer.shard(index).name for index in range(-1, len(model))]
        self.target.note([FILE, MANIFEST, *shards])
        model.scratch = self.folder  # hidden states beyond the limit are kept on the disk that is written to anyway

    def blocks(self, windows: Tensor | None, what: str) -> Iterator[Block]:
        """Every block that is not finished, to be changed by the loop's body; see `Model.blocks`.

        A block's time runs until the next one is yielded: reading, statistics, choice, propagation, writing.
        """
        done = sum(self.writer.finished(index) for index in range(len(self.model)))
        if done:
            self.progress.note(f"{done} of {len(self.model)} blocks are finished already; continuing from there")
        if done == len(self.model):
            return
        last: Block | None = None
        before = time.perf_counter()

        def tell(block: Block | None) -> None:
            nonlocal before
            now = time.perf_counter()
            if block is not None:
                self._seconds[block.index] = now - before
                self.progress.block(block.index, block.name, now - before, block.relative_error)
            before = now

        self.progress.start(len(self.model), what)
        try:
            for block in self.model.blocks(windows, self.writer):
                tell(last)
                yield block
                last = block
            tell(last)
        finally:
            self.progress.finish()

    def rewrite(self) -> Iterator[Block]:
        """Every finished block once more, without calibration inputs; the loop's body may change it again.

        For `Step.finish`. The shards are replaced when all blocks are done; interrupted, the same loop continues.
        """
        self._rewrites += 1
        name = f"rewrite-{self._rewrites}"
        done, ready = self.work.file(f"{name}.done"), self.work.file(f"{name}.ready")
        if done.is_file():
            return
        layout = self.recipe.format
        second = Writer(
            self.work.file(name), self._rewrite_id(name), len(self.model), layout, self._keep_reads, self.writer.digests
        )
        if not ready.is_file():
            second.folder.mkdir(exist_ok=True)
            yield from self.model.rewrite(self.writer, second)
            write_text(ready, "")
        self.writer.accepted.add(second.run)
        for index in range(len(self.model)):
            if second.shard(index).is_file():
                second.shard(index).replace(self.writer.shard(index))
        write_text(done, "")

    def _rewrite_id(self, name: str) -> str:
        """The id of the shards that a rewriting makes."""
        return f"{self.recipe.id}-{name}"

    def finish(self, base_model: str | None, license: str | None) -> Report:
        """Writes what is outside the blocks, index, companions, documents and, last, config.json; the report.

        base_model: the name of the source on the hub, or None.
        """
        model, writer, folder, source = self.model, self.writer, self.folder, self.source.folder
        description = describe(model.source.trial, writer.shapes(), model.structure.shapes_in_files)
        architecture = (description.config.get("architectures") or [type(model.module).__name__])[0]
        writer.write_outside(lambda: model.outside_in_files(writer.layout, description.zeros, self.outside))
        self.recipe, note = self.reading.finished(self.recipe)
        self.note(note)
        self.note(left_out(source))
        report = measure(
            model,
            writer,
            dense=self.dense,
            description=description,
            source=str(self.recipe.source["name"]),
            method=self.recipe.method or "unknown",
            data=self.recipe.data,
            seconds=self._seconds,
            notes=self.notes,
        )
        report.update(self.sections)  # type: ignore[typeddict-item]
        report["seconds"]["total"] = time.perf_counter() - self._began
        documents = {
            "report.json": json.dumps(report, indent=2) + "\n",
            "report.md": render_report(report),
            "README.md": render_card(report, base_model, license, architecture),
        }
        copied = [file.name for file in companions(source)]
        if gone := [name for name in self.companions if name not in copied]:
            raise RunError(f"{source / gone[0]} is gone; put it back and give the same command again")
        self.target.note([*documents, *copied, "config.json", "sparse.safetensors.index.json"])
        self.target.note(["model.safetensors.index.json"])
        write_json(folder / FILE, self.recipe.to_json())
        copy_companions(source, folder, copied)
        writer.write_index(description)
        for name, text in documents.items():
            write_text(folder / name, text)
        write_json(folder / "config.json", writer.config(description, self.recipe.method, self.recipe.dtype))
        self.target.complete()
        self.report = report
        return report


def _recipe_in(folder: Path, tolerant: bool) -> Recipe | None:
    """The recipe that a folder holds; one that cannot be read is none where `tolerant`."""
    try:
        return read_recipe(folder / FILE)
    except UsageError:
        if tolerant:
            return None
        raise


def _is_complete(folder: Path) -> bool:
    """Whether a folder is finished: the config, which is written last, and all shards that the index names."""
    if not (folder / "config.json").is_file():
        return False
    try:
        return bool(shard_files(folder))
    except BudwoodError:
        return False
