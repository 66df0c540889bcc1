"""Texts and token ids from local files. Nothing here can run code from a file."""

import gzip
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from budwood.checkpoints.reader import Shards
from budwood.data.rows import text_field, texts_of
from budwood.data.texts import Texts, TokenIds
from budwood.errors import UsageError

PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle")


def suffix_of(path: Path) -> str:
    """The last suffix, or the last two of a compressed file: `.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return "".join(suffixes[-2:]) if suffixes[-1:] == [".gz"] else "".join(suffixes[-1:])


def read_texts(path: Path, name: str) -> Texts:
    """The documents of one text file; raises UsageError where it is unreadable, malformed or empty."""
    try:
        texts = TEXT_READERS[suffix_of(path)](path, name)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{name} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 text: byte {error.start} does not fit; convert it first") from error
    if not any(document.strip() for document in texts.documents):
        raise UsageError(f"{name} holds no text")
    return texts


def plain(path: Path, name: str) -> Texts:
    # Decoded from bytes: reading as text would turn carriage returns into newlines and change the tokens.
    return Texts(name, (path.read_bytes().decode("utf-8-sig"),), rows_are_lines=True)


def json_lines(path: Path, name: str) -> Texts:
    content = path.read_bytes()
    if suffix_of(path).endswith(".gz"):
        content = gzip.decompress(content)
    # Split at newlines only: JSON strings may hold other characters that `splitlines` takes for line ends.
    lines = enumerate(content.decode("utf-8-sig").split("\n"), start=1)
    rows = (parse(line, f"{name}, line {number}") for number, line in lines if line.strip())
    return Texts(name, tuple(texts_of(rows)))


def parse(line: str, where: str) -> tuple[str, dict[str, Any]]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{where}: not JSON ({error}); each line must be one object") from error
    if not isinstance(row, dict):
        raise UsageError(f"{where}: each line must be a JSON object with a field `text`")
    return where, row


def parquet(path: Path, name: str) -> Texts:
    try:
        from pyarrow import ArrowException, types
        from pyarrow import parquet as tables
    except ImportError as error:
        raise UsageError(f"{name}: reading parquet needs pyarrow; run: pip install pyarrow") from error
    try:
        schema = tables.read_schema(path)
        strings = (field.name for field in schema if types.is_string(field.type) or types.is_large_string(field.type))
        field = text_field(strings, name)
        documents = tables.read_table(path, columns=[field]).column(field).to_pylist()
    except ArrowException as error:
        raise UsageError(f"{name} is not a readable parquet file: {error}") from error
    return Texts(name, tuple(document for document in documents if document is not None))


TEXT_READERS: dict[str, Callable[[Path, str], Texts]] = {
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
            array = numpy.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UsageError(f"{name} is not a readable array of numbers: {error}") from error
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
