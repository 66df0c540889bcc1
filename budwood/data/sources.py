"""Reads `data`, which is a list, a tensor, a name, a file or a folder, as `Texts` or `TokenIds`."""

import difflib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from budwood.checkpoints.chat import as_text
from budwood.data.budget import Budget
from budwood.data.files import PICKLES, TEXT_READERS, Reading, read_ids, read_texts, suffix_of, token_ids
from budwood.data.hub import C4_EVALUATION, C4_TRAINING, HubRows, hub_rows, wikitext2
from budwood.data.mix import mix_of
from budwood.data.speeches import speeches
from budwood.data.texts import Purpose, Texts, TokenIds, check_text
from budwood.errors import UsageError

Data = str | Path | Sequence[str] | Tensor | Mapping[str, float]  # the last is a mix, see `mix_of`
ID_SUFFIXES = (".npy", ".safetensors")
NAMES = ("sotu", "wikitext2", "c4", "hf:REPO[:CONFIG]:SPLIT[:FIELD]")


def read(data: Data, purpose: Purpose, characters: float | None = None, tokenizer: Any = None) -> Texts | TokenIds:
    """Reads the data. A name selects one part of its corpus for calibration and another for evaluation.

    characters: how much text is needed; a streamed corpus is not read much further. None: its default amount;
    `math.inf`: all of it. tokenizer: writes conversations by its chat template. Raises UsageError for data that cannot
    be read.
    """
    if isinstance(data, Tensor):
        return token_ids("token ids", data)
    if mix := mix_of(data):
        raise UsageError(f"{str(mix)!r} is a mix, which serves for calibration only; give one text")
    if not isinstance(data, str | Path):
        documents = tuple(data)
        if not all(isinstance(document, str) for document in documents):
            raise UsageError("a list of data must hold only strings, one document each")
        if not any(document.strip() for document in documents):
            raise UsageError("the list of strings holds no text")
        for place, document in enumerate(documents):
            check_text(document, f"document {place} of the list")
        return Texts("list of strings", documents)
    name = str(data)
    chat = None if tokenizer is None else partial(as_text, tokenizer)
    if name == "sotu" or name.startswith("sotu:"):
        return speeches(name, purpose)
    if name == "wikitext2":
        return wikitext2(purpose)
    if name == "c4":
        rows = C4_TRAINING if purpose == "calibration" else C4_EVALUATION
        return hub_rows(name, rows, characters, chat)
    if name.startswith("hf:"):
        return hub_rows(name, HubRows.parse(name), characters, chat)
    return read_path(Path(name), name, Reading(Budget(characters), chat))


def are_token_ids(data: Data) -> bool:
    """Whether the data need no tokenizer."""
    if mix := mix_of(data):
        return all(are_token_ids(name) for name, _ in mix.parts)
    return isinstance(data, Tensor) or (isinstance(data, str | Path) and Path(data).suffix in ID_SUFFIXES)


def read_path(path: Path, name: str, reading: Reading) -> Texts | TokenIds:
    """A file by its suffix, or a folder: its text files in order of name."""
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if suffix_of(file) in TEXT_READERS and file.is_file()]
        if not files:
            raise UsageError(f"{name} holds no text file; the kinds read are {', '.join(TEXT_READERS)}")
        parts: list[Texts] = []
        for file in files:
            if not parts or reading.budget.left:
                parts.append(read_texts(file, str(file), reading))
        documents = tuple(document for part in parts for document in part.documents)
        return Texts(
            name,
            documents,
            rows_are_lines=all(part.rows_are_lines for part in parts),
            templated=all(part.templated for part in parts),
        )
    suffix = suffix_of(path)
    if not path.is_file():
        near = difflib.get_close_matches(name, ["sotu", "wikitext2", "c4"], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"no file, folder or data set is called {name!r}; {hint}Names are: {', '.join(NAMES)}")
    if suffix in TEXT_READERS:
        return read_texts(path, name, reading)
    if suffix in ID_SUFFIXES:
        return read_ids(path, name)
    if suffix in PICKLES:
        raise UsageError(
            f"{name} is a pickle, which can run code when it is opened; save the token ids as .npy or .safetensors"
        )
    raise UsageError(
        f"{name}: no reader for {suffix or 'a file without suffix'}; texts are {', '.join(TEXT_READERS)}, "
        "token ids .npy, .safetensors"
    )
