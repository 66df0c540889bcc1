"""A source that has changed is another source, wherever the change is; what is unchanged is read once."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from disk import CALIBRATION, model_files
from families import save_model, token_ids
from safetensors.torch import load_file

from budwood.checkpoints import reader, reads
from budwood.checkpoints.checksums import index_of, sha256
from budwood.checkpoints.loading import load
from budwood.checkpoints.reader import read_header, read_tensor
from budwood.errors import RunError, UsageError
from budwood.progress import Silent
from budwood.pruning import prune
from budwood.repacking import repack
from budwood.retraining import retrain
from budwood.runs.recipe import recipe_options

METHOD = 'magnitude("2:4")'
IDS = token_ids(1, 400) % 90 + 3
OTHER = "held something else when it read them"


class Stopped(RunError):
    """What ends a run in these tests."""


class StopAt(Silent):
    """Stops a run when a block was written, in the stream that comes after so many surveys."""

    def __init__(self, index: int, surveys: int):
        self.index, self.surveys = index, surveys

    def block(self, index, *args):
        if index == self.index:
            self.surveys -= 1
            if self.surveys < 0:
                raise Stopped("stopped")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    save_model("llama", folder)
    return folder


@pytest.fixture
def source(dense, tmp_path):
    return Path(shutil.copytree(dense, tmp_path / "source"))


def change(folder, name):
    """Another last byte of a tensor, beyond what a fingerprint reads; time of change as before."""
    file = next(file for file in folder.glob("*.safetensors") if name in read_header(file)[0])
    place, times = read_header(file)[0][name], (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    content = bytearray(file.read_bytes())
    content[place.start + place.nbytes - 2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=times)
    index = folder / "sparse.safetensors.index.json"
    if index.is_file():  # with a checksum that fits
        listed = json.loads(index.read_text())
        digests = {shard: sha256(folder / shard) for shard in listed["metadata"]["sha256"]}
        index.write_text(json.dumps(index_of(listed["weight_map"], listed["metadata"]["total_size"], digests)))


def interrupted(source, target, at, method=METHOD, surveys=0, **options):
    with pytest.raises(Stopped):
        prune(source, target, method, IDS, progress=StopAt(at, surveys), **options, **CALIBRATION)


NAMES = ["model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight", "model.layers.3.self_attn.q_proj.weight"]


@pytest.mark.parametrize("name", NAMES)
def test_a_finished_run_of_a_source_that_changed_is_not_reported_as_finished(source, tmp_path, name):
    prune(source, tmp_path / "out", METHOD)
    before = model_files(tmp_path / "out")
    change(source, name)
    with pytest.raises(UsageError, match=OTHER):
        prune(source, tmp_path / "out", METHOD)
    assert model_files(tmp_path / "out") == before
    prune(source, tmp_path / "out", METHOD, overwrite=True)
    prune(source, tmp_path / "fresh", METHOD)
    assert model_files(tmp_path / "out") == model_files(tmp_path / "fresh") != before


@pytest.mark.parametrize("companion", ["tokenizer_config.json", "generation_config.json"])
def test_a_companion_that_changed_is_another_source(source, tmp_path, companion):
    prune(source, tmp_path / "out", METHOD)
    content = json.loads((source / companion).read_text())
    (source / companion).write_text(json.dumps({**content, "note": 1}))
    with pytest.raises(UsageError, match=OTHER):
        prune(source, tmp_path / "out", METHOD)


def test_code_that_changed_is_another_source_where_it_is_run(source, tmp_path):
    (source / "modeling.py").write_text("A = 1")
    prune(source, tmp_path / "out", METHOD, trust_remote_code=True)
    (source / "modeling.py").write_text("A = 2")
    with pytest.raises(UsageError, match="holds another run: its source"):
        prune(source, tmp_path / "out", METHOD, trust_remote_code=True)


def test_an_equal_source_in_another_place_is_the_same(source, dense, tmp_path):
    prune(dense, tmp_path / "out", METHOD)
    before = model_files(tmp_path / "out")
    prune(source, tmp_path / "out", METHOD)
    assert model_files(tmp_path / "out") == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_run_is_not_continued_with_a_source_that_changed(source, tmp_path, overwrite):
    """In the target itself, and staged beside a former model."""
    target = tmp_path / "out"
    if overwrite:
        prune(source, target, 'magnitude("4:8")')
    interrupted(source, target, 1, overwrite=overwrite)
    change(source, "model.layers.0.mlp.down_proj.weight")
    if not overwrite:
        with pytest.raises(UsageError, match=OTHER):
            prune(source, target, METHOD, **CALIBRATION)
    prune(source, target, METHOD, overwrite=True, **CALIBRATION)
    prune(source, tmp_path / "fresh", METHOD, **CALIBRATION)
    assert model_files(target) == model_files(tmp_path / "fresh")


def test_what_was_not_read_may_change(source, tmp_path):
    interrupted(source, tmp_path / "out", 0)
    change(source, "model.layers.3.mlp.down_proj.weight")
    report = prune(source, tmp_path / "out", METHOD, **CALIBRATION)
    assert report["blocks"][0]["seconds"] is None
    prune(source, tmp_path / "fresh", METHOD, **CALIBRATION)
    assert model_files(tmp_path / "out") == model_files(tmp_path / "fresh")


def test_what_a_survey_found_belongs_to_the_source_that_it_read(source, tmp_path):
    """`allocate` streams the whole model first: its result is not used for another one."""
    method = "allocate(wanda('50%'))"
    interrupted(source, tmp_path / "out", 0, method, surveys=1)
    change(source, "model.layers.3.mlp.down_proj.weight")
    with pytest.raises(UsageError, match=OTHER):
        prune(source, tmp_path / "out", method, IDS, **CALIBRATION)


def test_a_source_that_changes_during_a_run_ends_it(source, tmp_path):
    class Change(Silent):
        def block(self, index, name, *args):
            if index == 3:  # of the survey
                change(source, "model.layers.0.mlp.down_proj.weight")

    with pytest.raises(RunError, match=r"was changed during the run: model\.layers\.0\.mlp\.down_proj\.weight"):
        prune(source, tmp_path / "out", "allocate(wanda('50%'))", IDS, progress=Change(), **CALIBRATION)
    assert not (tmp_path / "out" / "config.json").exists()


def test_an_export_of_a_folder_that_changed_is_another_one(source, tmp_path):
    prune(source, tmp_path / "packed", METHOD)
    repack(tmp_path / "packed", tmp_path / "out", "dense")
    change(tmp_path / "packed", NAMES[0])
    with pytest.raises(UsageError, match=OTHER):
        repack(tmp_path / "packed", tmp_path / "out", "dense")


def test_a_retraining_of_a_folder_that_changed_is_another_one(source, tmp_path):
    def train():
        return retrain(tmp_path / "packed", tmp_path / "out", IDS, num_samples=4, seq_length=24, steps=1, batch=1)

    prune(source, tmp_path / "packed", METHOD)
    train()
    change(tmp_path / "packed", NAMES[0])
    with pytest.raises(UsageError, match=OTHER):
        train()


def test_a_folder_made_again_from_a_changed_source_says_so(source, tmp_path):
    prune(source, tmp_path / "out", METHOD)
    options = recipe_options(tmp_path / "out")
    report = prune(source, tmp_path / "same", **options)
    assert report["notes"] == []
    change(source, NAMES[1])
    report = prune(source, tmp_path / "again", **options)
    assert any("not the model of the recipe" in note for note in report["notes"])


def test_a_new_run_reads_every_tensor_and_pruned_matrices_once_more(source, tmp_path, monkeypatch):
    read = []

    def counted(location):
        if location.file.parent == source:
            read.append((location.file, location.start))
        return read_tensor(location)

    monkeypatch.setattr(reader, "read_tensor", counted)
    monkeypatch.setattr(reads, "read_tensor", counted)
    prune(source, tmp_path / "out", METHOD)
    locations = reader.Shards.of_folder(source).locations
    matrices = json.loads((tmp_path / "out" / "report.json").read_text())["linears"]
    for name, place in locations.items():  # how much a matrix changed is measured against what is read again
        assert read.count((place.file, place.start)) == 1 + (name.removesuffix(".weight") in matrices), name


def test_a_folder_that_was_saved_over_is_not_reported_as_finished(source, tmp_path):
    prune(source, tmp_path / "out", METHOD)
    load(tmp_path / "out").save_pretrained(tmp_path / "out")
    with pytest.raises(UsageError, match="another program has saved a model over it"):
        prune(source, tmp_path / "out", METHOD)


def test_the_recipe_of_a_finished_run_holds_the_digest_of_its_source(source, tmp_path):
    prune(source, tmp_path / "out", METHOD)
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert len(recipe["source"]["content"]) == 64
    assert not (tmp_path / "out" / ".budwood-work").exists()
    tensors = load_file(next(source.glob("*.safetensors")))
    assert reads.digest_of(tensors[NAMES[0]]) == reads.digest_of(tensors[NAMES[0]].clone())
    assert reads.digest_of(torch.zeros(0, 3)) == reads.digest_of(torch.zeros(0))
