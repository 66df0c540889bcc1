"""Mixed calibration texts: one spelling, shares of windows, recorded, and everything ambiguous refused."""

import contextlib
import json

import pytest
import torch
from families import save_model
from hypothesis import given, settings
from hypothesis import strategies as st

from budwood.data import calibration_windows, evaluation_windows
from budwood.data.mix import Mix, interleaved, mix_of
from budwood.data.sources import are_token_ids
from budwood.data.windows import digest
from budwood.errors import UsageError
from budwood.pruning import prune
from budwood.runs.recipe import recipe_options

LETTERS, DIGITS = "abcdefghijklmnopqrstuvwxyz", "0123456789"


@pytest.fixture
def texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "letters.txt").write_text(LETTERS * 20)
    (tmp_path / "digits.txt").write_text(DIGITS * 50)
    (tmp_path / "b:2").write_text(DIGITS)
    (tmp_path / "x,y:3.txt").write_text("?" * 100)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("wikitext2:3,c4:1", (("wikitext2", 3), ("c4", 1))),
        ("sotu:2 , c4:0.5", (("sotu", 2), ("c4", 0.5))),
        ("[sotu:1950-]:3,c4:1", (("sotu:1950-", 3), ("c4", 1))),
        ("[sotu:1961]:1,[hf:a/b:en:train:body]:2", (("sotu:1961", 1), ("hf:a/b:en:train:body", 2))),
        ("[hf:a/b::train:body]:2.5,/texts/a-b_c.txt:7", (("hf:a/b::train:body", 2.5), ("/texts/a-b_c.txt", 7))),
        (r"[C:\texts, old\a.txt]:1,[c4]:1", ((r"C:\texts, old\a.txt", 1), ("c4", 1))),
    ],
)
def test_a_mix_is_read_and_written(text, parts):
    mix = mix_of(text)
    assert mix.parts == parts
    assert mix_of(str(mix)) == mix


@given(
    st.dictionaries(
        st.text("abz:,./ -3", min_size=1).filter(lambda name: name == name.strip()),
        st.integers(1, 999) | st.sampled_from([0.5, 2.25]),
        min_size=2,
        max_size=4,
    )
)
def test_every_mix_has_a_spelling_that_is_read_as_itself(shares):
    mix = mix_of(shares)
    assert mix_of(str(mix)) == mix


@pytest.mark.parametrize("data", ["sotu", "sotu:1950-", "hf:a/b:train", "wiki.txt", "c4:3", torch.arange(4), ["a, b"]])
def test_other_data_are_no_mix(data):
    assert mix_of(data) is None


@pytest.mark.parametrize(
    ("data", "found"),
    [
        ("a.txt,b.txt", "'a.txt' no part of a mix"),
        ("a.txt:3,c4", "'c4' no part of a mix"),
        ("sotu:1950-:3,c4:1", "'sotu:1950-:3' no part of a mix; .*brackets"),
        ("hf:a/b:train:3,c4:1", "'hf:a/b:train:3' no part of a mix"),
        ("sotu:1961,c4:1", "share of sotu must be above 0 and at most 999, not 1961"),
        ("c4:0,sotu:1", "share of c4 must be above 0"),
        ("c4:-1,sotu:1", "'c4:-1' no part"),
        ("c4:1,,sotu:1", "'' no part of a mix"),
        ("c4:1,sotu:1,", "'' no part of a mix"),
        (",", "'' no part of a mix"),
        ("[sotu:1950-]:3", "a mix needs two texts"),
        ("[sotu:1950-,c4:1", "no part of a mix"),
        ("c4:1,c4:2", "c4 is twice in the mix"),
        ({"c4": 1}, "a mix needs two texts"),
        ({"c4": 1, "sotu": True}, "share of sotu must be"),
        ({"c4": 1, "a[1]": 2}, "must not hold brackets"),
        ({"c4": 1, 3: 2}, "keys of a mix"),
    ],
)
def test_what_is_no_mix_is_refused(data, found):
    with pytest.raises(UsageError, match=found):
        mix_of(data)


def test_files_are_no_mix_and_are_not_mistaken(texts):
    assert mix_of("x,y:3.txt") is None
    with pytest.raises(UsageError, match=r"'b:2' may be the file of this name or a share; write '\[b:2\]:SHARE'"):
        mix_of("letters.txt:1,b:2")
    assert mix_of("[x,y:3.txt]:1,[b:2]:2").parts == (("x,y:3.txt", 1), ("b:2", 2))


@settings(deadline=None)
@given(st.lists(st.integers(1, 99), min_size=2, max_size=5), st.integers(1, 300))
def test_windows_are_divided_by_shares(shares, windows):
    mix = Mix(tuple((f"t{number}", share) for number, share in enumerate(shares)))
    exact = [windows * share / sum(shares) for share in shares]
    if min(exact) < 1:
        with contextlib.suppress(UsageError):  # a text may give none
            assert min(mix.counts(windows)) == 1
        return
    counts = mix.counts(windows)
    assert sum(counts) == windows
    assert all(abs(count - wanted) < 1 for count, wanted in zip(counts, exact, strict=True))


def test_texts_take_turns():
    assert interleaved([3, 1]) == [0, 1, 3, 2]
    assert interleaved([2, 2]) == [0, 2, 1, 3]
    assert sorted(interleaved([5, 1, 7])) == list(range(13))


def test_each_text_gives_its_share(texts, tokenizer):
    windows = calibration_windows("letters.txt:3,digits.txt:1", tokenizer, num_samples=8, seq_length=6, seed=5)
    written = ["".join(tokenizer.convert_ids_to_tokens(row)) for row in windows.ids]
    assert [place for place, text in enumerate(written) if "0" <= max(text) <= "9"] == [2, 6]
    alone = calibration_windows("letters.txt", tokenizer, num_samples=6, seq_length=6, seed=5)
    assert torch.equal(windows.ids[[0, 1, 3, 4, 5, 7]], alone.ids)
    assert json.loads(json.dumps(windows.record)) == windows.record
    assert windows.record == {
        "data": "letters.txt:3,digits.txt:1",
        "documents": 2,
        "tokens_available": 520 + 500,
        "num_samples": 8,
        "seq_length": 6,
        "sampling": "random",
        "seed": 5,
        "bos": "auto",
        "mix": {"letters.txt": 6, "digits.txt": 2},
        "sha256": digest(windows.ids),
    }
    same = calibration_windows({"letters.txt": 3, "digits.txt": 1}, tokenizer, num_samples=8, seq_length=6, seed=5)
    assert same.record == windows.record


def test_a_short_text_gives_all_it_has_with_a_warning(texts, tokenizer, caplog):
    (texts / "few:2.txt").write_text(DIGITS)
    windows = calibration_windows("letters.txt:1,[few:2.txt]:1", tokenizer, num_samples=8, seq_length=5)
    assert windows.record["mix"] == {"letters.txt": 4, "few:2.txt": 2}
    assert "few:2.txt holds 2 windows of 5 tokens, fewer than the 4 asked for" in caplog.text


def test_a_share_below_one_window_is_refused(texts, tokenizer):
    with pytest.raises(UsageError, match=r"the share 1 of digits\.txt is less than one of 4 windows"):
        calibration_windows("letters.txt:99,digits.txt:1", tokenizer, num_samples=4, seq_length=5)


def test_evaluation_takes_one_text(texts, tokenizer):
    with pytest.raises(UsageError, match="is a mix, which serves for calibration only"):
        evaluation_windows("letters.txt:3,digits.txt:1", tokenizer, seq_length=6)


def test_ids_need_no_tokenizer_in_a_mix_either():
    assert are_token_ids("a.npy:1,b.safetensors:2")
    assert not are_token_ids("a.npy:1,b.txt:2")


def test_a_run_records_the_mix_and_is_made_again(texts, tmp_path):
    save_model("llama", tmp_path / "dense")
    options = {"num_samples": 4, "seq_length": 12, "compute_dtype": "float32"}
    report = prune("dense", "out", 'wanda("2:4")', "[x,y:3.txt]:1,letters.txt:3", **options)
    assert report["data"]["mix"] == {"x,y:3.txt": 1, "letters.txt": 3}
    assert "1 of x,y:3.txt and 3 of letters.txt" in (tmp_path / "out" / "report.md").read_text().replace("\\", "")
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert recipe["data"]["data"] == "[x,y:3.txt]:1,letters.txt:3"
    again = prune("dense", "again", **recipe_options("out/recipe.json"))
    assert again["data"] == report["data"]
    for shard in (tmp_path / "out").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "again" / shard.name).read_bytes()
