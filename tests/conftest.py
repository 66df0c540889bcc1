"""Fixtures that many tests share: every family, the families with experts, one tiny model."""

import gc
import os
from collections.abc import Iterator

import pytest
from families import FAMILIES, MOE, build
from transformers import PreTrainedModel

# Unless the environment says otherwise. Tests of bit-equality use `reference`, tests of kernels set their paths.
os.environ.setdefault("BUDWOOD_KERNELS", "reference")


def pytest_collection_finish() -> None:
    """Some millions of objects live until the end; the collector need not walk them after every test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """Files are not flushed to the disk, which only a power cut could tell and which takes a tenth of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda file: None)
        yield


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch multiplies, whatever the environment says: for tests of bit-equality with a dense model."""
    monkeypatch.setenv("BUDWOOD_KERNELS", "reference")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=MOE)
def moe_family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tiny_model() -> PreTrainedModel:
    return build("llama")
