"""Texts and token ids from local files. Nothing here can run code from a file."""

import gzip
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from budwood.checkpoints.reader import Shards
from budwood.checkpoints.sidecars import parse
from budwood.data.budget import Budget, Unpacked
from budwood.data.rows import MESSAGES, OTHER, STRUCTURE, TEXT, Chat, RowReader, fields_of
from budwood.data.texts import Texts, TokenIds
from budwood.errors import UsageError

LONGEST = 64 * 2**20  # bytes of a line
ROWS = 64  # of a table in memory at a time
PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle")


def suffix_of(path: Path) -> str:
    """The last suffix, or the last two of a compressed file: `.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return "".join(suffixes[-2:]) if suffixes[-1:] == [".gz"] else "".join(suffixes[-1:])


@dataclass
class Reading:
    """How texts are read. budget: how much of them. chat: writes a conversation as text, None without a tokenizer."""

    budget: Budget = field(default_factory=Budget)
    chat: Chat | None = None


def read_texts(path: Path, name: str, reading: Reading | None = None) -> Texts:
    """The documents of one text file; raises UsageError where it is unreadable, malformed or empty."""
    try:
        texts = TEXT_READERS[suffix_of(path)](path, name, reading or Reading())
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{name} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 text: byte {error.start} does not fit; convert it first") from error
    if not any(document.strip() for document in texts.documents):
        raise UsageError(f"{name} holds no text")
    return texts


def plain(path: Path, name: str, reading: Reading) -> Texts:
    # Decoded from bytes: reading as text would turn carriage returns into newlines and change the tokens.
    size, most = path.stat().st_size, reading.budget.left
    with open(path, "rb") as stream:
        content = stream.read() if size <= most else stream.read(int(most))
    if len(content) < size:
        content = content[: content.rfind(b"\n") + 1] or content.decode("utf-8", "ignore").encode()
    text = content.decode("utf-8-sig")
    reading.budget.take(len(text), name, cut=len(content) < size)
    return Texts(name, (text,), rows_are_lines=True)


def json_lines(path: Path, name: str, reading: Reading) -> Texts:
    rows = (parse_row(line, f"{name}, line {number}") for number, line in lines(path, name) if line.strip())
    return of_rows(rows, name, reading, RowReader(chat=reading.chat))


def lines(path: Path, name: str) -> Iterator[tuple[int, str]]:
    """The lines of a text file, packed or not, with their numbers, read one at a time.

    Split at newlines only: JSON strings may hold other characters that `splitlines` takes for line ends.
    Raises UsageError for a line of more than `LONGEST` bytes.
    """
    packed = suffix_of(path).endswith(".gz")
    unpacked = Unpacked(path.stat().st_size, name) if packed else None
    start = 0
    with gzip.open(path, "rb") if packed else open(path, "rb") as stream:
        for number in itertools.count(1):
            line = stream.readline(LONGEST + 1)
            if not line:
                return
            if len(line) > LONGEST:
                raise UsageError(f"{name}, line {number}: it has more than {LONGEST} bytes, so it is no row of texts")
            if unpacked is not None:
                unpacked.add(len(line))
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                error.start += start
                raise
            start += len(line)


def of_rows(
    rows: Iterable[tuple[str, dict[str, Any]]],
    name: str,
    reading: Reading,
    reader: RowReader,
    packed: int | None = None,
) -> Texts:
    """The texts of the rows, as far as they are needed. packed: bytes of the file, where rows can be larger than it."""
    documents = []
    unpacked = None if packed is None else Unpacked(packed, name)
    for text in reader.texts(rows):
        documents.append(text)
        if unpacked is not None:
            unpacked.add(len(text))
        if not reading.budget.take(len(text), name):
            break
    return Texts(name, tuple(documents), templated=reader.templated)


def parse_row(line: str, where: str) -> tuple[str, dict[str, Any]]:
    try:
        row = parse(line)
    except ValueError as error:
        raise UsageError(f"{where}: not JSON ({error}); each line must be one object") from error
    if not isinstance(row, dict):
        raise UsageError(f"{where}: each line must be a JSON object with a field `text`")
    return where, row


def parquet(path: Path, name: str, reading: Reading) -> Texts:
    try:
        from pyarrow import ArrowException
        from pyarrow import parquet as tables
    except ImportError as error:
        raise UsageError(f"{name}: reading parquet needs pyarrow; run: pip install pyarrow") from error
    size = path.stat().st_size
    try:
        schema = tables.read_schema(path)
        kinds = {column.name: kind_of_column(column.type) for column in schema}
        fields = fields_of(kinds, name)
        # Kept as a dictionary in memory: repeated strings take a multiple of the file.
        strings = [column for column in fields if kinds[column] == TEXT]
        with tables.ParquetFile(path, read_dictionary=strings) as file:
            declared = Unpacked(size, name)
            for group in range(file.metadata.num_row_groups):  # not each column: of damaged ones pyarrow calls abort()
                declared.add(file.metadata.row_group(group).total_byte_size)
            reader = RowReader(fields, named=False, chat=reading.chat, nulls=True)
            return of_rows(rows_of(file, fields, kinds, name), name, reading, reader, packed=size)
    except ArrowException as error:
        raise UsageError(f"{name} is not a readable parquet file: {error}") from error


def kind_of_column(type: Any) -> str:
    """What a column of a table holds, as `kind` says it of a value."""
    from pyarrow import types

    if types.is_dictionary(type):
        type = type.value_type
    if types.is_string(type) or types.is_large_string(type):
        return TEXT
    if not (types.is_list(type) or types.is_large_list(type)):
        return STRUCTURE if types.is_struct(type) or types.is_map(type) else OTHER
    inner = type.value_type
    names = [inner.field(place).name for place in range(inner.num_fields)] if types.is_struct(inner) else []
    return MESSAGES if {"role", "content"} <= set(names) else STRUCTURE


def rows_of(
    file: Any, fields: Sequence[str], kinds: Mapping[str, str], name: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a table, a few in memory at a time; their other fields by name alone."""
    others = dict.fromkeys(kinds)
    place = 0
    for batch in file.iter_batches(batch_size=ROWS, columns=list(fields)):
        for row in zip(*(batch.column(column) for column in fields), strict=True):
            place += 1
            values = {column: scalar.as_py() for column, scalar in zip(fields, row, strict=True)}
            yield f"{name}, row {place}", {**others, **values}


TEXT_READERS: dict[str, Callable[[Path, str, Reading], Texts]] = {
    ".txt": plain,
    ".raw": plain,
    ".jsonl": json_lines,
    ".jsonl.gz": json_lines,
    ".parquet": parquet,
}


def read_ids(path: Path, name: str) -> TokenIds:
    """Token ids of an array file; of safetensors the only tensor, or the one called `ids` or `input_ids`."""
    if path.suffix.lower() == ".npy":
        try:
            # Mapped first: a header that promises more than the file has is refused before memory is taken for it.
            numpy.load(path, mmap_mode="r", allow_pickle=False)
            array = numpy.load(path, allow_pickle=False)
        except Exception as error:  # of a dozen kinds, down to those of the tokenizer of Python for its header
            raise UsageError(f"{name} is not a readable array of numbers: {error}") from error
        if not isinstance(array, numpy.ndarray):
            raise UsageError(f"{name} is an archive of arrays; save the token ids alone as .npy")
        if not numpy.issubdtype(array.dtype, numpy.integer):
            raise UsageError(f"{name} holds {array.dtype}, not whole numbers; token ids are integers")
        return token_ids(name, torch.from_numpy(array.astype(numpy.int64)))
    shards = Shards([path])
    names = shards.names()
    chosen = next((key for key in ("ids", "input_ids") if key in names), names[0] if len(names) == 1 else None)
    if chosen is None:
        raise UsageError(f"{name} holds {len(names)} tensors; call the one with the token ids `ids`")
    return token_ids(name, shards.read(chosen))


def token_ids(name: str, ids: Tensor) -> TokenIds:
    """Ids as [rows, tokens]; raises UsageError for fractions, negative numbers, or more than two dimensions."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise UsageError(f"{name} holds {ids.dtype}, not whole numbers; token ids are integers")
    if ids.ndim not in (1, 2) or ids.numel() == 0:
        raise UsageError(f"{name} has the shape {list(ids.shape)}; token ids are [tokens] or [rows, tokens]")
    rows = ids.detach().to("cpu", torch.int64).reshape(-1, ids.shape[-1])  # [rows, tokens]
    if int(rows.min()) < 0:
        raise UsageError(f"{name} holds the negative token id {int(rows.min())}; padding is not supported")
    return TokenIds(name, rows)
