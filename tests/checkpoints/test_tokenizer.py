"""Folders whose tokenizer is missing or damaged are refused."""

import pytest
from transformers import LlamaConfig

from budwood.checkpoints.tokenizer import load_tokenizer
from budwood.errors import UsageError


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
