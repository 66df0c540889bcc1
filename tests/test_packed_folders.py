"""A packed folder is opened in one way: whichever verb reads it, checksums and positions are checked before use."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from families import save_model, token_ids
from safetensors.torch import load_file, save_file

from budwood.benchmarking import bench
from budwood.checkpoints.checksums import sha256
from budwood.checkpoints.loading import load
from budwood.checkpoints.reader import read_header
from budwood.errors import RunError
from budwood.evaluation.perplexity import evaluate
from budwood.inspection import inspect
from budwood.pruning import prune
from budwood.repacking import repack
from budwood.retraining import retrain

IDS = token_ids(1, 200) % 90 + 3
VERBS = {
    "evaluate": lambda folder, out: evaluate(str(folder), IDS, seq_length=24, limit=1),
    "stream": lambda folder, out: evaluate(str(folder), IDS, seq_length=24, limit=1, stream=True),
    "inspect": lambda folder, out: inspect(folder),
    "export": lambda folder, out: repack(folder, out, "dense"),
    "prune": lambda folder, out: prune(folder, out, 'magnitude("2:4")', format="dense"),
    "retrain": lambda folder, out: retrain(folder, out, IDS, num_samples=4, seq_length=24, steps=1),
    "bench": lambda folder, out: bench(folder),
    "load": lambda folder, out: load(folder),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Packed in several formats, and one dense folder that has checksums as well."""
    folder = tmp_path_factory.mktemp("folders")
    save_model("llama", folder / "source")
    for layout in ("two_four_compact", "two_four_csr", "two_four_ell", "bitmask"):
        prune(folder / "source", folder / layout, "magnitude('37%')", format=layout)
    repack(folder / "bitmask", folder / "dense", "dense")
    return folder


@pytest.fixture
def copy(folders, tmp_path):
    return lambda name: Path(shutil.copytree(folders / name, tmp_path / name))


def file_of(folder, name):
    return next(file for file in folder.glob("*.safetensors") if name in read_header(file)[0])


def flip(folder, name):
    file = file_of(folder, name)
    content, place = bytearray(file.read_bytes()), read_header(file)[0][name]
    content[place.start + place.nbytes // 2] ^= 1
    file.write_bytes(content)


def alter(folder, name, change):
    """Changes a tensor and corrects the checksum."""
    file = file_of(folder, name)
    metadata, tensors = read_header(file)[1], load_file(file)
    tensors[name] = change(tensors[name])
    save_file(tensors, file, metadata)
    index = folder / "sparse.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["metadata"]["sha256"][file.name] = sha256(file)
    index.write_text(json.dumps(listed))


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("bitmask", "model.layers.1.mlp.up_proj.values"),
        ("bitmask", "model.embed_tokens.weight"),
        ("dense", "model.layers.3.mlp.down_proj.weight"),
    ],
)
def test_a_flipped_bit_is_noticed_by_every_verb(copy, tmp_path, verb, layout, name):
    if layout == "dense" and verb in ("bench", "export", "retrain"):
        pytest.skip("refused for a folder in which nothing is packed, or needs another one")
    folder = copy(layout)
    flip(folder, name)
    with pytest.raises(RunError, match="was altered or truncated"):
        VERBS[verb](folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def put(index, value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[index] = value
        return tensor

    return change


def repeat(tensor):
    """The second column as the first."""
    return put(1, int(tensor.view(-1)[0]))(tensor)


UNSOUND = [
    ("two_four_compact", "rec_columns", put(0, 255)),
    ("two_four_compact", "rec_columns", repeat),
    ("two_four_compact", "places", put(0, 0)),
    ("two_four_csr", "rec_columns", put(0, 2**30)),
    ("two_four_csr", "rec_columns", repeat),
    ("two_four_csr", "rec_values", torch.Tensor.double),
    ("two_four_ell", "ell_columns", put(0, 2**20)),
    ("two_four_ell", "ell_values", torch.ones_like),
    ("bitmask", "bitmask", put(0, 255)),
]


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("bench", "evaluate")])  # they call load
@pytest.mark.parametrize(("layout", "part", "change"), UNSOUND)
def test_positions_that_no_packing_gives_are_refused_by_every_verb(copy, tmp_path, verb, layout, part, change):
    folder = copy(layout)
    alter(folder, f"model.layers.0.mlp.down_proj.{part}", change)
    with pytest.raises(RunError, match=r"is damaged|does not fit"):
        VERBS[verb](folder, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_blocks_are_checked_as_the_file_has_them_when_they_are_cast(folders, copy):
    """In another dtype, and with another best size of blocks there."""
    load(folders / "two_four_ell", dtype=torch.bfloat16)
    folder = copy("two_four_ell")
    alter(folder, "model.layers.0.mlp.down_proj.ell_values", torch.ones_like)
    with pytest.raises(RunError, match="position of the 2:4 part"):
        load(folder, dtype=torch.bfloat16)
