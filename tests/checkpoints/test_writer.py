"""Shards, index and config of a run; and what of a block is packed how."""

import json

import pytest
import torch
from families import build
from safetensors import safe_open
from safetensors.torch import load_file

from budwood.checkpoints.checksums import sha256
from budwood.checkpoints.description import Description
from budwood.checkpoints.packing import pack, pack_named
from budwood.checkpoints.writer import OUTSIDE, Writer
from budwood.errors import RunError, UsageError
from budwood.formats import FORMATS, store
from budwood.models.experts import unfuse

NAME = "model.layers.0.mlp.up_proj"


def weight(seed=0):
    """[8, 16] in 2:4."""
    dense = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))
    return torch.where(torch.arange(16) % 4 < 2, dense, 0)


def tensors(layout="two_four"):
    return {f"{NAME}.{part}": tensor for part, tensor in store(weight(), layout)[1].items()} | {"norm": torch.ones(3)}


def written(folder, layout="auto", blocks=2, shapes=None, run="run"):
    """A writer that has written every shard: a packed matrix in block 0, nothing packed elsewhere."""
    writer = Writer(folder, run, blocks, layout)
    packed = {NAME: {"format": "two_four", "shape": [8, 16]}}
    if layout == "dense":
        writer.write(0, {f"{NAME}.weight": weight()}, {}, shapes or {}, {})
    else:
        writer.write(0, tensors(), packed, shapes or {}, {"relative_error": 0.5})
    for index in range(1, blocks):
        writer.write(index, {f"model.layers.{index}.norm.weight": torch.ones(3)}, {}, {}, {})
    writer.write_outside(lambda: {"head": torch.ones(2, 2)})
    return writer


def test_a_shard_holds_the_tensors_the_run_and_the_notes(tmp_path):
    writer = written(tmp_path)
    assert [writer.shard(index).name for index in (OUTSIDE, 0, 1)] == [
        f"sparse-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)
    ]
    about = writer.about(0)
    assert about.run == "run"
    assert about.packed == {NAME: {"format": "two_four", "shape": [8, 16]}}
    assert about.notes == {"relative_error": 0.5}
    found = load_file(writer.shard(0))
    assert found.keys() == tensors().keys()
    assert all(torch.equal(found[name].view(tensor.dtype), tensor) for name, tensor in tensors().items())
    with safe_open(writer.shard(0), "pt") as file:
        assert file.metadata()["format"] == "pt"
    assert not [file for file in tmp_path.iterdir() if file.suffix == ".tmp"]


def test_foreign_shards_are_not_taken(tmp_path):
    written(tmp_path, run="one")
    other = Writer(tmp_path, "other", 2, "auto")
    assert not any(other.finished(index) for index in range(OUTSIDE, 2))
    other.write_outside(lambda: {"head": torch.zeros(2, 2)})
    assert not load_file(other.shard(OUTSIDE))["head"].any()
    assert Writer(tmp_path, "one", 2, "auto").finished(0)
    assert not Writer(tmp_path, "one", 3, "auto").finished(0)  # of a model with another number of blocks
    assert not Writer(tmp_path, "one", 2, "dense").finished(0)


def test_what_is_outside_the_blocks_is_written_once(tmp_path):
    writer = written(tmp_path)
    writer.write_outside(lambda: pytest.fail("read again"))


def test_a_damaged_header_names_the_file(tmp_path):
    writer = written(tmp_path)
    writer.shard(1).write_bytes(b"\x10\0\0\0\0\0\0\0not json at all ")
    with pytest.raises(RunError, match=writer.shard(1).name):
        writer.finished(1)


@pytest.mark.parametrize(
    ("layout", "shapes", "needed"),
    [("auto", {}, True), ("bitmask", {}, True), ("dense", {}, False), ("dense", {"norm.bias": [3]}, True)],
)
def test_index_and_config(tmp_path, layout, shapes, needed):
    """A plug-in is needed for packed matrices and for shapes that config.json does not give, else for nothing."""
    writer = written(tmp_path, layout, shapes=shapes)
    assert writer.shapes() == shapes
    description = Description({"model_type": "llama", "torch_dtype": "float32"}, shapes)
    assert writer.needs_plug_in(description) == needed
    writer.write_index(description)
    name = f"{'sparse' if needed else 'model'}.safetensors.index.json"
    assert [file.name for file in tmp_path.glob("*.index.json")] == [name]
    index = json.loads((tmp_path / name).read_text())
    shards = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    expected = {key: shard for shard in shards for key in load_file(tmp_path / shard)}
    assert index["weight_map"] == expected
    assert index["metadata"]["total_size"] == writer.total_bytes()
    assert all(sha256(tmp_path / shard) in json.dumps(index) for shard in shards)
    made = writer.config(description, "wanda()", "bfloat16")
    entry = made.pop("quantization_config", None)
    assert made == {"model_type": "llama", "dtype": "bfloat16"}
    if not needed:
        assert entry is None
    else:
        assert (entry["quant_method"], entry["format_version"], entry["recipe"]) == ("budwood", 1, "wanda()")
        assert entry["linears"] == ({} if layout == "dense" else writer.about(0).packed)
        assert entry.get("shapes", {}) == shapes


def test_bytes_are_counted_by_matrix_and_in_all(tmp_path):
    writer = written(tmp_path)
    parts = tensors()
    assert writer.sizes()[NAME] == sum(tensor.nbytes for name, tensor in parts.items() if name != "norm")
    assert writer.total_bytes() == sum(tensor.nbytes for tensor in parts.values()) + 3 * 4 + 4 * 4


@pytest.mark.parametrize("layout", ["dense", "bitmask", "auto"])
def test_only_the_matrices_that_are_named_are_packed(layout):
    block = build("llama").model.layers[0]
    prefix = "model.layers.0"
    state = {f"{prefix}.{name}": tensor for name, tensor in block.state_dict().items()}
    pruned = torch.where(torch.arange(32) % 4 < 2, state[f"{NAME}.weight"], 0)
    state[f"{NAME}.weight"] = pruned
    found, packed = pack(prefix, block, state, {NAME: pruned}, layout, {})
    if layout == "dense":
        assert (found, packed) == (state, {})
        return
    assert packed == {NAME: {"format": "bitmask" if layout == "bitmask" else "two_four", "shape": [64, 32]}}
    assert f"{NAME}.weight" not in found
    format = FORMATS[packed[NAME]["format"]]
    assert torch.equal(format.unpack({part: found[f"{NAME}.{part}"] for part in format.suffixes}, (64, 32)), pruned)
    assert all(found[name] is state[name] for name in state if not name.startswith(NAME))


@pytest.mark.parametrize("apart", ["", "packed", "reshaped"])
def test_experts_are_fused_again_unless_one_of_them_is_packed_or_reshaped(apart):
    model = build("mixtral")
    fused = {f"model.layers.0.{name}": tensor for name, tensor in model.model.layers[0].state_dict().items()}
    unfuse(model)
    block, prefix = model.model.layers[0], "model.layers.0"
    state = {f"{prefix}.{name}": tensor for name, tensor in block.state_dict().items()}
    name = next(name for name in state if name.endswith("down.1.weight"))
    if apart == "reshaped":
        state[name] = state[name][:, 1:]
    linears = {name.removesuffix(".weight"): state[name]} if apart == "packed" else {}
    found, _ = pack(prefix, block, state, linears, "bitmask", {}, [name] if apart == "reshaped" else [])
    if apart:
        assert not any(key.endswith("down_proj") and ".experts." in key for key in found)
    else:
        assert found.keys() == fused.keys()
        assert all(torch.equal(found[key], fused[key]) for key in fused)


def test_a_format_that_cannot_hold_a_matrix_names_it():
    with pytest.raises(UsageError, match=f"^{NAME}: .*choose --format auto, or skip it with --skip '{NAME}'"):
        pack_named(NAME, torch.ones(8, 16), "two_four")
