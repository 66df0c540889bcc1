"""Fixtures that many tests share: every family, the families with experts, one tiny model."""

import pytest
from families import FAMILIES, MOE, build
from transformers import PreTrainedModel


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=MOE)
def moe_family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tiny_model() -> PreTrainedModel:
    return build("llama")
