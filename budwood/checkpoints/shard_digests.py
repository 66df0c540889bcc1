"""The digests of the shards that a run has finished, so that a resumed run takes none that was altered meanwhile.

Without them a flipped bit of a finished shard would get a fresh checksum when the run ends.
"""

from contextlib import suppress
from pathlib import Path

from budwood.checkpoints.checksums import sha256
from budwood.checkpoints.files import write_json
from budwood.checkpoints.schema import Each
from budwood.checkpoints.sidecars import INDEX, read_object
from budwood.errors import RunError

FILE = "shards.json"  # in the folder of intermediate results
ADVICE = "delete it and give the same command again"


class ShardDigests:
    """Digests by the id of the run that wrote a shard and the name of its file.

    file: where they are kept. indices: of a folder that was finished once, whose checksums hold too.
    """

    def __init__(self, file: Path, indices: list[Path]):
        self.file = file
        self._known: dict[str, str] = dict(read_object(file, Each(str), ADVICE) or {})
        self._indexed: dict[str, str] = {}
        for index in indices:
            with suppress(RunError):  # a damaged one is written again, and so are the shards that it named
                content = read_object(index, INDEX, ADVICE) or {}
                self._indexed |= content.get("metadata", {}).get("sha256", {})
        self._sound: set[Path] = set()  # that this process has compared

    def note(self, run: str, file: Path, digest: str) -> None:
        """To be called when a shard is whole under a temporary name, before it gets its own."""
        self._known[f"{run} {file.name}"] = digest
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.file, self._known)
        self._sound.add(file)

    def of(self, run: str | None, file: Path) -> str | None:
        """The digest that a shard of a run should have; None for one that is not known."""
        return self._known.get(f"{run} {file.name}") or self._indexed.get(file.name)

    def holds(self, run: str | None, file: Path) -> bool:
        """Whether a shard is known. Raises RunError where it is, and was altered since it was written."""
        digest = self.of(run, file)
        if digest is not None and file not in self._sound:
            if sha256(file) != digest:
                raise RunError(f"{file} was altered since it was written; {ADVICE}")
            self._sound.add(file)
        return digest is not None
