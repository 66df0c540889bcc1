"""The paths of the native library that this machine can run."""

import pytest

from budwood.kernels import native


def runs(path: str) -> bool:
    library = native.opened("auto") if native.file() else None
    if library is None:
        return False
    found = bool(library.budwood_choose(path.encode()))
    native._chosen = ""  # the next product sets the path that the variable names
    return found


def use(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the library take this path during a test, which is skipped where it cannot."""
    if not runs(path):
        pytest.skip(f"this machine cannot run the {path} path")
    monkeypatch.setenv(native.VARIABLE, path)
