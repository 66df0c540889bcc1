"""Tensors read by name are those that transformers loads, whatever names, experts and formats the files have."""

import pytest
import torch
from families import FAMILIES, MOE, build, save_model
from folders import change_tensor, write_packed
from reshaped import write_reshaped
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from budwood.checkpoints.reader import Shards
from budwood.checkpoints.source import Source, open_source
from budwood.checkpoints.weights import Weights, assemble, storage_dtype
from budwood.errors import RunError
from budwood.models.experts import unfuse

PACKED = ["llama", "gpt2", "phi3", "mixtral", "qwen3_moe", "gpt_oss"]


def unfused_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """All tensors of a model, experts as plain linears; tied ones under their first name."""
    unfuse(model)
    tied = set(model.all_tied_weights_keys)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(expected) <= set(found)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def weights_of(source: Source) -> Weights:
    return source.weights(source.structure())


@pytest.mark.parametrize("original_format", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_tensors_are_those_of_from_pretrained(tmp_path, name, original_format):
    save_model(name, tmp_path, original_format)
    weights = weights_of(open_source(tmp_path))
    found = weights.read(weights.names())
    check_equal(found, unfused_state(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)))


@pytest.mark.parametrize("name", PACKED)
def test_packed_matrices_are_unpacked_as_the_modules_hold_them(tmp_path, name):
    folder, model = write_packed(tmp_path, name)
    weights = weights_of(open_source(folder))
    assert weights.packed
    check_equal(weights.read(weights.names()), unfused_state(model))


@pytest.mark.parametrize("format", ["two_four", None])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "qwen3_moe"])
def test_parameters_of_other_shapes(tmp_path, name, format):
    """Removed neurons, a narrowed expert, added biases, packed or not."""
    folder, model = write_reshaped(tmp_path, name, format=format)
    weights = weights_of(open_source(folder))
    check_equal(weights.read(weights.names()), unfused_state(model))


@pytest.mark.parametrize("name", ["llama", "bloom", "mixtral"])
def test_names_below_a_prefix_are_read_alone(tmp_path, name):
    """The blocks and the rest together are the whole, and a block's tensors are those of its module."""
    save_model(name, tmp_path)
    source = open_source(tmp_path)
    structure = source.structure()
    weights = source.weights(structure)
    prefix = f"{structure.path}.1."
    block = weights.read(weights.names(prefix))
    assert {full.removeprefix(prefix) for full in block} == set(structure.modules[1].state_dict())
    in_blocks = weights.names(f"{structure.path}.")
    assert 0 < len(in_blocks) < len(weights.names())
    assert set(weights.names(prefix)) < set(in_blocks)


def test_names_of_the_base_model_are_read_too(tmp_path):
    """Files without the prefix of the whole model, as a saved base model has them."""
    model = build("llama")
    model.save_pretrained(tmp_path)
    model.model.save_pretrained(tmp_path / "base")
    source = open_source(tmp_path)
    base = Weights(Shards.of_folder(tmp_path / "base"), source.structure())
    expected = {name: tensor for name, tensor in unfused_state(model).items() if name != "lm_head.weight"}
    check_equal(base.read(base.names()), expected)


def test_a_missing_part_of_a_packed_matrix_is_named(tmp_path):
    folder, _ = write_packed(tmp_path, format="two_four", recovered=0.0)
    linear = "model.layers.1.mlp.up_proj"
    change_tensor(folder, f"{linear}.places", lambda tensor: None)
    weights = weights_of(open_source(folder))
    with pytest.raises(RunError, match=rf"lacks '{linear}\.places', a part of {linear}"):
        weights.read(weights.names(f"{linear}."))


@pytest.mark.parametrize("name", MOE)
def test_fused_experts_are_read_as_one_tensor_and_split(tmp_path, name):
    save_model(name, tmp_path, original_format=False)
    weights = weights_of(open_source(tmp_path))
    (fused,) = [full for full in weights.names() if full.endswith(".1.mlp.experts.down_proj")]
    path = fused.removesuffix("_proj")
    assert list(weights.read([fused])) == [f"{path}.{expert}.weight" for expert in range(4)]


def test_assemble_leaves_its_argument_as_it_is(tmp_path):
    folder, _ = write_packed(tmp_path, format="two_four", recovered=0.0)
    source = open_source(folder)
    stored = {name: source.shards.read(name) for name in source.shards.names()}
    names = set(stored)
    found = assemble(stored, source.packed, source.structure().module)
    assert set(stored) == names
    assert found["model.layers.0.mlp.up_proj.weight"].shape == (64, 32)


def test_the_storage_dtype_is_the_one_of_most_bytes(tmp_path):
    save_model("llama", tmp_path, dtype=torch.bfloat16, change=lambda model: model.model.norm.float())
    assert storage_dtype(Shards.of_folder(tmp_path)) == torch.bfloat16
