"""The source of a run: whether it still is what an earlier call of the same command read."""

from pathlib import Path

from budwood.checkpoints.companions import companions
from budwood.checkpoints.reader import read_header, shard_files
from budwood.checkpoints.reads import Reads
from budwood.checkpoints.source import Source
from budwood.errors import BudwoodError, RunError
from budwood.runs.recipe import Recipe
from budwood.runs.target import WORK

READS = "reads.json"  # in the folder of intermediate results


class Reading:
    """Takes note of every tensor that is read of `source`.

    expected: the digest of a source that the run is to repeat, None without such; see `recipe_options`.
    """

    def __init__(self, source: Source):
        self.source, self.reads = source, Reads(source.shards)
        self.expected: str | None = None
        source.shards.seen = self.reads.note

    def keep(self, work: Path) -> None:
        """To be called before anything is kept that was made of the source. work: folder of intermediate results."""
        self.reads.save(work / READS)

    def content(self) -> str:
        """The digest of all that the source holds."""
        return self.reads.whole(companions(self.source.folder))

    def difference(self, found: Recipe, folder: Path) -> str | None:
        """How the run of the recipe `found`, in `folder`, had another source, as a sentence; None where it had not.

        Reads again what that run has read.
        """
        whole, kept = found.source.get("content"), folder / WORK / READS
        finished = (folder / "config.json").is_file()
        if finished and _is_saved_over(folder):
            return "another program has saved a model over it"
        if whole is not None:
            same = whole == self.content()
        elif kept.is_file():
            same = self.reads.resume(kept)
        else:  # nothing is made of the source yet, or a version finished it that kept no digest
            same = finished or not any(folder.glob("*-of-*.safetensors"))
        return None if same else f"the files of {self.source.name} held something else when it read them"

    def finished(self, recipe: Recipe) -> tuple[Recipe, str | None]:
        """The recipe with what the source was, and a note where that is not what was expected.

        Raises RunError where the source has changed since the run began.
        """
        content, before = self.content(), recipe.source.get("content")
        if before not in (None, content):
            raise RunError(f"{self.source.name} was changed during the run; give the command again with --overwrite")
        other = self.expected not in (None, content)
        note = f"{self.source.name} is not the model of the recipe, so the folder is another one" if other else None
        return recipe.with_content(content), note


def _is_saved_over(folder: Path) -> bool:
    """Whether the weights that a folder means are not those of a run, as after `save_pretrained` into it."""
    try:
        return any("budwood" not in read_header(file)[1] for file in shard_files(folder))
    except BudwoodError:
        return False
