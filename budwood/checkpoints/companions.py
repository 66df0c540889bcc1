"""The small files beside the weights of a folder, which are copied into every folder that is made from it.

A folder is untrusted, and the copy is published: a link in it could pull in any file that the user can read. So only
regular files are taken, and links only to files of the folder itself, or to the blobs of its repository in the hub's
cache, where every file of a snapshot is a link.
"""

from collections.abc import Sequence
from pathlib import Path

from budwood.checkpoints.files import copy_file
from budwood.errors import RunError

COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")
NOT_COMPANIONS = ("config.json", "recipe.json", "report.json", "adapter_config.json")


def companions(source: Path) -> list[Path]:
    """Tokenizer, chat template, generation config, by name."""
    return [file for file in _named(source) if is_own(file)]


def left_out(source: Path) -> str | None:
    """A sentence on the links that are not followed; None without any."""
    links = [file.name for file in _named(source) if file.is_symlink() and not is_own(file)]
    if not links:
        return None
    return (
        f"not copied, as they are links to files outside {source}: {', '.join(links[:4])}{', ...' * (len(links) > 4)}"
    )


def copy_companions(source: Path, target: Path, names: Sequence[str]) -> None:
    """Copies the companions of these names. Raises RunError where one is gone."""
    for name in names:
        file = source / name
        if not is_own(file):
            raise RunError(f"{file} is gone; put it back and give the same command again")
        copy_file(file.resolve(), target / name)


def is_own(file: Path) -> bool:
    """Whether a file of a model folder is a regular one, in the folder itself or among the blobs of the hub's cache."""
    try:
        folder, real = file.parent.resolve(), file.resolve(strict=True)
    except (OSError, RuntimeError):  # a link to nothing, or to itself
        return False
    roots = [folder]
    if folder.parent.name == "snapshots":  # REPOSITORY/snapshots/REVISION, REPOSITORY/blobs
        roots.append(folder.parent.parent / "blobs")  # not resolved: it may be no link
    return real.is_file() and any(real.is_relative_to(root) for root in roots)


def _named(source: Path) -> list[Path]:
    found = {
        file.name: file
        for pattern in COMPANIONS
        for file in source.glob(pattern)
        if file.name not in NOT_COMPANIONS and not file.name.endswith(".index.json") and not file.name.startswith(".")
    }
    return [found[name] for name in sorted(found)]
