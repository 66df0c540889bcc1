"""A data file costs no more than what was asked of it needs, and never more than text can be packed."""

import gzip
import json
import tracemalloc

import numpy
import pyarrow
import pytest
from pyarrow import parquet

from budwood.data import budget, files
from budwood.data.sources import read
from budwood.errors import UsageError
from budwood.evaluation.task_rows import json_rows, table

ROW = json.dumps({"text": "so much"}).encode() + b"\n"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Bounds in proportion to the files of these tests."""
    monkeypatch.setattr(budget, "LEAST", 2**20)
    monkeypatch.setattr(budget, "SMALL", 2**16)
    monkeypatch.setattr(files, "LONGEST", 2**16)


def peak(action):
    """The most memory that Python objects took meanwhile, in bytes."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def bomb(path, row=ROW, times=2**17):
    with gzip.open(path, "wb", compresslevel=9) as file:
        for _ in range(64):
            file.write(row * (times // 64))
    return path


@pytest.mark.parametrize("characters", [16, None, float("inf")])
def test_a_packed_file_that_unpacks_to_a_thousand_times_its_size_is_refused(tmp_path, characters):
    path = bomb(tmp_path / "data.jsonl.gz")
    assert 2**17 * len(ROW) > 200 * path.stat().st_size

    def refused():
        with pytest.raises(UsageError, match="unpacks to more than 100 times its size"):
            read(path, "evaluation", characters)

    budget.LEAST, least = 2**40, budget.LEAST
    assert peak(refused) < 100 * path.stat().st_size * 10
    budget.LEAST = least


def test_a_line_without_end_is_refused(tmp_path):
    for path in (bomb(tmp_path / "data.jsonl.gz", b" ", 2**22), tmp_path / "data.jsonl"):
        if not path.exists():
            path.write_bytes(b" " * 2**22)

        def refused():
            with pytest.raises(UsageError, match=r"line 1: it has more than 65536 bytes"):
                read(path, "calibration", 16)  # noqa: B023

        assert peak(refused) < 2**20


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet", ".txt"])
def test_no_more_is_read_than_is_needed_and_it_is_said(tmp_path, suffix, caplog):
    path = tmp_path / f"data{suffix}"
    rows = [{"text": f"{place:x} of many rows and " + "x y z " * 400 + hex(place**9)} for place in range(1000)]
    if suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == ".txt":
        path.write_text("".join(row["text"] + "\n" for row in rows))
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text, 1) if suffix.endswith("gz") else text)
    found = read(path, "calibration", 16)
    held = sum(map(len, found.documents))
    assert budget.LEAST - 5000 < held < budget.LEAST + 5000
    assert found.joined().startswith("0 of many rows")
    assert suffix != ".txt" or found.documents[0].endswith("\n")
    assert f"first {held} characters" in caplog.text
    assert "holds more text than is needed" in caplog.text
    caplog.clear()
    assert sum(map(len, read(path, "calibration", 2**20).documents)) > 2 * held
    assert "holds more" not in caplog.text


def test_a_folder_is_read_as_far_as_is_needed(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"{name} line\n" * 2**17)
    found = read(tmp_path, "calibration", 16)
    assert [document[0] for document in found.documents] == ["a", "b"][: len(found.documents)]
    assert len(found.joined()) < 2**20 + 100


def test_repeated_strings_of_a_table_are_counted_as_text(tmp_path):
    path = tmp_path / "data.parquet"
    table = pyarrow.Table.from_pylist([{"text": "so much " * 2**13}] * 2000)
    parquet.write_table(table, path, compression="zstd")
    assert table.nbytes > 1000 * path.stat().st_size

    def refused():
        with pytest.raises(UsageError, match="unpacks to more than"):
            read(path, "evaluation")

    assert peak(refused) < 2**25


def test_an_array_that_promises_more_than_the_file_has_is_refused(tmp_path):
    path = tmp_path / "ids.npy"
    with open(path, "wb") as file:
        numpy.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (2**40,)})
        file.write(bytes(64))
    with pytest.raises(UsageError, match="not a readable array"):
        read(path, "calibration")
    with open(path, "wb") as file:
        numpy.savez(file, ids=numpy.arange(4))
    with pytest.raises(UsageError, match="archive of arrays"):
        read(path, "calibration")


def test_rows_of_tasks_are_read_as_texts_are(tmp_path):
    """Line by line; packed, nested or long without end they are refused."""
    (tmp_path / "rows.jsonl").write_text('\ufeff{"a": 1}\n\n{"a": 2}\n')
    assert list(json_rows(tmp_path / "rows.jsonl")) == [{"a": 1}, {"a": 2}]
    bomb(tmp_path / "bomb.jsonl.gz")
    (tmp_path / "deep.jsonl").write_text("[" * 50_000)
    (tmp_path / "long.jsonl").write_text('{"a": "' + "x" * 2**17)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(ROW * 100)[:-9])
    (tmp_path / "bytes.jsonl").write_bytes(b'{"a": "\xff"}\n')
    for name in ("bomb.jsonl.gz", "deep.jsonl", "long.jsonl", "cut.jsonl.gz", "bytes.jsonl"):
        with pytest.raises(UsageError, match=name):
            list(json_rows(tmp_path / name))
    (tmp_path / "mixed.jsonl").write_text('{"a": 1}\n{"a": {"b": 2}}\n')
    with pytest.raises(UsageError, match="do not fit together"):
        table(tmp_path / "mixed.jsonl")
