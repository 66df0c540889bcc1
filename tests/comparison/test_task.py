"""A run of a comparison is known by its identity."""

import json
from dataclasses import fields

import pytest

from budwood.comparison.task import FILE, Task


@pytest.mark.parametrize(
    ("theirs", "sentence"),
    [
        ({"source": {"name": "m", "seed": None}}, None),
        ({"source": {"name": "m"}}, "its source is"),  # without a null that this one has
        ({"source": {"name": "m", "seed": 1}}, "its seed is 1, asked for is null"),
        ({}, "its source is null"),
    ],
)
def test_in_what_another_run_differs_is_said(tmp_path, theirs, sentence):
    task = Task(
        **{field.name: None for field in fields(Task)}
        | {"folder": tmp_path, "identity": {"source": {"name": "m", "seed": None}}}
    )
    assert task.difference() is None
    (tmp_path / FILE).write_text(json.dumps({"identity": theirs}))
    found = task.difference()
    assert found is None if sentence is None else sentence in found
