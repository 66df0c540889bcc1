"""The exported folder is an ordinary one: plain transformers loads it, with the same weights and logits."""

import json

import pytest
import torch
from checkpoints.folders import change_tensor, logits, write_packed
from families import save_model, token_ids, tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from budwood.checkpoints.loading import load
from budwood.checkpoints.reader import Shards
from budwood.errors import RunError, UsageError
from budwood.inspection import inspect
from budwood.pruning import prune
from budwood.repacking import repack

FAMILIES = ["llama", "qwen2", "gemma3", "phi3", "opt", "gpt2", "qwen3_moe", "mixtral", "olmoe", "gpt_oss"]
IDS = token_ids(1, 400) % 90 + 3


@pytest.fixture
def packed(tmp_path):
    folder, model = write_packed(tmp_path / "packed")
    tokenizer().save_pretrained(folder)
    return folder, model


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def check_plain(folder, target):
    """`target` loads without budwood, every tensor in its place, and is the model of `folder`."""
    assert "quantization_config" not in json.loads((target / "config.json").read_text())
    plain, report = AutoModelForCausalLM.from_pretrained(target, dtype="auto", output_loading_info=True)
    assert not any(report.values()), report
    dequantized = load(folder).dequantize()
    for (key, one), other in zip(plain.state_dict().items(), dequantized.state_dict().values(), strict=True):
        assert torch.equal(one, other), key
    assert torch.equal(logits(plain), logits(dequantized))


@pytest.mark.parametrize("name", FAMILIES)
def test_plain_transformers_loads_it(tmp_path, name):
    save_model(name, tmp_path / "source")
    report = prune(tmp_path / "source", tmp_path / "packed", 'magnitude("2:4")', dtype="bfloat16")
    assert report["linears"]
    exported = repack(tmp_path / "packed", tmp_path / "dense", "dense")
    assert {matrix["format"] for matrix in exported["linears"].values()} == {"dense"}
    check_plain(tmp_path / "packed", tmp_path / "dense")
    names = (set(Shards.of_folder(tmp_path / folder).names()) for folder in ("source", "dense"))
    assert len(set(map(frozenset, names))) == 1  # published names: experts one by one where the source has them so


@pytest.mark.parametrize("name", FAMILIES)
def test_a_packed_folder_without_recipe_is_exported_too(tmp_path, name):
    folder, _ = write_packed(tmp_path / "packed", name)
    repack(folder, tmp_path / "dense", "dense")
    check_plain(folder, tmp_path / "dense")


def test_a_folder_saved_by_transformers_is_exported_too(packed, tmp_path):
    load(packed[0]).save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "recipe.json").exists()
    repack(tmp_path / "again", tmp_path / "dense", "dense")
    assert torch.equal(logits(load(tmp_path / "dense")), logits(packed[1]))


def test_matrices_that_were_not_pruned_are_not_rounded_without_recipe(tmp_path):
    save_model("llama", tmp_path / "source")
    prune(tmp_path / "source", tmp_path / "packed", 'magnitude("2:4")', skip=["down_proj"])
    load(tmp_path / "packed").save_pretrained(tmp_path / "again")
    report = repack(tmp_path / "again", tmp_path / "int8", values="int8")
    assert report["linears"].keys() == inspect(tmp_path / "packed")["linears"].keys()
    before, after = (load(tmp_path / name).model.layers[1].mlp.down_proj.weight for name in ("packed", "int8"))
    assert torch.equal(before, after)


def test_records_and_tokenizer_go_along(packed, tmp_path):
    """The model card of the target says how to load the target."""
    (packed[0] / "README.md").write_text("pip install budwood")
    target = tmp_path / "dense"
    repack(packed[0], target, "dense")
    assert all((target / name).is_file() for name in ("recipe.json", "report.json", "report.md"))
    assert json.loads((target / "recipe.json").read_text())["verb"] == "export"
    assert "pip install budwood" not in (target / "README.md").read_text()
    assert "pip install transformers torch" in (target / "README.md").read_text()
    assert not list(target.glob("sparse*"))
    assert AutoTokenizer.from_pretrained(target)("ab")["input_ids"] == tokenizer()("ab")["input_ids"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["dense", "packed"]


def test_the_target_is_protected(packed, tmp_path):
    folder, model = packed
    target = tmp_path / "dense"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    before = contents(folder)
    with pytest.raises(UsageError, match="not empty"):
        repack(folder, target, "dense")
    for other, sentence in ((folder, "give another folder"), (target / "notes.txt", "is a file")):
        with pytest.raises(UsageError, match=sentence):
            repack(folder, other, "dense", overwrite=True)
    (target / "model.safetensors").write_text("mine")
    with pytest.raises(UsageError, match="was not written by budwood"):
        repack(folder, target, "dense", overwrite=True)
    assert contents(target) == {"notes.txt": b"mine", "model.safetensors": b"mine"}
    assert contents(folder) == before
    (target / "model.safetensors").unlink()
    repack(folder, target, "dense", overwrite=True)
    assert (target / "notes.txt").read_text() == "mine"
    assert torch.equal(logits(load(target)), logits(model))


def test_what_is_not_packed_is_refused(packed, tmp_path):
    save_model("llama", tmp_path / "source")
    repack(packed[0], tmp_path / "dense", "dense")
    prune(tmp_path / "source", tmp_path / "pruned", 'magnitude("2:4")', format="dense")
    for folder in ("dense", "pruned"):
        with pytest.raises(UsageError, match="nothing to unpack"):
            repack(tmp_path / folder, tmp_path / "more", "dense")
    for layout in ("dense", "auto"):
        with pytest.raises(UsageError, match="holds nothing that budwood pruned"):
            repack(tmp_path / "source", tmp_path / "more", layout)
    with pytest.raises(UsageError, match="there is no"):
        repack(tmp_path / "nowhere", tmp_path / "more", "dense")
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_damage_is_refused_and_leaves_nothing(tmp_path, overwrite):
    folder, _ = write_packed(tmp_path / "packed", format="two_four_csr")
    target = tmp_path / "dense"
    if overwrite:
        repack(folder, target, "dense")
    before = contents(target)
    change_tensor(folder, "model.layers.0.mlp.up_proj.rec_columns", lambda tensor: tensor + 1000)
    with pytest.raises(RunError, match="outside the columns"):
        repack(folder, target, "dense", overwrite=overwrite)
    assert contents(target) == before
    assert target.exists() is overwrite


def test_an_altered_shard_is_refused(packed, tmp_path):
    shard = sorted(packed[0].glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(RunError, match=shard.name):
        repack(packed[0], tmp_path / "dense", "dense")
    assert not (tmp_path / "dense").exists()
