"""From data to rows of token ids, and the position of the start token (BOS)."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from budwood.checkpoints.tokenizer import load_tokenizer
from budwood.data.sources import Data, are_token_ids
from budwood.data.texts import TokenIds
from budwood.errors import UsageError, panics_as_errors

# auto: the tokenizer's own special tokens for a text as a whole, as in published figures.
# every: one start token before each window. none: no special tokens at all.
Bos = Literal["auto", "every", "none"]


def tokenizer_for(folder: Path, data: Data, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model; None where there is none and none is needed. Raises UsageError when text needs one."""
    try:
        return load_tokenizer(folder, trust_remote_code)
    except UsageError:
        if are_token_ids(data):
            return None
        raise


def tokenise(text: str, tokenizer: Any, bos: Bos, templated: bool = False) -> Tensor:
    """The ids of the text as one string, int64 [tokens]. templated: it holds its special tokens already.

    Raises UsageError without a tokenizer.
    """
    if tokenizer is None:
        raise UsageError("the model has no tokenizer, so text cannot be read; give token ids (.npy, .safetensors)")
    try:
        with panics_as_errors():
            encoded = tokenizer(
                text,
                add_special_tokens=bos == "auto" and not templated,
                return_attention_mask=False,
                verbose=False,  # a text is longer than the model's context, and is cut afterwards
            )
    except Exception as error:  # tokenizers fail in their own ways, such as without a token for what they do not know
        raise UsageError(f"the tokenizer of the model cannot read the text: {error}; give token ids as data") from error
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


def check_vocabulary(ids: Tensor, size: int, where: str) -> None:
    """UsageError where a token id is beyond the embedding of the model, which has `size` rows."""
    highest = int(ids.max()) if ids.numel() else 0
    if highest >= size:
        raise UsageError(
            f"{where} holds the token id {highest}, but the embedding of the model has {size} rows; use the tokenizer "
            "of this model"
        )


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
