"""A small seeded part of `make fuzz`: inputs are accepted or refused with a sentence, and what is accepted is sound.

Inputs that need a process of their own (hangs, memory, crashes of libraries) are left to the campaign.
"""

import contextlib
import random
import struct

import pytest
from fuzz_campaign import answer
from fuzz_mutate import mutated, shard_mutated, split_shard
from fuzz_seeds import Seeds
from fuzz_targets import TARGETS

INPUTS = {"shard": 40, "packed tensors": 80, "recipe": 40, "report": 25, "expression": 80, "option": 60, "data": 30}
INPUTS |= {"index": 15, "manifest": 30, "compare recipe": 40}
SLOW = {"config", "config, loaded", "packed config", "packed folder", "unfinished run", "gguf header", "gguf model"}
SLOW |= {"tokenizer", "compare records", "page", "page, drawn", "unfinished training"}


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    return Seeds(tmp_path_factory.mktemp("seeds"))


def test_every_target_is_in_one_list():
    assert INPUTS.keys() | SLOW == {target.name for target in TARGETS}


@pytest.mark.parametrize(
    "target", [target for target in TARGETS if target.name in INPUTS], ids=lambda target: target.name
)
def test_inputs_are_accepted_or_refused(seeds, tmp_path, target):
    found = [answer(number, 0, [target], seeds, tmp_path / "input") for number in range(INPUTS[target.name])]
    findings = {number: what for number, what in enumerate(found) if what[1] not in ("accepted", "refused")}
    assert not findings


def test_the_same_seed_gives_the_same_input():
    value = {"a": [1, 2, {"b": "text"}], "c": None}
    changed = [mutated(random.Random(f"0 {number}"), value) for number in range(50)]
    assert changed == [mutated(random.Random(f"0 {number}"), value) for number in range(50)]
    assert value == {"a": [1, 2, {"b": "text"}], "c": None}
    assert sum(one != value for one in changed) > 40


def test_mutated_shards_reach_behind_the_header(seeds):
    """Most can be parsed, so that what they say is refused, not only their length."""
    data = sorted(seeds.packed("two_four_compact").glob("*.safetensors"))[1].read_bytes()
    readable = 0
    for number in range(40):
        with contextlib.suppress(ValueError, struct.error):
            readable += bool(split_shard(shard_mutated(random.Random(number), data)))
    assert readable > 10
