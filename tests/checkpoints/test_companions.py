"""The small files beside the weights are copied, and no file from outside the folder with them."""

import os
import tracemalloc

import pytest
from families import save_model, token_ids

from budwood.checkpoints.companions import companions, copy_companions, is_own, left_out
from budwood.checkpoints.files import copy_file
from budwood.checkpoints.source import Source
from budwood.pruning import prune
from budwood.repacking import repack
from budwood.retraining import retrain


def test_companions_are_the_small_files_and_no_others(tmp_path):
    copied = ("LICENSE", "chat_template.jinja", "generation_config.json", "tokenizer.json", "vocab.txt")
    others = (
        ".hidden.json",
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "report.json",
        "a.bin",
    )
    for name in (*copied, *others):
        (tmp_path / name).write_text("")
    assert [file.name for file in companions(tmp_path)] == sorted(copied)


@pytest.fixture
def private(tmp_path):
    file = tmp_path / "home" / "private.json"
    file.parent.mkdir()
    file.write_text('{"key": "private"}')
    return file


def linked(folder, private):
    """Links to a private file under names that are copied: direct, by a chain, by a folder, and to nothing."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").symlink_to(private)
    (folder / "NOTICE").symlink_to("tokenizer.json")
    (folder / "home").symlink_to(private.parent, target_is_directory=True)
    (folder / "vocab.txt").symlink_to("home/private.json")
    (folder / "merges.txt").symlink_to("../home/private.json")
    (folder / "added_tokens.json").symlink_to("nothing.json")
    (folder / "loop.json").symlink_to("loop.json")
    (folder / "real.json").write_text("{}")
    (folder / "chat_template.jinja").symlink_to("real.json")


LINKS = "NOTICE, added_tokens.json, loop.json, merges.txt"


def test_links_to_files_outside_the_folder_are_not_followed(tmp_path, private):
    linked(tmp_path / "model", private)
    assert [file.name for file in companions(tmp_path / "model")] == ["chat_template.jinja", "real.json"]
    (tmp_path / "out").mkdir()
    copy_companions(tmp_path / "model", tmp_path / "out", [file.name for file in companions(tmp_path / "model")])
    assert {file.name: file.read_text() for file in (tmp_path / "out").iterdir()} == {
        "chat_template.jinja": "{}",
        "real.json": "{}",
    }
    assert f"{tmp_path / 'model'}: {LINKS}, ..." in left_out(tmp_path / "model")


def test_folders_pipes_and_devices_are_no_companions(tmp_path):
    (tmp_path / "a.json").mkdir()
    os.mkfifo(tmp_path / "b.json")
    (tmp_path / "c.txt").symlink_to("/dev/zero")
    (tmp_path / "d.txt").write_text("")
    assert [file.name for file in companions(tmp_path)] == ["d.txt"]


def snapshot(cache):
    """A snapshot in the hub's cache, whose files are links to blobs."""
    blobs, folder = cache / "models--owner--name" / "blobs", cache / "models--owner--name" / "snapshots" / "1234"
    blobs.mkdir(parents=True)
    folder.mkdir(parents=True)
    (blobs / "abcd").write_text("{}")
    (folder / "tokenizer.json").symlink_to("../../blobs/abcd")
    return folder


def test_snapshots_of_the_hub_are_copied(tmp_path, private):
    folder = snapshot(tmp_path / "cache")
    assert [file.name for file in companions(folder)] == ["tokenizer.json"]
    (folder / "vocab.txt").symlink_to(private)
    other = snapshot(tmp_path / "other")
    (folder / "merges.txt").symlink_to((other.parent.parent / "blobs" / "abcd").resolve())  # of another repository
    assert [file.name for file in companions(folder)] == ["tokenizer.json"]
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)  # the folder itself may be a link of the user
    assert [file.name for file in companions(tmp_path / "link")] == ["tokenizer.json"]


def test_blobs_that_are_themselves_a_link_do_not_count(tmp_path, private):
    folder = tmp_path / "models--a--b" / "snapshots" / "1"
    folder.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").symlink_to(private.parent, target_is_directory=True)
    (folder / "tokenizer.json").symlink_to("../../blobs/private.json")
    assert not is_own(folder / "tokenizer.json")
    assert companions(folder) == []


def test_a_model_card_from_outside_gives_no_license(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "card").write_text("license: private")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").symlink_to("../home/card")
    assert Source("model", tmp_path / "model").license is None
    (tmp_path / "model" / "README.md").unlink()
    (tmp_path / "model" / "README.md").write_text("license: mit")
    assert Source("model", tmp_path / "model").license == "mit"


@pytest.mark.parametrize("verb", ["export", "retrain"])
def test_verbs_that_read_a_pruned_folder_copy_no_private_file(tmp_path, private, verb):
    save_model("llama", tmp_path / "model")
    prune(tmp_path / "model", tmp_path / "pruned", 'magnitude("2:4")')
    (tmp_path / "pruned" / "special.json").symlink_to(private)
    (tmp_path / "pruned" / "NOTICE").symlink_to("/etc/hostname")
    if verb == "export":
        report = repack(tmp_path / "pruned", tmp_path / "out", "dense")
    else:
        ids = token_ids(1, 200) % 90 + 3
        report = retrain(tmp_path / "pruned", tmp_path / "out", ids, num_samples=4, seq_length=24, steps=1, batch=1)
    assert any("NOTICE, special.json" in note for note in report["notes"])
    assert not {"special.json", "NOTICE"} & {file.name for file in (tmp_path / "out").iterdir()}


def test_a_large_companion_is_copied_a_piece_at_a_time(tmp_path):
    with open(tmp_path / "notes.txt", "wb") as file:
        file.truncate(2**26)
    tracemalloc.start()
    try:
        copy_file(tmp_path / "notes.txt", tmp_path / "copy.txt")
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()
    assert (tmp_path / "copy.txt").stat().st_size == 2**26


def test_a_run_copies_no_private_file_and_says_so(tmp_path, private):
    save_model("llama", tmp_path / "model")
    (tmp_path / "model" / "special.json").symlink_to(private)
    report = prune(tmp_path / "model", tmp_path / "out", 'magnitude("2:4")')
    assert any("special.json" in note for note in report["notes"])
    assert not (tmp_path / "out" / "special.json").exists()
    assert (tmp_path / "out" / "tokenizer.json").read_text() == (tmp_path / "model" / "tokenizer.json").read_text()
