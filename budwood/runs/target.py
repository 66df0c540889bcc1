"""The folder that a verb writes to: locked, never mixed with other files, replaced only when the new one is complete.

A new folder is filled in place. Where the target already holds a model, the new one is written into a folder inside it
(`STAGING`) and swapped in at the end, so that the former model stays whole until then. A manifest (`MANIFEST`) lists
the files that budwood wrote; no other file is ever deleted or replaced.
"""

import json
import os
import shutil
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from budwood.checkpoints.files import TEMPORARY, write_json
from budwood.errors import RunError, UsageError

MANIFEST = ".budwood.json"
STAGING = ".budwood-new"
WORK = ".budwood-work"
SWAP = "swap.json"
# Written by versions without a manifest, beside a recipe.json; and temporary files of killed writes.
FORMER = ("sparse*.safetensors*", "model*.safetensors*", "config.json", "recipe.json", "report.*", "README.md")
FORMER_COPIES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")
LEFTOVERS = (f".*{TEMPORARY}", "recipe.json.tmp", "report.json.tmp", "sparse-*.tmp", "model-*.tmp")


class Target:
    """A locked folder. `folder` is where to write: the target itself, or the staging folder inside it.

    Created by `Target.claim`, unlocked by `release`.
    """

    def __init__(self, path: Path):
        self.path = path
        self.created = not path.exists()
        self.folder = path
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
        except OSError as error:
            target.release()
            raise RunError(f"{path} cannot be written to: {error.strerror or error}; give another folder") from error
        except BaseException:
            target.release()
            raise
        return target

    def _acquire(self) -> None:
        """The lock is the kernel's: it ends with the process, however that ends."""
        try:
            import fcntl
        except ImportError:  # not a POSIX system
            return
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.created = False  # it is the other process's folder
            raise UsageError(
                f"another budwood process writes to {self.path}; wait until it ends, or give another folder"
            ) from error
        except OSError:
            return  # a file system without locks

    def release(self) -> None:
        """Unlocks the folder; removes it where it was created here and is empty."""
        if self.created and self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()
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
        if not (self.path / "recipe.json").is_file():
            return set()
        return {name for name in self.entries() if any(fnmatch(name, old) for old in (*FORMER, *FORMER_COPIES))}

    def fill_in_place(self, planned: Iterable[str]) -> None:
        """Write into the target itself; see `refuse_foreign`. A staging folder is abandoned."""
        self.refuse_foreign(planned)
        self.folder = self.path
        shutil.rmtree(self.path / STAGING, ignore_errors=True)

    def stage(self, planned: Iterable[str]) -> None:
        """Write into the staging folder; see `refuse_foreign`."""
        self.refuse_foreign(planned)
        self.folder = self.path / STAGING
        self.folder.mkdir(exist_ok=True)

    def refuse_foreign(self, planned: Iterable[str]) -> None:
        """Raises UsageError where a file has a name that will be written (`planned`: patterns) and is not budwood's."""
        written, patterns = self.written(), list(planned)
        for name in self.entries():
            if name not in written and any(fnmatch(name, pattern) for pattern in patterns):
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

    def note(self, names: Iterable[str]) -> None:
        """Adds names to the manifest of the folder that is written to."""
        listed = (read_manifest(self.folder) or set()) | set(names)
        write_json(self.folder / MANIFEST, {"files": sorted(listed)})

    def complete(self) -> None:
        """The folder is finished: its intermediate results go, and a staged one takes the target's place."""
        shutil.rmtree(self.work, ignore_errors=True)
        if self.folder == self.path:
            return
        new = [entry.name for entry in self.folder.iterdir() if entry.is_file() and not entry.name.endswith(TEMPORARY)]
        former = sorted(self.written() - set(new))
        write_json(self.folder / SWAP, {"move": sorted(new), "remove": former})
        self._swap()

    def _swap(self) -> None:
        """Moves the staged files into the target; repeated after an interruption, it goes on where it was.

        While it lasts there is no config.json, so that no mixture can be loaded.
        """
        staging = self.path / STAGING
        listed = json.loads((staging / SWAP).read_text("utf-8"))
        names = [Path(name).name for name in listed["move"]]
        if (staging / "config.json").is_file():
            (self.path / "config.json").unlink(missing_ok=True)
        for name in listed["remove"]:
            if name not in names:
                (self.path / Path(name).name).unlink(missing_ok=True)
        for name in sorted(names, key=lambda name: name == "config.json"):
            if (staging / name).is_file():
                os.replace(staging / name, self.path / name)
        shutil.rmtree(staging)
        self.folder = self.path


def read_manifest(folder: Path) -> set[str] | None:
    """The files that budwood wrote into a folder; None where it kept no list."""
    try:
        files = json.loads((folder / MANIFEST).read_text("utf-8"))["files"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder / MANIFEST} is damaged ({error}); give another folder") from error
    return {str(name) for name in files}
