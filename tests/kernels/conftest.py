"""Every path of the native library that this machine can run."""

import pytest
from native_paths import runs

from budwood.kernels import native

PATHS = [
    pytest.param(path, marks=pytest.mark.skipif(not runs(path), reason=f"this machine cannot run the {path} path"))
    for path in ("scalar", "avx2", "avx512", "amx")
]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The path, in use."""
    monkeypatch.setenv(native.VARIABLE, request.param)
    assert native.active() == request.param
    return request.param


@pytest.fixture
def fastest(monkeypatch: pytest.MonkeyPatch) -> str:
    """The path that a user of this machine gets, in use."""
    if native.file() is None:
        pytest.skip("the native library is not built")
    monkeypatch.setenv(native.VARIABLE, "auto")
    return native.active()
