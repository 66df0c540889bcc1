"""A run that is killed or meets a full disk at any moment: what is on the disk then, and how the command goes on."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from disk import CALIBRATION, contents, crash_states, model_files
from families import save_model, token_ids
from processes import server

from budwood.checkpoints import files
from budwood.checkpoints.loading import load
from budwood.errors import RunError
from budwood.progress import Silent
from budwood.pruning import prune
from budwood.repacking import repack
from budwood.runs import run as run_module
from budwood.runs.target import STAGING, SWAP

METHOD = 'magnitude("2:4")'
OTHER = 'magnitude("4:8")'
IDS = token_ids(1, 400) % 90 + 3


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A dense source, and two runs over it."""
    folder = tmp_path_factory.mktemp("models")
    save_model("llama", folder / "dense")
    prune(folder / "dense", folder / "former", METHOD)
    prune(folder / "dense", folder / "new", OTHER)
    return folder


def logits(folder):
    with torch.no_grad():
        return load(folder)(token_ids(), use_cache=False).logits


def put(folder, target):
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    return target


def test_a_kill_at_any_moment_of_an_overwrite(models, tmp_path, monkeypatch):
    """The former model or the new one loads whole, or none; the same command completes it; other files stay."""
    target = put(models / "former", tmp_path / "out")
    (target / "notes.txt").write_text("mine")
    states = crash_states(
        monkeypatch, target, tmp_path / "states", lambda: prune(models / "dense", target, OTHER, overwrite=True)
    )
    assert len(states) > 25
    swapping = [state for state in states if (state / STAGING / SWAP).is_file()]
    assert len(swapping) > 10
    expected, former, new = model_files(target), logits(models / "former"), logits(models / "new")
    assert not torch.equal(former, new)
    loaded = set()
    for state in states:
        assert (state / "notes.txt").read_text() == "mine"
        if (state / "config.json").is_file():
            found = logits(state)
            loaded.add("former" if torch.equal(found, former) else "new")
            assert torch.equal(found, former) or torch.equal(found, new), state
        ready = len([file for file in (state / STAGING).glob("sparse-*.safetensors") if "00001" not in file.name])
        if state in swapping[1::2]:
            continue
        report = prune(models / "dense", put(state, tmp_path / "again"), OTHER, overwrite=True)
        assert model_files(tmp_path / "again") == expected, state
        if state not in swapping and (state / STAGING / "recipe.json").is_file():
            assert sum(block["seconds"] is None for block in report["blocks"]) == ready
    assert loaded == {"former", "new"}
    for state in swapping[1::2]:  # without --overwrite too: the swap is completed, and the run is finished
        prune(models / "dense", put(state, tmp_path / "again"), OTHER)
        assert model_files(tmp_path / "again") == expected, state


def test_a_kill_at_any_moment_of_a_new_run(models, tmp_path, monkeypatch):
    states = crash_states(
        monkeypatch, tmp_path / "out", tmp_path / "states", lambda: prune(models / "dense", tmp_path / "out", METHOD)
    )
    assert len(states) > 10
    former = logits(models / "former")
    for state in states:
        assert not (state / "config.json").is_file() or torch.equal(logits(state), former)
        prune(models / "dense", put(state, tmp_path / "again"), METHOD)
        assert model_files(tmp_path / "again") == model_files(models / "former"), state


def test_a_kill_at_any_moment_of_an_export(models, tmp_path, monkeypatch):
    target = put(models / "former", tmp_path / "out")
    states = crash_states(
        monkeypatch, target, tmp_path / "states", lambda: repack(models / "new", target, "dense", overwrite=True)
    )
    expected, whole = model_files(target), [logits(models / name) for name in ("former", "new")]
    for state in states[::3] + [state for state in states if (state / STAGING / SWAP).is_file()][::4]:
        if (state / "config.json").is_file():
            found = logits(state)
            assert any(torch.equal(found, one) for one in whole), state
        repack(models / "new", put(state, tmp_path / "again"), "dense", overwrite=True)
        assert model_files(tmp_path / "again") == expected, state


class Slow(Silent):
    """Stays at the end of the second block."""

    def __init__(self, reached):
        self.reached = reached

    def block(self, *args):
        if args[0] == 1:
            self.reached.send("two")
            time.sleep(600)


def stop_after_two(source, target, reached):
    prune(source, target, OTHER, overwrite=True, progress=Slow(reached))


def test_sigkill_of_an_overwrite(models, tmp_path):
    """A real process: its lock goes with it, the former model is whole, and finished blocks are not done again."""
    target = put(models / "former", tmp_path / "out")
    here, there = server().Pipe()
    process = server().Process(target=stop_after_two, args=(models / "dense", target, there))
    process.start()
    there.close()  # a process that ends early ends the wait
    assert here.recv() == "two"
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert torch.equal(logits(target), logits(models / "former"))
    report = prune(models / "dense", target, OTHER, overwrite=True)
    assert [block["seconds"] is None for block in report["blocks"]] == [True, True, False, False]
    assert model_files(target) == model_files(models / "new")
    assert not (target / STAGING).exists()


@pytest.mark.parametrize("which", [0, 2, -1])
@pytest.mark.parametrize("method", [METHOD, 'wanda("2:4")'])
def test_a_deleted_shard_is_written_again(models, tmp_path, method, which):
    arguments = (models / "dense", tmp_path / "out", method, IDS)
    prune(*arguments, **CALIBRATION)
    before = model_files(tmp_path / "out")
    sorted((tmp_path / "out").glob("*.safetensors"))[which].unlink()
    prune(*arguments, **CALIBRATION)
    assert model_files(tmp_path / "out") == before


def test_a_deleted_shard_of_an_export_is_written_again(models, tmp_path):
    repack(models / "former", tmp_path / "out", "dense")
    before = model_files(tmp_path / "out")
    sorted((tmp_path / "out").glob("*.safetensors"))[1].unlink()
    repack(models / "former", tmp_path / "out", "dense")
    assert model_files(tmp_path / "out") == before


@pytest.mark.parametrize(
    "left",
    [
        ".recipe.json.budwood-tmp",
        "recipe.json.tmp",
        "report.json.tmp",
        "sparse-00001-of-00005.tmp",
        "model-00001-of-00005.tmp",
        ".sparse-00002-of-00005.safetensors.budwood-tmp",
        ".activationsx1.budwood-tmp",
        f"{STAGING}/recipe.json",
        f"{STAGING}/sparse-00001-of-00005.safetensors",
    ],
)
def test_what_a_killed_write_left_blocks_no_run(models, tmp_path, left):
    file = tmp_path / "out" / left
    file.parent.mkdir(parents=True)
    file.write_text("{")
    prune(models / "dense", tmp_path / "out", METHOD)
    assert torch.equal(logits(tmp_path / "out"), logits(models / "former"))


def full(monkeypatch, allowed, name="flush"):
    """A disk that is full after `allowed` files."""
    real, written = getattr(files, name), []

    def flush(file):
        written.append(file)
        if len(written) > allowed:
            raise OSError(28, "No space left on device", str(file))
        real(file)

    monkeypatch.setattr(files, name, flush)


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_a_disk_full_before_the_first_block_leaves_nothing(models, tmp_path, monkeypatch, allowed):
    for target in (tmp_path / "a" / "new", tmp_path / "empty"):
        with monkeypatch.context() as patched:
            full(patched, allowed)
            if target.name == "empty":
                target.mkdir()
            with pytest.raises(RunError, match="No space left on device"):
                prune(models / "dense", target, METHOD)
    assert not (tmp_path / "a").exists()
    assert list((tmp_path / "empty").iterdir()) == []


def fails_for_space(action):
    """Whether it ends with the sentence that names the full disk."""
    try:
        action()
    except RunError as error:
        if "No space left on device" not in str(error):
            raise
        return True
    return False


def test_a_disk_full_at_any_later_file_is_one_sentence_and_the_run_continues(models, tmp_path, monkeypatch):
    for overwrite in (False, True):
        for allowed in range(5 if overwrite else 3, 40, 4):
            target = tmp_path / f"{overwrite}-{allowed}"
            if overwrite:
                put(models / "former", target)
            before = contents(target)
            with monkeypatch.context() as patched:
                full(patched, allowed)
                if not fails_for_space(lambda: prune(models / "dense", target, OTHER, overwrite=overwrite)):  # noqa: B023
                    break
            assert contents(target).items() >= before.items()
            assert not [name for name in contents(target) if name.endswith(".budwood-tmp")]
            prune(models / "dense", target, OTHER, overwrite=overwrite)
            assert model_files(target) == model_files(models / "new")
        assert allowed > 10


def test_a_folder_that_cannot_be_written_is_one_sentence(models, tmp_path, monkeypatch):
    """A swap that fails halfway keeps the new files, and the same command completes it."""
    target = put(models / "former", tmp_path / "out")
    real, moved = os.replace, []

    def replace(source, destination):
        if Path(source).parent.name == STAGING and Path(destination).parent == target:
            moved.append(destination)
            if len(moved) == 4:
                raise OSError(5, "Input/output error")
        real(source, destination)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace)
        with pytest.raises(RunError, match="Input/output error"):
            prune(models / "dense", target, OTHER, overwrite=True)
    assert not (target / "config.json").exists()
    prune(models / "dense", target, OTHER)
    assert model_files(target) == model_files(models / "new")


def test_reports_of_finished_runs_are_read_not_trusted(models, tmp_path):
    target = put(models / "former", tmp_path / "out")
    (target / "report.json").write_text("{")
    with pytest.raises(RunError, match=r"report\.json is damaged"):
        prune(models / "dense", target, METHOD)
    (target / "report.json").unlink()
    prune(models / "dense", target, METHOD)
    assert json.loads((target / "report.json").read_text())["method"] == METHOD
    assert model_files(target) == model_files(models / "former")


@pytest.mark.parametrize("place", ["companions", "copy_companions"])
def test_a_source_that_vanishes_around_its_companions_is_no_success(models, tmp_path, monkeypatch, place):
    """As they are listed at first, and as they are copied."""
    source = put(models / "dense", tmp_path / "source")
    real = getattr(run_module, place)

    def vanishing(*arguments):
        source.rename(tmp_path / "away")
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(run_module, place, vanishing)
        with pytest.raises(RunError, match="is gone; put it back"):
            prune(source, tmp_path / "out", METHOD)
    assert not (tmp_path / "out" / "config.json").exists()
    (tmp_path / "away").rename(source)
    prune(source, tmp_path / "out", METHOD)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize("lost", ["tokenizer.json", ""])
def test_a_source_whose_companions_vanish_makes_no_folder_without_them(models, tmp_path, monkeypatch, lost):
    """A success would be a model without its tokenizer. What vanishes is one file, or the folder."""
    source = put(models / "dense", tmp_path / "source")
    prune(source, tmp_path / "whole", METHOD)
    real = run_module.measure

    def measure(*arguments, **options):  # when all weights are read
        (source / lost).rename(tmp_path / "away")
        return real(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "measure", measure)
        with pytest.raises(RunError, match="is gone; put it back"):
            prune(source, tmp_path / "out", METHOD)
    assert not (tmp_path / "out" / "config.json").exists()
    (tmp_path / "away").rename(source / lost)
    report = prune(source, tmp_path / "out", METHOD)
    assert all(block["seconds"] is None for block in report["blocks"])
    assert model_files(tmp_path / "out") == model_files(tmp_path / "whole")
