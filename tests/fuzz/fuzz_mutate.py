"""Mutations that know the structure of what they change: JSON values, headers of safetensors files, bytes, texts."""

import copy
import json
import struct
from random import Random
from typing import Any

NUMBERS = (0, 1, -1, 2, 3, 7, 255, 256, 4096, 2**31 - 1, 2**31, 2**53, 2**63, 2**70, 0.0, -0.5, 0.25, 1e308, 1e-320)
TEXTS = (
    "",
    "x",
    "../x",
    "/etc/hostname",
    "a/b",
    ".",
    "auto",
    "2:4",
    "\x1b[31mred",
    "\u202e",
    "\ud800",
    "é" * 70,
    "(a+)+$",
)
OTHERS = (None, True, False, [], {}, [[]], [0], [1, 2], {"a": 1}, [None], ["x"], [{}], {"": {"": []}})
LITERALS = (
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"1e999",
    b"9" * 5000,
    b"[" * 3000,
    b'"\\ud800"',
    b"\x00",
    b"\xff\xfe",
    b"0x10",
)


def any_value(chance: Random) -> Any:
    """A value of any type that JSON has."""
    return copy.deepcopy(chance.choice(chance.choice((NUMBERS, TEXTS, OTHERS))))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside a value, itself included."""
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value))
    return [path, *(place for key, part in inner for place in places(part, (*path, key)))]


def mutated(chance: Random, value: Any, most: int = 3) -> Any:
    """A copy with one to `most` changes anywhere."""
    value = copy.deepcopy(value)
    for _ in range(chance.randint(1, most)):
        value = _changed(chance, value)
    return value


def _changed(chance: Random, value: Any) -> Any:
    *above, key = chance.choice(places(value)[1:] or [(None,)])
    if key is None:
        return any_value(chance)
    parent = value
    for step in above:
        parent = parent[step]
    old = parent[key]
    action = chance.randrange(8)
    if action == 0:
        del parent[key]
    elif action == 1 and isinstance(parent, dict):
        parent[chance.choice(TEXTS)] = parent.pop(key)
    elif action == 2 and isinstance(parent, dict):
        parent[chance.choice(list(parent))] = copy.deepcopy(old)  # over another
    elif action == 3 and isinstance(parent, list):
        parent.insert(key, copy.deepcopy(chance.choice(parent)))
    elif action in (4, 5) and type(old) in (int, float):
        parent[key] = chance.choice((old + 1, old - 1, 2 * old, -old, old // 2, float(old), old + 256, old * 65536))
    elif action in (4, 5) and isinstance(old, str):
        parent[key] = text_mutated(chance, old)
    elif action == 6:
        parent[chance.choice(TEXTS) if isinstance(parent, dict) else key] = any_value(chance)
    else:
        parent[key] = any_value(chance)
    return value


def json_bytes(chance: Random, value: Any, most: int = 3) -> bytes:
    """A mutated value as JSON, and seldom as what is no JSON any more."""
    data = json.dumps(mutated(chance, value, most)).encode()
    return bytes_mutated(chance, data) if chance.random() < 0.1 else data


def bytes_mutated(chance: Random, data: bytes) -> bytes:
    """Bits flipped, parts cut out, doubled or replaced."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        start = chance.randint(0, len(changed))
        stop = min(len(changed), start + chance.choice((1, 2, 8, 100)))
        action = chance.randrange(6)
        if action == 0:
            changed[start:stop] = bytes(chance.randrange(256) for _ in range(stop - start))
        elif action == 1:
            changed[start:start] = changed[start:stop]
        elif action == 2:
            del changed[start:stop]
        elif action == 3:
            changed[start:start] = chance.choice(LITERALS)
        elif action == 4:
            del changed[chance.randint(0, len(changed)) :]
        elif start < len(changed):
            changed[start] ^= 1 << chance.randrange(8)
    return bytes(changed)


def text_mutated(chance: Random, text: str) -> str:
    """A piece of the text cut out, doubled, replaced, or put elsewhere."""
    start = chance.randint(0, len(text))
    stop = min(len(text), start + chance.randint(0, 5))
    place = chance.randint(0, len(text))
    piece = chance.choice(
        (text[start:stop], "", chance.choice(TEXTS), chance.choice("()[]{}=,:;'\"*_-.%0123456789 \n\\"))
    )
    return chance.choice((text[:start] + piece + text[stop:], text[:place] + piece + text[place:], text[:start]))


def split_shard(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and tensor bytes of a safetensors file."""
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_shard(header: bytes, tensors: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + tensors


def shard_mutated(chance: Random, data: bytes) -> bytes:
    """Another header over the same tensors, the same header over others, or a length that is not the header's."""
    header, tensors = split_shard(data)
    kind = chance.randrange(6)
    if kind == 0:
        return bytes_mutated(chance, data)
    if kind == 1:
        return struct.pack("<Q", chance.choice((0, 1, 2**20, 10**8, 10**8 + 1, 2**63, 2**64 - 1))) + data[8:]
    text = json_bytes(chance, header, 2)
    if kind == 2:
        name = json.dumps(chance.choice(list(header)))
        text = text[:-1] + f",{name}:{json.dumps(any_value(chance))}".encode() + text[-1:]  # a name twice
    return join_shard(text, tensors if chance.random() < 0.8 else bytes_mutated(chance, tensors))
