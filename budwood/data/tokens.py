"""From data to rows of token ids, and the position of the start token (BOS)."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from budwood.checkpoints.tokenizer import load_tokenizer
from budwood.data.sources import Data, are_token_ids
from budwood.data.texts import TokenIds
from budwood.errors import UsageError

# auto: the tokenizer's own special tokens for a text as a whole, as in published figures.
# every: one start token before each window. none: no special tokens at all.
Bos = Literal["auto", "every", "none"]


def tokenizer_for(folder: Path, data: Data) -> Any:
    """The tokenizer of a model; None where there is none and none is needed. Raises UsageError when text needs one."""
    try:
        return load_tokenizer(folder)
    except UsageError:
        if are_token_ids(data):
            return None
        raise


def tokenise(text: str, tokenizer: Any, bos: Bos) -> Tensor:
    """The ids of the text as one string, int64 [tokens]. Raises UsageError without a tokenizer."""
    if tokenizer is None:
        raise UsageError("the model has no tokenizer, so text cannot be read; give token ids (.npy, .safetensors)")
    encoded = tokenizer(
        text,
        add_special_tokens=bos == "auto",
        return_attention_mask=False,
        verbose=False,  # a text is longer than the model's context, and is cut afterwards
    )
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def known_ids(source: TokenIds, tokenizer: Any) -> Tensor:
    """The ids [rows, tokens]; raises UsageError for one outside the vocabulary of the tokenizer, where there is one."""
    highest = int(source.ids.max())
    if tokenizer is not None and highest >= len(tokenizer):
        raise UsageError(
            f"{source.name} holds the token id {highest}, but the tokenizer knows {len(tokenizer)} tokens; "
            "the ids were made with another tokenizer"
        )
    return source.ids


def start_token(tokenizer: Any, bos: Bos) -> Tensor:
    """The start token to put before each window, int64 [1], or [0] for none; UsageError when the tokenizer has none."""
    if bos not in ("auto", "every", "none"):
        raise UsageError(f"bos is auto, every or none, not {bos!r}")
    if bos != "every":
        return torch.empty(0, dtype=torch.int64)
    start = getattr(tokenizer, "bos_token_id", None)
    if start is None:
        raise UsageError("the tokenizer has no start token to put before every window; use bos auto or none")
    return torch.tensor([start])
