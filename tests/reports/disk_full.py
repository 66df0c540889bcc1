"""A disk without room."""

import pytest

from budwood.checkpoints import files


def full(monkeypatch: pytest.MonkeyPatch, allowed: int) -> None:
    """Every file after the first `allowed` ones meets a full disk when it is flushed."""
    real, written = files.flush, []

    def flush(file):  # type: ignore[no-untyped-def]
        written.append(file)
        if len(written) > allowed:
            raise OSError(28, "No space left on device", str(file))
        real(file)

    monkeypatch.setattr(files, "flush", flush)
