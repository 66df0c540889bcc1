"""The tokenizer of a checkpoint."""

from pathlib import Path
from typing import Any

from budwood.errors import UsageError


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a folder or hub name. Raises UsageError when none can be loaded.

    Code that comes with a checkpoint is never run.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # the library raises a dozen kinds for a missing or damaged tokenizer
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"{source} has no tokenizer that can be loaded ({reason}); copy tokenizer.json and "
            "tokenizer_config.json of the model into it, or give token ids as data"
        ) from error
