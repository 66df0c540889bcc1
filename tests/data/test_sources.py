"""Every kind of data is read as its documents or ids; anything else is refused."""

import gzip
import json
import subprocess
import sys

import numpy
import pyarrow
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import save_file

from budwood.data.sources import read
from budwood.errors import RunError, UsageError

ROWS = [{"text": "one\n", "url": "u"}, {"text": "two\u2028three", "url": "v"}]


def written(path, rows=ROWS):
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    if path.name.endswith(".jsonl"):
        path.write_text(lines, encoding="utf-8")
    elif path.name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_rows_are_documents(tmp_path, suffix):
    texts = read(str(written(tmp_path / f"data.v1{suffix}")), "calibration")
    assert texts.documents == ("one\n", "two\u2028three")
    assert texts.rows() == list(texts.documents)
    assert texts.joined() == "one\n\n\ntwo\u2028three"


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_the_only_string_field_will_do(tmp_path, suffix):
    path = written(tmp_path / f"data{suffix}", [{"body": "one of two", "stars": 3}, {"body": "b", "stars": 4}])
    assert read(path, "calibration").documents == ("one of two", "b")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("row", "found"), [({"title": "a", "body": "b"}, "title, body"), ({"stars": 3}, "no field holds")]
)
def test_an_unclear_field_is_refused(tmp_path, suffix, row, found):
    with pytest.raises(UsageError, match=found):
        read(written(tmp_path / f"data{suffix}", [row]), "calibration")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b'{"text": "a"}\n{"text"', "line 2: not JSON"),
        (b'["a"]', "line 1: each line must be a JSON object"),
        (b'{"text": "a"}\n{"body": "b"}', "line 2: no text in the field 'text'"),
        (b'{"text": null}', "no field holds a string"),
        (b"\n\n", "no text"),
        (b'{"text": "\xff"}', "not UTF-8"),
    ],
)
def test_broken_lines_are_named(tmp_path, content, found):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=found):
        read(path, "calibration")


def test_a_text_file_is_one_document_byte_for_byte(tmp_path):
    path = tmp_path / "wiki.raw"
    path.write_bytes(b" \r\n = a = \n \n b\x0bc\n\nlast")
    texts = read(path, "evaluation")
    assert texts.documents == (" \r\n = a = \n \n b\x0bc\n\nlast",)
    assert texts.rows() == ["", " = a = \n", "", " b\x0bc\n", "", "last"]


def test_a_folder_is_its_texts_in_order_of_name(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "notes.md").write_text("no text for us")
    texts = read(tmp_path, "calibration")
    assert texts.documents == ("first", "second")
    assert texts.rows_are_lines


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".parquet"])
def test_a_truncated_file_is_refused(tmp_path, suffix):
    path = written(tmp_path / f"data{suffix}")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UsageError, match=path.name):
        read(path, "calibration")


@pytest.mark.parametrize("name", ["ids.npy", "ids.safetensors"])
@pytest.mark.parametrize("shape", [(6,), (2, 3)])
@pytest.mark.parametrize("dtype", [numpy.int32, numpy.int64])
def test_ids_are_rows(tmp_path, name, shape, dtype):
    ids = numpy.arange(6, dtype=dtype).reshape(shape)
    if name.endswith(".npy"):
        numpy.save(tmp_path / name, ids)
    else:
        save_file({"ids": torch.from_numpy(ids), "lengths": torch.ones(2)}, tmp_path / name)
    found = read(tmp_path / name, "calibration").ids
    assert found.dtype == torch.int64
    assert torch.equal(found, torch.arange(6).reshape(shape if len(shape) == 2 else (1, 6)))
    assert torch.equal(read(torch.from_numpy(ids), "calibration").ids, found)


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        (torch.rand(4), "not whole numbers"),
        (torch.tensor([True]), "not whole numbers"),
        (torch.tensor([1, -100]), "negative token id -100"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), r"\[1, 2, 3\]"),
        (torch.zeros(0, dtype=torch.int64), r"\[0\]"),
    ],
)
def test_what_cannot_be_ids_is_refused(tmp_path, ids, found):
    with pytest.raises(UsageError, match=found):
        read(ids, "calibration")
    numpy.save(tmp_path / "ids.npy", ids.numpy())
    with pytest.raises(UsageError, match="not whole numbers" if ids.dtype == torch.bool else found):
        read(tmp_path / "ids.npy", "calibration")


def test_arrays_of_objects_are_never_unpickled(tmp_path):
    numpy.save(tmp_path / "ids.npy", numpy.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UsageError, match="not a readable array"):
        read(tmp_path / "ids.npy", "calibration")


def test_several_tensors_need_a_name(tmp_path):
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "ids.safetensors")
    with pytest.raises(UsageError, match="holds 2 tensors"):
        read(tmp_path / "ids.safetensors", "calibration")


def test_damaged_safetensors_are_a_failed_run(tmp_path):
    (tmp_path / "ids.safetensors").write_bytes(b"nonsense")
    with pytest.raises(RunError, match=r"ids\.safetensors"):
        read(tmp_path / "ids.safetensors", "calibration")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".pkl"])
def test_pickles_are_refused_with_the_reason(tmp_path, suffix):
    (tmp_path / f"ids{suffix}").touch()
    with pytest.raises(UsageError, match="can run code"):
        read(tmp_path / f"ids{suffix}", "calibration")


@pytest.mark.parametrize(
    ("name", "found"),
    [("wikitxt2", "did you mean wikitext2"), ("no/such.txt", "no file, folder or data set")],
)
def test_unknown_names_are_refused_with_the_list(name, found):
    with pytest.raises(UsageError, match=rf"{found}.*sotu, wikitext2, c4, hf:"):
        read(name, "calibration")


def test_other_files_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no text file"):
        read(tmp_path, "calibration")
    (tmp_path / "notes.md").touch()
    with pytest.raises(UsageError, match=r"no reader for \.md"):
        read(tmp_path / "notes.md", "calibration")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(UsageError, match="holds no text"):
        read(tmp_path / "empty.txt", "calibration")


def test_a_list_is_its_strings():
    assert read(["a", "b"], "calibration").documents == ("a", "b")
    with pytest.raises(UsageError, match="only strings"):
        read(["a", 1], "calibration")
    with pytest.raises(UsageError, match="no text"):
        read([" "], "calibration")


@pytest.mark.parametrize(
    ("name", "purpose", "years"),
    [
        ("sotu", "calibration", (1947, 1999)),
        ("sotu", "evaluation", (2000, 2020)),
        ("sotu:1947-1999", "evaluation", (1947, 1999)),
        ("sotu:1999-", "calibration", (1999, 2000, 2020)),
        ("sotu:-1946", "calibration", (1946,)),
        ("sotu:2020", "calibration", (2020,)),
    ],
)
def test_speeches_are_chosen_by_year(speeches, name, purpose, years):
    texts = read(name, purpose)
    assert texts.documents == tuple(f"in {year}." for year in years)
    assert texts.name.startswith("sotu:")


@pytest.mark.parametrize("years", ["x", "1999-2000-", "-", "99", "20002020"])
def test_years_written_otherwise_are_refused(speeches, years):
    with pytest.raises(UsageError, match="years are written"):
        read(f"sotu:{years}", "calibration")


def test_years_without_an_address_are_refused(speeches):
    with pytest.raises(UsageError, match="no address in"):
        read("sotu:1800-1801", "calibration")


EVERY_FOOTER = """
import pathlib, sys
from budwood.data.sources import read
from budwood.errors import BudwoodError

path = pathlib.Path(sys.argv[1])
whole = path.read_bytes()
begin = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
outcomes = set()
for place in range(begin, len(whole)):
    for bit in (0, 2):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        path.write_bytes(damaged)
        try:
            read(path, "calibration")
            outcomes.add("read")
        except BudwoodError:
            outcomes.add("refused")
print(*sorted(outcomes))
"""


def test_no_damaged_footer_of_a_parquet_file_ends_the_process(tmp_path):
    """pyarrow calls abort() where it looks at the columns of some of them."""
    path = written(tmp_path / "data.parquet")
    found = subprocess.run([sys.executable, "-c", EVERY_FOOTER, path], capture_output=True, text=True)
    assert (found.returncode, found.stdout.split()) == (0, ["read", "refused"]), found.stderr[-500:]
