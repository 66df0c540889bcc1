"""Folders whose tokenizer is missing or damaged are refused."""

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import LlamaConfig, PreTrainedTokenizerFast

from budwood.checkpoints.tokenizer import load_tokenizer
from budwood.data.tokens import tokenise
from budwood.errors import UsageError, panics_as_errors


@pytest.mark.parametrize("with_config", [False, True])
def test_a_folder_without_a_tokenizer_is_refused(tmp_path, with_config):
    if with_config:
        LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"has no tokenizer.*give token ids"):
        load_tokenizer(tmp_path)


def test_a_damaged_tokenizer_is_refused(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(UsageError, match="has no tokenizer"):
        load_tokenizer(tmp_path)


class Panic(BaseException):
    """As a library in Rust raises it."""


def test_a_panic_while_a_text_is_read_is_a_sentence(monkeypatch):
    def panicking(*given, **named):
        raise Panic("no entry found for key")

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()))
    monkeypatch.setattr(PreTrainedTokenizerFast, "_encode_plus", panicking)
    with pytest.raises(UsageError, match="cannot read the text: no entry found for key"):
        tokenise("text", tokenizer, "auto")


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, ValueError])
def test_what_is_no_panic_stays_what_it_is(kind):
    with pytest.raises(kind, match="as it was"), panics_as_errors():
        raise kind("as it was")
