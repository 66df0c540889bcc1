"""A small part of the campaign in `mutants.py`: damaged tensors are refused, or their products are right."""

import os

import pytest
from mutants import campaign

from budwood.kernels import native

COUNT = int(os.environ.get("BUDWOOD_MUTANTS", 150))


@pytest.mark.skipif(native.file() is None, reason="the native library is not built")
def test_damaged_tensors_are_refused_or_multiplied_as_they_unpack():
    done = campaign(COUNT, seed=1)
    assert done["accepted"] > COUNT // 10
    assert done["refused"] > COUNT // 10
