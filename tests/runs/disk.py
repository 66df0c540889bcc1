"""What is on the disk: the content of a folder, and every state that a killed run can leave of it."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

CALIBRATION = {
    "num_samples": 4,
    "seq_length": 24,
    "compute_dtype": "float32",
    "sparse_products": "off",
    "attention": "fused",
}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones included, by relative path."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def model_files(folder: Path) -> dict[str, bytes]:
    """The files that the same command writes again byte for byte: all but those that hold times."""
    timed = ("report.json", "report.md", "README.md")
    return {name: content for name, content in contents(folder).items() if name not in timed}


def crash_states(
    monkeypatch: pytest.MonkeyPatch, folder: Path, states: Path, action: Callable[[], object]
) -> list[Path]:
    """Runs `action` once; copies of `folder` as a SIGKILL would have left it before every rename and deletion.

    Adjacent copies that are equal are kept once.
    """
    found: list[Path] = []

    def snapshot() -> None:
        if folder.is_dir() and not (found and contents(found[-1]) == contents(folder)):
            found.append(states / f"{len(found):03d}")
            shutil.copytree(folder, found[-1])

    def before(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **options: object) -> object:
            snapshot()
            return real(*args, **options)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", before(os.replace))
        patched.setattr(os, "unlink", before(os.unlink))
        patched.setattr(shutil, "rmtree", before(shutil.rmtree))
        action()
    return found
