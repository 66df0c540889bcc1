"""The exported folder is an ordinary one: plain transformers loads it, with the same weights and logits."""

import json

import pytest
import torch
from budwood.checkpoints.export import export_dense
from families import tokenizer
from folders import change_tensor, logits, write_packed
from transformers import AutoModelForCausalLM, AutoTokenizer

from budwood.checkpoints import export
from budwood.checkpoints.loading import load
from budwood.checkpoints.reader import Shards
from budwood.errors import RunError, UsageError

FAMILIES = ["llama", "qwen2", "gemma3", "phi3", "opt", "gpt2", "qwen3_moe", "mixtral", "olmoe", "gpt_oss"]


@pytest.fixture
def packed(tmp_path):
    folder, model = write_packed(tmp_path / "packed")
    tokenizer().save_pretrained(folder)
    for name in ("recipe.json", "report.json", "report.md", "README.md"):
        (folder / name).write_text("{}")
    return folder, model


@pytest.mark.parametrize("name", FAMILIES)
def test_plain_transformers_loads_it(tmp_path, name):
    folder, _ = write_packed(tmp_path / "packed", name)
    target = export_dense(folder, tmp_path / "dense")
    plain, report = AutoModelForCausalLM.from_pretrained(target, dtype="auto", output_loading_info=True)
    assert not any(report.values()), report
    assert "quantization_config" not in json.loads((target / "config.json").read_text())
    assert set(Shards.of_folder(target).names()) <= set(plain.state_dict())
    dequantized = load(folder).dequantize()
    for (key, one), other in zip(plain.state_dict().items(), dequantized.state_dict().values(), strict=True):
        assert torch.equal(one, other), key
    assert torch.equal(logits(plain), logits(dequantized))


def test_records_and_tokenizer_go_along_and_the_card_does_not(packed, tmp_path):
    target = export_dense(packed[0], tmp_path / "dense")
    assert all((target / name).is_file() for name in ("recipe.json", "report.json", "report.md"))
    assert not (target / "README.md").exists()
    assert not list(target.glob("sparse*"))
    assert AutoTokenizer.from_pretrained(target)("ab")["input_ids"] == tokenizer()("ab")["input_ids"]
    assert not list(tmp_path.glob(".*"))


def test_shards_stay_small(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SHARD_BYTES", 10_000)
    target = export_dense(packed[0], tmp_path / "dense")
    shards = list(target.glob("model-*.safetensors"))
    assert len(shards) > 5
    assert max(shard.stat().st_size for shard in shards) < 12_000
    assert torch.equal(logits(load(target)), logits(packed[1]))


def test_a_folder_saved_by_transformers_is_exported_too(packed, tmp_path):
    load(packed[0]).save_pretrained(tmp_path / "again")
    target = export_dense(tmp_path / "again", tmp_path / "dense")
    assert torch.equal(logits(load(target)), logits(packed[1]))


def test_the_target_is_protected(packed, tmp_path):
    folder, model = packed
    target = tmp_path / "dense"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        export_dense(folder, target)
    with pytest.raises(UsageError, match="cannot be written to"):
        export_dense(folder, folder, overwrite=True)
    with pytest.raises(UsageError, match="cannot be written to"):
        export_dense(folder, target / "notes.txt")
    export_dense(folder, target, overwrite=True)
    assert (target / "notes.txt").read_text() == "mine"
    assert torch.equal(logits(load(target)), logits(model))


def test_what_is_not_packed_is_refused(packed, tmp_path):
    dense = export_dense(packed[0], tmp_path / "dense")
    with pytest.raises(UsageError, match="nothing to unpack"):
        export_dense(dense, tmp_path / "more")
    with pytest.raises(UsageError, match=r"no config\.json"):
        export_dense(tmp_path / "nowhere", tmp_path / "more")


def test_damage_is_refused_and_leaves_nothing(tmp_path):
    folder, _ = write_packed(tmp_path / "packed", format="two_four_csr")
    change_tensor(folder, "model.layers.0.mlp.up_proj.rec_columns", lambda tensor: tensor + 1000)
    with pytest.raises(RunError, match="outside the columns"):
        export_dense(folder, tmp_path / "dense")
    assert [file.name for file in tmp_path.iterdir()] == ["packed"]
