"""Intermediate results of a run: computed once, kept in a folder, found again when the run is resumed."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from budwood.checkpoints.files import write_json, written_whole
from budwood.checkpoints.reader import Shards
from budwood.checkpoints.shard import write_shard
from budwood.checkpoints.sidecars import parse
from budwood.errors import RunError


class Work:
    """A folder for what a method finds out before or after the stream: surveys, gradients, optimiser states.

    The folder is made when something is written, and removed when the run is finished.
    """

    def __init__(self, folder: Path, before: Callable[[], None] | None = None):
        """before: is called before anything is written."""
        self.folder, self._before = folder, before

    def record(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returns, JSON-plain; from `name`.json where an earlier run made it."""
        file = self.file(f"{name}.json")
        if not file.is_file():
            made = make()
            self._tell()
            write_json(file, made)
        try:
            return parse(file.read_bytes())
        except ValueError as error:
            raise RunError(f"{file} is damaged ({error}); delete it and give the same command again") from error

    def tensors(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors that `make` returns, by name; from `name`.safetensors where an earlier run made them."""
        file = self.file(f"{name}.safetensors")
        if not file.is_file():
            self.save(name, make())
        shards = Shards([file])
        return {key: shards.read(key) for key in shards.names()}

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes `name`.safetensors, in place of an earlier one."""
        self._tell()
        with written_whole(self.file(f"{name}.safetensors")) as temporary:
            write_shard(temporary, tensors, {})

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
