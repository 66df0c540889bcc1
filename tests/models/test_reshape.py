"""Parameters take the given shapes, and modules compute with them."""

import pytest
import torch
from families import build
from torch import nn
from transformers.pytorch_utils import Conv1D

from budwood.errors import RunError
from budwood.models.reshape import fit_parameters, note_sizes

UP, DOWN = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"


def test_parameters_are_reshaped_and_added(tiny_model):
    shapes = {f"{UP}.weight": [48, 32], f"{DOWN}.weight": [32, 48], f"{DOWN}.bias": [32]}
    assert fit_parameters(tiny_model, shapes) == list(shapes)
    assert {name: list(tiny_model.get_parameter(name).shape) for name in shapes} == shapes
    up, down = tiny_model.get_submodule(UP), tiny_model.get_submodule(DOWN)
    assert (up.out_features, up.in_features, down.out_features, down.in_features) == (48, 32, 32, 48)
    assert down(up(torch.zeros(1, 32))).shape == (1, 32)


def test_a_parameter_of_the_same_shape_is_kept(tiny_model):
    before = tiny_model.get_parameter(f"{UP}.weight")
    assert fit_parameters(tiny_model, {f"{UP}.weight": (64, 32)}) == []
    assert tiny_model.get_parameter(f"{UP}.weight") is before


@pytest.mark.parametrize("requires_grad", [True, False])
def test_dtype_device_and_gradient_are_those_of_the_parameter_replaced(requires_grad):
    model = build("llama", dtype=torch.bfloat16).to("meta").requires_grad_(requires_grad)
    fit_parameters(model, {f"{UP}.weight": [48, 32], f"{UP}.bias": [48]})
    for name in ("weight", "bias"):
        parameter = model.get_parameter(f"{UP}.{name}")
        assert (parameter.dtype, parameter.device.type) == (torch.bfloat16, "meta")
        assert parameter.requires_grad == requires_grad


def test_a_module_without_parameters_takes_one(tiny_model):
    assert fit_parameters(tiny_model, {"model.layers.1.mlp.act_fn.scale": [3]}) == ["model.layers.1.mlp.act_fn.scale"]
    assert tiny_model.get_parameter("model.layers.1.mlp.act_fn.scale").shape == (3,)


def test_an_unknown_module_is_refused(tiny_model):
    with pytest.raises(RunError, match=r"holds model\.layers\.9\.a\.weight, but the model has no module"):
        fit_parameters(tiny_model, {"model.layers.9.a.weight": [1]})


def test_sizes_of_a_transposed_linear():
    linear = Conv1D(4, 8)
    linear.weight = nn.Parameter(torch.zeros(6, 5))
    note_sizes(linear)
    assert (linear.nx, linear.nf) == (6, 5)
