"""Several evaluation texts in one option."""

import pytest
import torch

from budwood.data.named import merged_texts, named_texts
from budwood.errors import UsageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sotu", {"sotu": "sotu"}),
        ("sotu:1961", {"sotu:1961": "sotu:1961"}),
        ("wiki=wiki.test.raw", {"wiki": "wiki.test.raw"}),
        ("wiki=wiki.test.raw, sotu:2000-", {"wiki": "wiki.test.raw", "sotu:2000-": "sotu:2000-"}),
        ("x=[a,b.txt],[c,d.txt]", {"x": "a,b.txt", "c,d.txt": "c,d.txt"}),
        (
            "hf:owner/name:train,y=hf:owner/name::test:body",
            {"hf:owner/name:train": "hf:owner/name:train"} | {"y": "hf:owner/name::test:body"},
        ),
    ],
)
def test_a_list_of_texts(text, expected):
    assert named_texts(text) == expected


def test_what_is_no_text_is_one_text():
    ids = torch.zeros(1, 4)
    assert named_texts(ids) == {"token ids": ids}
    assert named_texts(["a", "b"]) == {"list of strings": ["a", "b"]}
    assert named_texts({"a": "sotu"}) == {"a": "sotu"}


def test_the_name_of_a_file_is_no_list(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.txt", "x=y.txt", "c:3"):
        (tmp_path / name).write_text("text")
        assert named_texts(name) == {name: name}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("wikitext2:3,c4:1", "is a mix, which serves for calibration only"),
        ({"wikitext2": 3, "c4": 1}, "is a mix, which serves for calibration only"),
        ("a=x,a=y", "a is twice"),
        ("sotu,,c4", "holds an empty part"),
    ],
)
def test_what_is_no_list_of_texts_is_refused(text, reason):
    with pytest.raises(UsageError, match=reason):
        named_texts(text)


def test_an_option_may_be_repeated():
    assert merged_texts(["a=x,y", "z"]) == {"a": "x", "y": "y", "z": "z"}
    with pytest.raises(UsageError, match="y is given twice"):
        merged_texts(["y", "y"])
