"""The folder that is written to: locked by one process, foreign files untouched, refusals before deletions."""

import json
import os
import signal
import subprocess
import sys

import pytest
from disk import contents
from families import save_model

from budwood.errors import RunError, UsageError
from budwood.pruning import prune
from budwood.runs.target import MANIFEST, STAGING, WORK, Target

METHOD = 'magnitude("2:4")'
OTHER = 'magnitude("4:8")'


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save_model("llama", folder)
    return folder


@pytest.fixture
def finished(llama, tmp_path):
    prune(llama, tmp_path / "out", METHOD)
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        ({"activation_memory": "much"}, UsageError),
        ({"source": "no-such-folder"}, UsageError),
        ({"method": "wandaa()"}, UsageError),
        ({"method": 'wanda("2:4")'}, UsageError),  # without text
        ({"method": 'wanda("2:4")', "data": "no-such-text.txt"}, UsageError),
        ({"method": 'wanda("2:4")', "data": ["short"], "seq_length": 24}, UsageError),
        ({"skip": ["("]}, UsageError),
        ({"format": "zip"}, UsageError),
        ({"dtype": "float31"}, UsageError),
        ({"compute_dtype": "float31"}, UsageError),
        ({"attention": "quick"}, UsageError),
        ({"device": "abacus"}, UsageError),
    ],
)
def test_a_refused_overwrite_changes_nothing(llama, finished, changed, kind):
    before = contents(finished)
    arguments = {"source": llama, "method": OTHER, **changed}
    with pytest.raises(kind):
        prune(arguments.pop("source"), finished, arguments.pop("method"), overwrite=True, **arguments)
    assert contents(finished) == before
    assert not (finished / STAGING).exists()


def test_an_overwrite_that_fails_before_its_first_block_changes_nothing(finished, tmp_path):
    save_model(
        "llama",
        tmp_path / "nan",
        change=lambda model: model.model.layers[0].mlp.up_proj.weight.data.fill_(float("nan")),
    )
    before = contents(finished)
    with pytest.raises(RunError, match="NaN"):
        prune(tmp_path / "nan", finished, METHOD, overwrite=True)
    assert contents(finished) == before
    assert not (finished / STAGING).exists()


@pytest.mark.parametrize("name", ["notes.txt", "my.tmp", "results.json", "model.bin", "scripts/run.py"])
def test_the_files_of_the_user_stay(llama, finished, name):
    file = finished / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    prune(llama, finished, OTHER, overwrite=True)
    assert file.read_text() == "mine"
    (finished / "config.json").unlink()
    prune(llama, finished, OTHER)  # completes it in place
    assert file.read_text() == "mine"


@pytest.mark.parametrize("name", ["README.md", "model.safetensors", "config.json", "recipe.json", "tokenizer.json"])
def test_a_file_of_the_user_that_would_be_replaced_is_refused(llama, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text('{"flour": "500 g"}')
    before = contents(tmp_path / "out")
    for overwrite in (False, True):
        with pytest.raises(UsageError):
            prune(llama, tmp_path / "out", METHOD, overwrite=overwrite)
        assert contents(tmp_path / "out") == before


def test_a_shard_of_the_user_in_a_finished_folder_is_refused(llama, finished):
    (finished / "model.safetensors").write_bytes(b"mine")
    before = contents(finished)
    with pytest.raises(UsageError, match=r"model\.safetensors was not written by budwood"):
        prune(llama, finished, OTHER, overwrite=True)
    assert contents(finished) == before


def test_a_recipe_of_another_kind_makes_no_folder_of_budwood(llama, tmp_path):
    """A foreign recipe.json does not make the files beside it deletable."""
    save_model("llama", tmp_path / "out")
    (tmp_path / "out" / "recipe.json").write_text('{"flour": "500 g"}')
    before = contents(tmp_path / "out")
    with pytest.raises(UsageError, match="was not written by budwood"):
        prune(llama, tmp_path / "out", METHOD, overwrite=True)
    assert contents(tmp_path / "out") == before


def test_a_file_that_came_during_the_run_is_not_replaced(llama, tmp_path, monkeypatch):
    """In place and staged: the finished blocks are kept, and the command completes the run once the file is away."""
    from budwood.runs.run import Run

    real = Run.finish

    def finish(run, *args, **options):
        (run.target.path / "README.md").write_text("mine")
        return real(run, *args, **options)

    for target, overwrite in ((tmp_path / "new", False), (tmp_path / "old", True)):
        if overwrite:
            target.mkdir()
            (target / "notes.txt").write_text("mine")
        with monkeypatch.context() as patched:
            patched.setattr(Run, "finish", finish)
            with pytest.raises(UsageError, match=r"README\.md was not written by budwood"):
                prune(llama, target, METHOD, overwrite=overwrite)
        assert (target / "README.md").read_text() == "mine"
        (target / "README.md").unlink()
        report = prune(llama, target, METHOD, overwrite=overwrite)
        assert all(block["seconds"] is None for block in report["blocks"])


def test_folders_of_versions_without_a_manifest_are_replaced_and_notes_stay(llama, finished):
    (finished / MANIFEST).unlink()
    (finished / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds another run"):
        prune(llama, finished, OTHER)
    prune(llama, finished, OTHER, format="dense", overwrite=True)
    assert (finished / "notes.txt").read_text() == "mine"
    assert not list(finished.glob("sparse*"))


@pytest.mark.parametrize("content", ["", "[]", "3", '{"files": 3}', '{"files": "abc"}', "{}"])
def test_a_damaged_manifest_is_one_sentence(llama, finished, content):
    (finished / MANIFEST).write_text(content)
    before = contents(finished)
    with pytest.raises(RunError, match="damaged"):
        prune(llama, finished, OTHER, overwrite=True)
    assert contents(finished) == before


def test_a_failed_claim_removes_the_folders_that_it_made(tmp_path):
    target = Target.claim(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()
    target.release()
    assert not (tmp_path / "a").exists()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("")
    Target.claim(tmp_path / "a" / "b").release()
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == ["file"]
    with pytest.raises(UsageError, match="is a file"):
        Target.claim(tmp_path / "a" / "file")
    with pytest.raises(RunError, match="cannot be written to"):
        Target.claim(tmp_path / "a" / "file" / "below")


def test_intermediate_results_without_their_recipe_are_not_used(llama, tmp_path):
    """They may be of another run."""
    (tmp_path / "out" / WORK).mkdir(parents=True)
    (tmp_path / "out" / WORK / "rewrite-1.done").write_text("")
    held = Target.claim(tmp_path / "out")
    held.fill_in_place([])
    held.release()
    assert not (tmp_path / "out" / WORK).exists()


def test_intermediate_results_of_a_replaced_run_go_with_it(llama, finished):
    (finished / WORK).mkdir()
    (finished / WORK / "survey.json").write_text("[1]")
    prune(llama, finished, OTHER, overwrite=True)
    assert not (finished / WORK).exists()


HOLDER = """
import sys, time
from pathlib import Path
from budwood.runs.target import Target
held = Target.claim(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_two_runs_in_one_folder(llama, finished):
    """The second is refused with status 2 and the first undisturbed; the lock ends with the process."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(finished)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        before = contents(finished)
        for overwrite in (False, True):
            with pytest.raises(UsageError, match=r"another budwood process writes to .*; wait"):
                prune(llama, finished, OTHER, overwrite=overwrite)
        assert contents(finished) == before
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    prune(llama, finished, OTHER, overwrite=True)
    assert json.loads((finished / "recipe.json").read_text())["method"] == OTHER


def test_a_new_folder_that_another_process_fills_is_not_removed(tmp_path):
    first = Target.claim(tmp_path / "new")
    with pytest.raises(UsageError, match="another budwood process"):
        Target.claim(tmp_path / "new")
    assert (tmp_path / "new").is_dir()
    first.release()
