"""The header of a GGUF file, walked through before the library opens it: what it would cost to read.

The library makes an object of some 600 bytes for every entry of every list, whatever the entry is.
"""

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from budwood.errors import RunError, UsageError

# Of a number, by the code of its type; 8 is text and 9 a list.
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
TEXT, LIST = 8, 9
# Four times the lists of the largest published vocabulary: 256,000 tokens with scores and kinds, 500,000 merges.
ENTRIES = 1 << 21
NUMBERS = 1 << 20  # of them in lists of numbers
PAIRS = 1 << 16  # settings
TENSORS = 1 << 20


@dataclass
class Header:
    """settings: of the architecture, without its name. tables: small tensors that are no parameters, by name."""

    settings: Mapping[str, Any]
    tables: Mapping[str, Any]
    file: object

    def refusal(self, name: str, why: str) -> UsageError:
        return UsageError(
            f"{self.file} says {name} = {self.settings.get(name)!r}, {why}; convert it with the program that wrote it"
        )


def check_costs(file: Path) -> None:
    """RunError where the header has more entries than that of a model, or does not fit the file."""
    try:
        with open(file, "rb") as stream:
            _walk(stream, os.fstat(stream.fileno()).st_size)
    except (ValueError, struct.error) as error:
        raise RunError(f"{file} is truncated or damaged: {error}; fetch it again") from error


def _walk(stream: BinaryIO, size: int) -> None:
    stream.seek(4)
    version = stream.read(4)
    order = "<" if len(version) < 4 or struct.unpack("<I", version)[0] < 1 << 16 else ">"

    def number(code: str) -> int:
        return int(struct.unpack(order + code, stream.read(struct.calcsize(code)))[0])

    def skip(length: int) -> None:
        if length > size - stream.tell():
            raise ValueError(f"its header promises {length} bytes at {stream.tell()}, and it has {size}")
        stream.seek(length, os.SEEK_CUR)

    tensors, pairs = number("Q"), number("Q")
    if tensors > TENSORS or pairs > PAIRS:
        raise ValueError(f"its header promises {tensors} tensors and {pairs} settings")
    entries = numbers = 0
    for _ in range(pairs):
        skip(number("Q"))  # the name
        kind = number("I")
        count = 1
        listed = kind == LIST
        if listed:
            kind, count = number("I"), number("Q")
            entries += count
            numbers += count if kind in SIZES else 0
        if entries > ENTRIES or numbers > NUMBERS:
            raise ValueError(f"the lists of its header have {entries} entries, {numbers} of them numbers")
        if kind in SIZES:
            skip(count * SIZES[kind])
        elif kind == TEXT:
            for _ in range(count):
                skip(number("Q"))
        else:
            raise ValueError(f"its header holds a value of the unknown type {kind}")
