"""Which matrices are in scope, all of them as [out, in]."""

import re
import warnings

import pytest
import torch
from accelerate import init_empty_weights
from families import EXPERTS, HIDDEN, UNSPLIT, build, config
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from budwood.errors import UsageError
from budwood.models.blocks import find_blocks
from budwood.models.experts import unfuse
from budwood.models.linears import coverage, prunable, read, resize, sizes_of_experts, skipped, stacked, unsplit, write


def on_meta(family):
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config(family))


def test_each_matrix_maps_its_inputs_to_its_outputs(family):
    for name, module in prunable(build(family)).items():
        out, width = read(module).shape
        assert module(torch.zeros(1, width)).shape == (1, out), name


def test_every_matrix_of_the_blocks_is_in_scope_or_listed(family):
    model = build(family)
    unfuse(model)
    path, blocks = find_blocks(model)
    matrices = {
        name
        for name, module in blocks.named_modules(prefix=path)
        if any(weight.dim() > 1 for weight in module.parameters(recurse=False))
    }
    scope, left = prunable(model), skipped(model)
    assert matrices == set(scope) | {name for name in left if name.startswith(f"{path}.")}
    assert not set(scope) & set(left)
    assert set(left.values()) <= {"router", "outside the decoder blocks"}


def test_a_model_on_meta_gives_the_same(family):
    real, meta = build(family), on_meta(family)
    unfuse(real)
    unfuse(meta)
    assert list(prunable(real)) == list(prunable(meta))
    assert skipped(real) == skipped(meta)
    assert coverage(real) == coverage(meta)


def test_only_unfused_experts_are_in_scope(moe_family):
    model = build(moe_family)
    before, listed = coverage(model), set(skipped(model).values())
    unfuse(model)
    assert coverage(model) > before
    assert "fused experts" in listed
    assert "fused experts" not in skipped(model).values()


class Mixture(nn.Module):
    """Experts in a list, as models had them before they were fused, with routers that are plain linears."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS)
        self.shared_gate = nn.Linear(HIDDEN, 1)
        self.shared = nn.Linear(HIDDEN, HIDDEN)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(HIDDEN, HIDDEN)) for _ in range(EXPERTS))


def test_linears_that_route_are_not_in_scope(tiny_model):
    tiny_model.model.layers[1].mlp = Mixture()
    mlp = "model.layers.1.mlp"
    routers = {name for name, reason in skipped(tiny_model).items() if reason == "router"}
    assert routers == {f"{mlp}.gate", f"{mlp}.shared_gate"}
    assert {f"{mlp}.shared", f"{mlp}.experts.3.0"} <= set(prunable(tiny_model))


def test_skip_excludes_and_gives_the_reason(tiny_model):
    skip = (r"layers\.0\.", "down_proj$")
    scope = prunable(tiny_model, skip)
    assert set(prunable(tiny_model)) - set(scope) == {
        name for name in prunable(tiny_model) if ".0." in name or name.endswith("down_proj")
    }
    assert skipped(tiny_model, skip)["model.layers.2.mlp.down_proj"] == "--skip 'down_proj$'"
    assert coverage(tiny_model, skip) < coverage(tiny_model)


def test_an_expression_that_matches_nothing_causes_a_warning(tiny_model):
    with pytest.warns(UserWarning, match="nowhere"):
        prunable(tiny_model, ["nowhere"])


def test_an_expression_that_matches_causes_no_warning(tiny_model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prunable(tiny_model, ["q_proj"])


def test_a_broken_expression_is_refused(tiny_model):
    with pytest.raises(UsageError, match=r"'\(' is not a regular expression"):
        prunable(tiny_model, ["("])


@pytest.mark.parametrize("module", [nn.Linear(8, 4), Conv1D(4, 8)], ids=["linear", "transposed"])
def test_what_is_written_is_read(module):
    weight = torch.randn(4, 8)
    write(module, weight)
    assert torch.equal(read(module), weight)
    assert torch.equal(read(module, read(module)), module.weight)
    assert torch.allclose(module(torch.eye(8)) - module.bias, weight.T, atol=1e-6)  # one addition is rounded


def test_a_weight_of_another_shape_is_not_broadcast():
    with pytest.raises(ValueError, match="does not fit"):
        write(nn.Linear(8, 4), torch.zeros(1, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 4), lambda: Conv1D(4, 8)], ids=["linear", "transposed"])
def test_a_resized_linear_has_the_new_sizes_and_its_own_dtype(make, dtype):
    module = make().to(dtype)
    module.bias = None if isinstance(module, nn.Linear) else nn.Parameter(torch.zeros(6, dtype=dtype))
    weight = torch.randn(6, 5)
    resize(module, weight)
    assert torch.equal(read(module), weight.to(dtype))
    assert module.weight.is_contiguous()
    assert module(torch.ones(3, 5, dtype=dtype)).shape == (3, 6)
    sizes = (module.out_features, module.in_features) if isinstance(module, nn.Linear) else (module.nf, module.nx)
    assert sizes == (6, 5)
    before = weight.clone()
    weight.zero_()
    assert torch.equal(read(module), before.to(dtype))  # no shared memory


@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_resized_linear_is_trained_as_before(requires_grad):
    module = nn.Linear(8, 4).requires_grad_(requires_grad)
    resize(module, torch.zeros(2, 8, requires_grad=True))
    assert module.weight.requires_grad == requires_grad
    assert module.weight.is_leaf


def test_a_linear_on_meta_stays_there():
    module = nn.Linear(8, 4, device="meta")
    resize(module, torch.zeros(2, 8))
    assert module.weight.is_meta
    assert module.out_features == 2


ROUTERS = {
    "jetmoe": ["mlp.router.layer", "self_attention.experts.router.layer"],
    "llama4": ["feed_forward.router"],
    "longcat": ["mlp.router.classifier"],
}


@pytest.mark.parametrize("name", UNSPLIT)
def test_routers_stay_dense_where_experts_cannot_be_split(name):
    """Experts as stacks of matrices, in whatever module; the router beside them, or inside a module beside them."""
    model = on_meta(name)
    unfuse(model)
    reasons = skipped(model)
    path, _ = find_blocks(model)
    for inner in ROUTERS[name]:
        assert reasons[f"{path}.0.{inner}"] == "router"
    assert not any("router" in linear for linear in prunable(model))
    assert "fused experts" in reasons.values()
    assert re.fullmatch(r"\d+% of all weights are experts that stay dense: \w+ cannot be split up", unsplit(model))


def test_models_whose_experts_are_linears_have_nothing_unsplit(moe_family):
    model = on_meta(moe_family)
    unfuse(model)
    assert unsplit(model) is None


def test_kernels_of_convolutions_are_no_experts():
    assert stacked(nn.Conv1d(16, 16, 4)) == set()
    depthwise = nn.Module()
    depthwise.weight = nn.Parameter(torch.zeros(16, 1, 4))
    assert stacked(depthwise) == set()
    experts = nn.Module()
    experts.first, experts.second = nn.Parameter(torch.zeros(6, 4, 8)), nn.Parameter(torch.zeros(4, 8, 4))
    assert stacked(experts) == {4, 6}
    parent = nn.Module()
    parent.experts, parent.conv = experts, nn.Conv1d(3, 3, 2)
    assert sorted(sizes_of_experts(parent)) == [("experts", 4), ("experts", 6)]
