"""Intermediate results of a run: computed once, kept in a folder, found again when the run is resumed.

Each file holds a digest of its content. What a resumed run reads is what the interrupted one wrote, or it is refused.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from budwood.checkpoints.files import write_json, written_whole
from budwood.checkpoints.reader import Shards, read_header
from budwood.checkpoints.reads import digest_of
from budwood.checkpoints.shard import write_shard
from budwood.checkpoints.sidecars import read_object
from budwood.errors import RunError

RECORD = {"sha256": str}  # and the value
ADVICE = "delete it and give the same command again"


class Work:
    """A folder for what a method finds out before or after the stream: surveys, gradients, optimiser states.

    The folder is made when something is written, and removed when the run is finished.
    """

    def __init__(self, folder: Path, before: Callable[[], None] | None = None):
        """before: is called before anything is written."""
        self.folder, self._before = folder, before
        self._sound: set[str] = set()  # files of tensors that this process wrote or has compared

    def record(self, name: str, make: Callable[[], Any] | None = None) -> Any:
        """What `make` returns, JSON-plain; from `name`.json where an earlier run made it.

        Without `make` it must be there. Raises RunError where it is not, or was altered.
        """
        file = self.file(f"{name}.json")
        if make is not None and not file.is_file():
            self.write(name, make())
        found = read_object(file, RECORD, ADVICE)
        if found is None:
            raise self._missing(file)
        if found["sha256"] != digest_of_json(found.get("value")):
            raise RunError(f"{file} was altered since it was written; {ADVICE}")
        return found["value"]

    def write(self, name: str, value: Any) -> None:
        """Writes `name`.json, in place of an earlier one."""
        plain = json.loads(json.dumps(value))
        self._tell()
        write_json(self.file(f"{name}.json"), {"sha256": digest_of_json(plain), "value": plain})

    def tensors(self, name: str, make: Callable[[], Mapping[str, Tensor]] | None = None) -> dict[str, Tensor]:
        """The tensors that `make` returns, by name; from `name`.safetensors where an earlier run made them.

        Without `make` they must be there. Raises RunError where they are not, or were altered.
        """
        if make is not None and not self.file(f"{name}.safetensors").is_file():
            self.save(name, make())
        shards = self.shards(name)
        return {key: shards.read(key) for key in shards.names()}

    def shards(self, name: str) -> Shards:
        """The file `name`.safetensors, compared with its digest once.

        Raises RunError where it was altered, or is gone.
        """
        file = self.file(f"{name}.safetensors")
        if not file.is_file():
            raise self._missing(file)
        shards = Shards([file])
        if name not in self._sound:
            if read_header(file)[1].get("sha256") != digest_of_tensors(
                {key: shards.read(key) for key in shards.names()}
            ):
                raise RunError(f"{file} was altered since it was written; {ADVICE}")
            self._sound.add(name)
        return shards

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes `name`.safetensors, in place of an earlier one."""
        self._tell()
        with written_whole(self.file(f"{name}.safetensors")) as temporary:
            write_shard(temporary, tensors, {"sha256": digest_of_tensors(tensors)})
        self._sound.add(name)

    def _missing(self, file: Path) -> RunError:
        return RunError(f"{file} is missing; delete the unfinished run in {self.folder.parent} and begin again")

    def _tell(self) -> None:
        if self._before is not None:
            self._before()

    def file(self, name: str) -> Path:
        """The path of a file in the folder, which exists from now on."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{self.folder} cannot be made ({error}); make room, or give another folder") from error
        return self.folder / name


def digest_of_json(value: Any) -> str:
    """sha256 of a JSON-plain value, however its text is laid out."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes."""
    lines = [
        f"{name} {tensor.dtype} {tuple(tensor.shape)} {digest_of(tensor.detach().cpu().contiguous())}"
        for name, tensor in sorted(tensors.items())
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
