"""The report as a file: what a newer version added stays, damage is one sentence, a full disk loses nothing."""

import json

import pytest
from disk_full import full
from families import save_model

from budwood.benchmarking import bench
from budwood.checkpoints.source import open_source
from budwood.errors import RunError
from budwood.inspection import stored_matrices
from budwood.pruning import prune
from budwood.reports.record import SECTIONS, add_section, add_speed, read_report

SPEED = {
    "machine": {"processor": "abacus", "instructions": "none", "threads": 1},
    "model": {},
    "dtype": "float32",
    "kernels": "reference",
    "matrices": [],
    "warnings": ["no faster"],
}


@pytest.fixture
def folder(tmp_path):
    save_model("llama", tmp_path / "dense")
    prune(tmp_path / "dense", tmp_path / "out", 'magnitude("2:4")')
    return tmp_path / "out"


def test_what_a_newer_version_wrote_survives(folder):
    report = json.loads((folder / "report.json").read_text())
    report["energy"] = {"joules": 3}
    report["totals"]["carbon"] = 0.5
    report["blocks"][1]["temperature"] = [1, 2]
    (folder / "report.json").write_text(json.dumps(report))
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card + "\n## Mine\n\nstays\n")
    for _ in range(2):
        add_speed(folder, SPEED)
        found = json.loads((folder / "report.json").read_text())
        assert found.pop("speed") == SPEED
        assert found == report
    card = (folder / "README.md").read_text()
    assert card.count("## Speed") == 1
    assert card.count("## Mine\n\nstays") == 1


def test_bench_adds_to_the_report(folder):
    report = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps({**report, "energy": 3}))
    figures = bench(folder, rows=[1])
    found = json.loads((folder / "report.json").read_text())
    assert found.pop("speed") == json.loads(json.dumps(figures))
    assert found == {**report, "energy": 3}


@pytest.mark.parametrize(
    "content",
    ["", "[]", "3", "null", "{", "{}", '"text"', "\ufeff", *(json.dumps({name: 3}) for name in SECTIONS)],
)
def test_a_damaged_report_is_one_sentence_and_stays(folder, content):
    (folder / "report.json").write_text(content)
    card = (folder / "README.md").read_text()
    for call in (lambda: read_report(folder), lambda: add_speed(folder, SPEED), lambda: bench(folder, rows=[1])):
        with pytest.raises(RunError, match=r"report\.json is damaged.*write the folder again"):
            call()
    assert (folder / "report.json").read_text() == content
    assert (folder / "README.md").read_text() == card


def test_a_card_that_is_no_text_is_one_sentence_and_stays(folder):
    (folder / "README.md").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RunError, match=r"README\.md cannot be read"):
        add_speed(folder, SPEED)
    assert (folder / "README.md").read_bytes() == b"\xff\xfe\x00"


def test_a_folder_without_report_gets_none(tmp_path):
    assert read_report(tmp_path) is None
    assert add_section(tmp_path, "speed", SPEED) is False
    add_speed(tmp_path, SPEED)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("allowed", [0, 1])
def test_a_full_disk_leaves_the_former_files(folder, monkeypatch, allowed):
    """The report is written first, the card second: each is the former one or the new one."""
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    full(monkeypatch, allowed)
    with pytest.raises(RunError, match=r"could not be written \(.*No space left on device"):
        add_speed(folder, SPEED)
    after = {file.name: file.read_bytes() for file in folder.iterdir()}
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == ({"report.json"} if allowed else set())
    assert set(after) == set(before)
    assert read_report(folder) is not None


def test_a_write_that_is_cut_short_leaves_the_former_file(folder, monkeypatch):
    from pathlib import Path

    real = Path.write_text

    def cut(file, text, *args, **options):
        real(file, text[: len(text) // 2], *args, **options)
        raise OSError(28, "No space left on device")

    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    monkeypatch.setattr(Path, "write_text", cut)
    with pytest.raises(RunError, match="No space left on device"):
        add_speed(folder, SPEED)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_matrix_says_how_much_of_it_changed_and_how_groups_are_filled(folder):
    dense, pruned = (weights_of(path) for path in (folder.parent / "dense", folder))
    found = json.loads((folder / "report.json").read_text())["linears"]
    assert found
    for name, matrix in found.items():
        before, after = dense[name], pruned[name]
        assert matrix["change"] == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)
        counts = (after != 0).unflatten(1, (-1, 4)).sum(-1).flatten().bincount(minlength=5)
        assert matrix["x4"] == counts.tolist()
        assert counts[3:].tolist() == [0, 0]


def weights_of(folder):
    return {matrix.name: matrix.weight.float() for matrix in stored_matrices(open_source(folder), ())}
