"""The windows that perplexity is measured on, in the three ways that published figures use."""

import math
import random
from typing import Any, Literal

import torch
from torch import Tensor

from budwood.data.sources import Data, read
from budwood.data.texts import Texts
from budwood.data.tokens import Bos, known_ids, start_token, tokenise
from budwood.data.windows import CHARACTERS_PER_TOKEN, Windows, cut, digest
from budwood.errors import UsageError

Variant = Literal["plain", "gptq", "c4-random"]
RANDOM_WINDOWS = 256  # of c4-random, as GPTQ and WRP draw them


def evaluation_windows(
    data: Data,
    tokenizer: Any,
    *,
    variant: Variant = "plain",
    seq_length: int = 2048,
    limit: int | None = None,
    bos: Bos = "auto",
    seed: int = 0,
) -> Windows:
    """Windows of one length, at most `limit`; only `c4-random` uses the seed.

    plain: the text as one string, documents joined by an empty line, cut without overlap, the tail dropped.
    gptq: the same over rows joined by two newlines, as GPTQ, SparseGPT and Wanda read WikiText-2. A row is a
    line of a text file with its newline, or a document of any other source.
    c4-random: a random window of a random document that fills one, 256 times.

    Raises UsageError when the data cannot be read, do not fill one window, or do not fit the variant.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"the number of windows must be at least 1, not {limit}")
    if variant not in ("plain", "gptq", "c4-random"):
        raise UsageError(f"the variant is plain, gptq or c4-random, not {variant!r}")
    prefix = start_token(tokenizer, bos)
    enough = math.inf if variant == "c4-random" else limit and limit * seq_length * CHARACTERS_PER_TOKEN
    source = read(data, "evaluation", enough, tokenizer)
    if not isinstance(source, Texts):
        if variant != "plain":
            raise UsageError(f"{source.name} holds token ids, which have no documents or rows; use the variant plain")
        tokens, documents = known_ids(source, tokenizer), len(source.ids)
        ids = cut(tokens, seq_length, prefix, source.name)[:limit]
        available = tokens.numel()
    elif variant == "c4-random":
        documents = len(source.documents)
        count = min(limit or RANDOM_WINDOWS, RANDOM_WINDOWS)
        ids, available = random_windows(source, tokenizer, seq_length, prefix, bos, count, random.Random(seed))
    else:
        text = source.joined() if variant == "plain" else "\n\n".join(source.rows())
        tokens, documents = tokenise(text, tokenizer, bos, source.templated)[None], len(source.documents)
        ids = cut(tokens, seq_length, prefix, source.name)[:limit]
        available = tokens.numel()
    record = {
        "data": source.name,
        "variant": variant,
        "documents": documents,
        "tokens_available": available,
        "windows": len(ids),
        "seq_length": seq_length,
        "bos": bos,
        "seed": seed if variant == "c4-random" else None,
        "sha256": digest(ids),
    }
    return Windows(ids.clone(), record)


def random_windows(
    source: Texts,
    tokenizer: Any,
    seq_length: int,
    prefix: Tensor,
    bos: Bos,
    count: int,
    generator: random.Random,
) -> tuple[Tensor, int]:
    """Windows [count, seq_length] of documents drawn until one is long enough, and the number of tokens read.

    The draws are those of the published code, which stops in an error at a document of exactly one window;
    here that window is used. Raises UsageError when every document is too short.
    """
    width = seq_length - len(prefix)
    seen: dict[int, Tensor] = {}
    windows: list[Tensor] = []
    while len(windows) < count:
        index = generator.randint(0, len(source.documents) - 1)
        if index not in seen:
            seen[index] = tokenise(source.documents[index], tokenizer, bos, source.templated)
        tokens = seen[index]
        if len(tokens) >= width:
            start = generator.randint(0, max(len(tokens) - width - 1, 0))
            windows.append(torch.cat([prefix, tokens[start : start + width]]))
        elif not windows and len(seen) == len(source.documents):
            raise UsageError(
                f"{source.name}: no document fills a window of {seq_length} tokens, the longest of "
                f"{len(seen)} has {max(map(len, seen.values()))}; "
                "use the variant plain or a smaller sequence length"
            )
    return torch.stack(windows), sum(len(tokens) for tokens in seen.values())
