"""What an interrupted run left is what it wrote, or it is refused: no flipped bit gets a fresh checksum."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from disk import model_files
from families import save_model, token_ids

from budwood.checkpoints.reader import read_header
from budwood.checkpoints.shard_digests import FILE as SHARDS
from budwood.checkpoints.work import Work
from budwood.errors import RunError, UsageError
from budwood.progress import Silent
from budwood.pruning import prune
from budwood.retraining import retrain
from budwood.runs.target import WORK
from budwood.training.descent import Checkpoints, check_state

METHOD = 'magnitude("2:4")'
IDS = token_ids(1, 400) % 90 + 3
TRAINING = {"num_samples": 4, "seq_length": 24, "steps": 4, "batch": 2, "rank": 2, "save_every": 1}
TRAINING |= {"compute_dtype": "float32"}


class Ends(Silent):
    """Ends a run when it tells of a block, or a step, for the third time."""

    def __init__(self, what):
        self.what = what

    def block(self, index, name, *_, **__):
        if name.startswith(self.what) and index == 2:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_model("llama", folder / "dense")
    prune(folder / "dense", folder / "pruned", METHOD)
    with pytest.raises(KeyboardInterrupt):
        prune(folder / "dense", folder / "half", METHOD, progress=Ends("model"))
    with pytest.raises(KeyboardInterrupt):
        retrain(folder / "pruned", folder / "half-trained", IDS, progress=Ends("step"), **TRAINING)
    return folder


@pytest.fixture
def half(models, tmp_path):
    def copied(name) -> Path:
        return shutil.copytree(models / name, tmp_path / name)

    return copied


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_a_flipped_bit_in_a_finished_shard_is_refused(models, half):
    folder = half("half")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) >= 2
    flip(shards[0], -9)
    with pytest.raises(RunError, match=rf"{shards[0].name} was altered since it was written; delete it"):
        prune(models / "dense", folder, METHOD)
    assert not (folder / "config.json").exists()
    shards[0].unlink()
    prune(models / "dense", folder, METHOD)
    assert model_files(folder) == model_files(models / "pruned")


def test_notes_of_a_shard_that_were_altered_are_refused_too(models, half):
    folder = half("half")
    shard = sorted(folder.glob("*.safetensors"))[1]
    flip(shard, re.search(rb"nonzeros\D+\d(\d)", shard.read_bytes()).start(1))
    assert read_header(shard)
    with pytest.raises(RunError, match="was altered since it was written"):
        prune(models / "dense", folder, METHOD)


def test_shards_of_which_no_digest_is_known_are_written_again(models, half):
    folder = half("half")
    flip(sorted(folder.glob("*.safetensors"))[0], -9)
    (folder / WORK / SHARDS).unlink()
    prune(models / "dense", folder, METHOD)
    assert model_files(folder) == model_files(models / "pruned")


def test_a_shard_that_is_altered_in_a_folder_that_lost_another_is_refused(models, half):
    """Its digests are the checksums of the index."""
    folder = half("pruned")
    shards = sorted(folder.glob("*.safetensors"))
    shards[1].unlink()
    flip(shards[2], -9)
    with pytest.raises(RunError, match=f"{shards[2].name} was altered"):
        prune(models / "dense", folder, METHOD)


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', "[" * 100_000])
def test_digests_that_are_damaged_are_one_sentence(models, half, content):
    folder = half("half")
    (folder / WORK / SHARDS).write_text(content)
    with pytest.raises(RunError, match=rf"{SHARDS} is damaged.*delete it"):
        prune(models / "dense", folder, METHOD)


@pytest.mark.parametrize("content", ["{", "[]", "3", "[" * 100_000])
def test_digests_of_the_source_that_are_damaged_make_another_run(models, half, content):
    folder = half("half")
    (folder / WORK / "reads.json").write_text(content)
    with pytest.raises(UsageError, match="holds another run"):
        prune(models / "dense", folder, METHOD)


@pytest.mark.parametrize("place", [40, -1, -2000])
def test_a_checkpoint_of_a_training_that_was_altered_is_refused(models, half, place):
    """Tensors, optimiser state and header: the training would go on to other weights."""
    folder = half("half-trained")
    checkpoint = next((folder / WORK).glob("*.safetensors"))
    flip(checkpoint, place)
    with pytest.raises(RunError, match=rf"{checkpoint.name} (was altered|is truncated or damaged)"):
        retrain(models / "pruned", folder, IDS, **TRAINING)
    checkpoint.unlink()
    retrain(models / "pruned", folder, IDS, **TRAINING)
    assert (folder / "config.json").is_file()


def test_a_recipe_of_a_training_that_was_altered_is_another_run(models, half):
    folder = half("half-trained")
    content = json.loads((folder / "recipe.json").read_text())
    for change in ({"training": {**content["training"], "rate": 1.0}}, {"training": None}, {"verb": "prune"}):
        (folder / "recipe.json").write_text(json.dumps({**content, **change}))
        with pytest.raises(UsageError, match="holds another run"):
            retrain(models / "pruned", folder, IDS, **TRAINING)


def test_a_checkpoint_of_other_tensors_is_refused(tmp_path):
    masters = {"a": torch.zeros(2, 3)}
    sound = {f"{part}/a": torch.zeros(2, 3) for part in ("now", "best", "exp_avg", "exp_avg_sq")}
    sound |= {"numbers": torch.zeros(3, dtype=torch.float64), "step/a": torch.tensor(1.0)}
    checkpoints = Checkpoints(Work(tmp_path), "steps", 1)
    check_state(sound, masters, checkpoints)
    for change in (
        {"now/a": torch.zeros(3, 2)},
        {"exp_avg/a": torch.zeros(1)},
        {"now/b": torch.zeros(1)},
        {"numbers": torch.zeros(2)},
    ):
        with pytest.raises(RunError, match=r"steps\.safetensors is of another training"):
            check_state(sound | change, masters, checkpoints)
    for name in ("now/a", "best/a", "numbers"):
        with pytest.raises(RunError, match="of another training"):
            check_state({key: value for key, value in sound.items() if key != name}, masters, checkpoints)


def test_records_and_tensors_that_were_altered_or_are_gone_are_refused(tmp_path):
    work = Work(tmp_path / "run" / "work")
    work.record("figures", lambda: {"a": [1.5, float("nan")], "b": "x"})
    work.save("sums", {"x": torch.arange(5)})
    again = Work(work.folder)
    assert again.record("figures")["b"] == "x"
    assert torch.equal(again.tensors("sums")["x"], torch.arange(5))
    file = work.folder / "figures.json"
    file.write_text(file.read_text().replace("1.5", "2.5"))
    with pytest.raises(RunError, match=r"figures\.json was altered"):
        again.record("figures", dict)
    file.write_text('{"a": 1}')
    with pytest.raises(RunError, match=r"figures\.json is damaged: sha256 is missing"):
        again.record("figures", dict)
    flip(work.folder / "sums.safetensors", -1)
    with pytest.raises(RunError, match=r"sums\.safetensors was altered"):
        Work(work.folder).tensors("sums")
    for call in (lambda: again.record("none"), lambda: again.tensors("none")):
        with pytest.raises(RunError, match=r"is missing; delete the unfinished run in .*run"):
            call()
