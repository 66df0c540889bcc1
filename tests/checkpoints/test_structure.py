"""What is known of a model without its weights agrees with the model, whatever shapes it has."""

import pytest
from families import FAMILIES, build, save_model
from reshaped import KEPT, write_reshaped
from transformers import PreTrainedModel

from budwood.checkpoints.source import open_source
from budwood.checkpoints.structure import ModelStructure
from budwood.errors import RunError
from budwood.models.experts import unfuse
from budwood.models.linears import prunable, read

RESHAPED = ["llama", "gpt2", "mixtral", "qwen3_moe"]


def untied(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_of_its_configuration(name):
    model = build(name)
    structure = ModelStructure(model.config)
    described = {full: tuple(tensor.shape) for full, tensor in model.state_dict().items()}
    assert {full: tuple(tensor.shape) for full, tensor in structure.fused.items()} == described
    assert structure.parameters == untied(model)
    unfuse(model)
    assert structure.shapes == {full: tuple(read(module).shape) for full, module in prunable(model).items()}


@pytest.mark.parametrize("name", RESHAPED)
def test_a_model_with_parameters_of_other_shapes(tmp_path, name):
    folder, model = write_reshaped(tmp_path, name, format=None)
    source = open_source(folder)
    structure = source.structure()
    tied = set(model.all_tied_weights_keys)
    shapes = {full: tuple(tensor.shape) for full, tensor in structure.fused.items() if full not in tied}
    assert shapes == {full: source.shards.shape(full) for full in source.shards.names()}
    assert structure.parameters == untied(model)
    unfuse(model)
    expected = {full: tuple(read(module).shape) for full, module in prunable(model).items()}
    assert structure.shapes == expected
    assert structure.in_scope == sum(rows * columns for rows, columns in expected.values())


def test_linears_are_skipped_by_name(tmp_path):
    source = open_source(write_reshaped(tmp_path)[0])
    structure = source.structure(skip=["up_proj"])
    assert structure.shapes["model.layers.1.mlp.gate_proj"] == (KEPT, 32)
    assert "model.layers.1.mlp.up_proj" not in structure.shapes


def test_shapes_of_fused_experts_are_those_of_each(tmp_path):
    model = build("mixtral")
    path = "model.layers.1.mlp.experts"
    experts = {f"{path}.gate_up_proj": [4, 96, 32], f"{path}.down_proj": [4, 32, 48]}
    structure = ModelStructure(model.config, shapes=experts)
    assert [tuple(structure.fused[name].shape) for name in experts] == [(4, 96, 32), (4, 32, 48)]
    assert structure.fused.keys() == model.state_dict().keys()
    assert structure.shapes[f"{path}.gate_up.3"] == (96, 32)
    assert structure.shapes[f"{path}.down.0"] == (32, 48)


def test_a_plain_folder_has_no_shapes_of_its_own(tmp_path):
    save_model("llama", tmp_path)
    assert open_source(tmp_path).shapes == {}


def test_shapes_of_an_unknown_module_are_refused():
    with pytest.raises(RunError, match=r"no module model\.layers\.9\.mlp"):
        ModelStructure(build("llama").config, shapes={"model.layers.9.mlp.weight": [3]})
