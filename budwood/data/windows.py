"""Windows of one length over a text, and the selection of those for calibration."""

import hashlib
import logging
import random
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from budwood.data.mix import Mix, interleaved, mix_of
from budwood.data.sources import Data, read
from budwood.data.texts import Texts
from budwood.data.tokens import Bos, known_ids, start_token, tokenise
from budwood.errors import UsageError

logger = logging.getLogger(__name__)

Sampling = Literal["random", "consecutive"]
CHARACTERS_PER_TOKEN = 8  # twice what prose has, so that a streamed corpus holds more windows than are chosen


@dataclass(frozen=True)
class Windows:
    """Token windows of one shape, without padding, and a record of their origin."""

    ids: Tensor  # [windows, tokens] int64
    record: dict[str, Any]  # plain JSON


def calibration_windows(
    data: Data,
    tokenizer: Any,
    *,
    num_samples: int = 128,
    seq_length: int = 2048,
    sampling: Sampling = "random",
    seed: int = 0,
    bos: Bos = "auto",
) -> Windows:
    """A selection of the windows into which the documents, joined by empty lines and tokenised as one string, are cut.

    `consecutive` takes the first, `random` draws with the seed and keeps the order of the text. Windows never
    overlap; where the text holds fewer than `num_samples`, all are taken and a warning is logged. Of a mix (see
    `mix_of`) each text gives its share of the windows. Raises UsageError when the data cannot be read or do not fill
    one window.
    """
    if num_samples < 1:
        raise UsageError(f"the number of samples must be at least 1, not {num_samples}")
    if mix := mix_of(data):
        return mixed(mix, tokenizer, num_samples, seq_length=seq_length, sampling=sampling, seed=seed, bos=bos)
    if sampling not in ("random", "consecutive"):
        raise UsageError(f"sampling is random or consecutive, not {sampling!r}")
    prefix = start_token(tokenizer, bos)
    source = read(data, "calibration", num_samples * seq_length * CHARACTERS_PER_TOKEN, tokenizer)
    if isinstance(source, Texts):
        rows, documents = (
            tokenise(source.joined(), tokenizer, bos, source.templated)[None],
            len(source.documents),
        )  # [1, tokens]
    else:
        rows, documents = known_ids(source, tokenizer), len(source.ids)
    windows = cut(rows, seq_length, prefix, source.name)
    if len(windows) < num_samples:
        logger.warning(
            "%s holds %d windows of %d tokens, fewer than the %d asked for: all are used",
            source.name,
            len(windows),
            seq_length,
            num_samples,
        )
    elif sampling == "random":
        windows = windows[sorted(random.Random(seed).sample(range(len(windows)), num_samples))]
    ids = windows[:num_samples].clone()
    record = {
        "data": source.name,
        "documents": documents,
        "tokens_available": rows.numel(),
        "num_samples": len(ids),
        "seq_length": seq_length,
        "sampling": sampling,
        "seed": seed,
        "bos": bos,
        "sha256": digest(ids),
    }
    return Windows(ids, record)


def mixed(mix: Mix, tokenizer: Any, num_samples: int, **options: Any) -> Windows:
    """The windows of all texts of a mix, each by the same options, in turn according to their shares."""
    parts = [
        calibration_windows(name, tokenizer, num_samples=count, **options)
        for (name, _), count in zip(mix.parts, mix.counts(num_samples), strict=True)
    ]
    records = [part.record for part in parts]
    shares = [share for _, share in mix.parts]
    read_as = Mix(tuple((record["data"], share) for record, share in zip(records, shares, strict=True)))
    ids = torch.cat([part.ids for part in parts])[interleaved([len(part.ids) for part in parts])]
    whole = {
        "data": str(read_as),
        "documents": sum(record["documents"] for record in records),
        "tokens_available": sum(record["tokens_available"] for record in records),
        "num_samples": len(ids),
        "mix": {record["data"]: record["num_samples"] for record in records},
        "sha256": digest(ids),
    }
    return Windows(ids, {**records[0], **whole})


def cut(rows: Tensor, seq_length: int, prefix: Tensor, name: str) -> Tensor:
    """All whole windows of the rows [rows, tokens], in order and without overlap: [windows, seq_length].

    Each begins with `prefix` [0 or 1], which counts towards its length. Raises UsageError when a row fills no window.
    """
    if seq_length < 2:
        raise UsageError(f"a window needs at least 2 tokens, not {seq_length}")
    width = seq_length - len(prefix)
    whole = rows.shape[1] // width
    if whole == 0:
        raise UsageError(
            f"{name} holds {rows.shape[1]} tokens, too few for one window of {seq_length}; "
            "give more text or a smaller sequence length"
        )
    windows = rows[:, : whole * width].reshape(-1, width)  # [windows, width]
    return torch.cat([prefix.expand(len(windows), -1), windows], dim=1)


def digest(ids: Tensor) -> str:
    """SHA-256 of the ids as little-endian 64-bit numbers."""
    return hashlib.sha256(ids.contiguous().numpy().astype("<i8").tobytes()).hexdigest()
