"""The tokenizer of a checkpoint."""

from pathlib import Path
from typing import Any

from budwood.errors import UsageError, panics_as_errors


def load_tokenizer(source: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or hub name. Raises UsageError when none can be loaded.

    Code that comes with a checkpoint is run with `trust_remote_code` only.
    """
    from transformers import AutoTokenizer

    from budwood.checkpoints.meta_model import refused_code

    try:
        with panics_as_errors():
            return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # the library raises a dozen kinds for a missing or damaged tokenizer
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise refused_code(source) from error
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"{source} has no tokenizer that can be loaded ({reason}); copy tokenizer.json and "
            "tokenizer_config.json of the model into it, or give token ids as data"
        ) from error
