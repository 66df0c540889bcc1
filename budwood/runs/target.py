"""The folder that a verb writes to: locked, never mixed with other files, replaced only when the new one is complete.

A new folder is filled in place. Where the target already holds a model, the new one is written into a folder inside it
(`STAGING`) and swapped in at the end, so that the former model stays whole until then. A manifest (`MANIFEST`) lists
the files that budwood wrote; no other file is ever deleted or replaced.
"""

import contextlib
import os
import shutil
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from budwood.checkpoints.files import TEMPORARY, write_json
from budwood.checkpoints.lock import acquire
from budwood.checkpoints.sidecars import MANIFEST as WRITTEN
from budwood.checkpoints.sidecars import SWAP as SWAPPED
from budwood.checkpoints.sidecars import read_object
from budwood.errors import RunError, UsageError
from budwood.reports.hub_results import FILE as EVALUATED
from budwood.runs.recipe import FILE as RECIPE
from budwood.runs.recipe import read_recipe

MANIFEST = ".budwood.json"
STAGING = ".budwood-new"
WORK = ".budwood-work"
SWAP = ".budwood-swap.json"
# Written by versions without a manifest, beside a recipe.json; and what they left of killed writes.
FORMER = (
    *("sparse-*-of-*.safetensors", "sparse.safetensors.index.json"),
    *("model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("config.json", "recipe.json", "report.json", "report.md", "README.md"),
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "generation_config.json"),
    *("chat_template*", "*.jinja", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*"),
)
LEFTOVERS = (f".*{TEMPORARY}", "recipe.json.tmp", "report.json.tmp", "sparse-*.tmp", "model-*.tmp")


class Target:
    """A locked folder. `folder` is where to write: the target itself, or the staging folder inside it.

    Made by `Target.claim`, given up by `release`.
    """

    def __init__(self, path: Path):
        self.path = path
        self.folder = path
        self.swapped = False  # whether `claim` completed an interrupted swap
        self._created = [folder for folder in (path, *path.parents) if not folder.exists()]
        self._lock: int | None = None

    @classmethod
    def claim(cls, path: Path) -> "Target":
        """Creates and locks the folder, and completes a swap that was interrupted.

        Raises UsageError where it is a file, or where another process writes to it.
        """
        path = path.expanduser()
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file; give a folder")
        target = cls(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            target._acquire()
            if (path / STAGING / SWAP).is_file():
                target._swap()
                target.swapped = True
        except OSError as error:
            target.release()
            raise _cannot_be_written(path, error) from error
        except BaseException:
            target.release()
            raise
        return target

    def _acquire(self) -> None:
        """Takes the lock. Raises UsageError where another process has it."""
        try:
            self._lock = acquire(self.path)
        except BlockingIOError as error:
            self._created = []  # it is the other process's folder
            raise UsageError(
                f"another budwood process writes to {self.path}; wait until it ends, or give another folder"
            ) from error

    def release(self) -> None:
        """Gives the folder up; one that was created here and is empty is removed, with its parents created here."""
        with contextlib.suppress(OSError):  # not empty
            for folder in self._created:
                folder.rmdir()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def work(self) -> Path:
        """A folder for intermediate results, removed when the run is finished."""
        return self.folder / WORK

    def entries(self) -> list[str]:
        """Names of what the target holds, without leftovers and folders of unfinished runs."""
        return sorted(
            entry.name
            for entry in self.path.iterdir()
            if entry.name not in (MANIFEST, STAGING, WORK) and not any(fnmatch(entry.name, old) for old in LEFTOVERS)
        )

    def written(self) -> set[str]:
        """Names of the files in the target that budwood wrote."""
        listed = read_manifest(self.path)
        if listed is not None:
            return listed & set(self.entries())
        try:
            if read_recipe(self.path / RECIPE) is None:
                return set()
        except UsageError:
            return set()
        return {name for name in self.entries() if any(fnmatch(name, old) for old in FORMER)}

    def fill_in_place(self, planned: Iterable[str]) -> None:
        """Write into the target itself; see `refuse_foreign`. A staging folder is abandoned.

        Intermediate results are kept only beside the recipe that they belong to.
        """
        self.refuse_foreign(planned)
        self.folder = self.path
        shutil.rmtree(self.path / STAGING, ignore_errors=True)
        if not (self.path / RECIPE).is_file():
            shutil.rmtree(self.work, ignore_errors=True)

    def stage(self, planned: Iterable[str]) -> None:
        """Write into the staging folder; see `refuse_foreign`."""
        self.refuse_foreign(planned)
        self.folder = self.path / STAGING
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise _cannot_be_written(self.path, error) from error

    def refuse_foreign(self, planned: Iterable[str]) -> None:
        """Raises UsageError where a file has a name that will be written (`planned`: patterns) and is not budwood's."""
        written, patterns = self.written(), list(planned)
        for name in self.entries():
            if name not in written and any(name == pattern or fnmatch(name, pattern) for pattern in patterns):
                raise UsageError(
                    f"{self.path / name} was not written by budwood and would be replaced; move it away, or give "
                    "another folder"
                )

    def abandon_stage(self) -> None:
        """Deletes what an interrupted run of another kind left in the staging folder."""
        shutil.rmtree(self.path / STAGING, ignore_errors=True)
        self.folder.mkdir(exist_ok=True)

    def drop_stage(self) -> None:
        """Deletes the staging folder, for verbs that do not continue; one whose swap was begun stays."""
        if not (self.path / STAGING / SWAP).is_file():
            shutil.rmtree(self.path / STAGING, ignore_errors=True)

    def discard(self) -> None:
        """Deletes what a run wrote that finished nothing: a staging folder, or a recipe alone in the target."""
        shutil.rmtree(self.work, ignore_errors=True)
        if self.folder != self.path:
            self.drop_stage()
        elif set(self.entries()) <= {RECIPE}:
            for file in (self.path / RECIPE, self.path / MANIFEST, *self.path.glob(f".*{TEMPORARY}")):
                file.unlink(missing_ok=True)

    def note(self, names: Iterable[str]) -> None:
        """Adds names to the manifest of the folder that is written to, before the files are written.

        Raises UsageError where the target holds a file of such a name that is not budwood's.
        """
        names = set(names)
        listed = read_manifest(self.folder)
        if self.folder == self.path:
            self.refuse_foreign(names)
            listed = self.written() if listed is None else listed
        write_json(self.folder / MANIFEST, {"files": sorted((listed or set()) | names)})

    def complete(self) -> None:
        """The folder is finished: its intermediate results go, and a staged one takes the target's place.

        Raises UsageError where a file that is not budwood's came into the way since the run began.
        """
        if self.folder == self.path:
            shutil.rmtree(self.work, ignore_errors=True)
            return
        new = [entry.name for entry in self.folder.iterdir() if entry.is_file() and not entry.name.endswith(TEMPORARY)]
        self.refuse_foreign(new)
        former = sorted(self.written() - set(new))
        write_json(self.folder / SWAP, {"move": sorted(new), "remove": former})
        try:
            self._swap()
        except OSError as error:
            raise _cannot_be_written(self.path, error) from error

    def _swap(self) -> None:
        """Moves the staged files into the target; repeated after an interruption, it goes on where it was.

        While it lasts there is no config.json, so that no mixture can be loaded.
        """
        staging = self.path / STAGING
        listed = read_object(staging / SWAP, SWAPPED, f"delete {staging} and give the command again")
        if listed is None:
            raise RunError(f"{staging / SWAP} is missing; delete {staging} and give the command again")
        names = list(listed["move"])
        if (staging / "config.json").is_file():
            (self.path / "config.json").unlink(missing_ok=True)
        for name in listed["remove"]:
            if name not in names:
                (self.path / name).unlink(missing_ok=True)
        for name in sorted(names, key=lambda name: name == "config.json"):
            if (staging / name).is_file():
                os.replace(staging / name, self.path / name)
        (self.path / EVALUATED).unlink(missing_ok=True)  # as the report: of the former model
        with contextlib.suppress(OSError):  # others' results, or none
            (self.path / EVALUATED).parent.rmdir()
        shutil.rmtree(self.path / WORK, ignore_errors=True)  # of the former folder
        shutil.rmtree(staging)
        self.folder = self.path


def read_manifest(folder: Path) -> set[str] | None:
    """The files that budwood wrote into a folder; None where it kept no list. Raises RunError where it is damaged."""
    content = read_object(folder / MANIFEST, WRITTEN, "give another folder")
    return None if content is None else set(content["files"])


def _cannot_be_written(folder: Path, error: OSError) -> RunError:
    return RunError(f"{folder} cannot be written to ({error}); make room, or give another folder")
