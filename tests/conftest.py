"""Fixtures that many tests share: every family, the families with experts, one tiny model."""

import os

import pytest
from families import FAMILIES, MOE, build
from transformers import PreTrainedModel

# By default torch multiplies, for bit-equality; the tests of the kernels set the variable themselves.
os.environ.setdefault("BUDWOOD_KERNELS", "reference")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=MOE)
def moe_family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tiny_model() -> PreTrainedModel:
    return build("llama")
