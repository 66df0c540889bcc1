"""Unfused experts compute the same, and can be fused again."""

import pytest
import torch
from families import EXPERTS, HIDDEN, build, token_ids

from budwood.models.experts import ExpertLinears, fused_state, is_fused, split_fused, unfuse, unfuse_module
from budwood.models.linears import read


def fused_modules(model):
    return {name: module for name, module in model.named_modules() if is_fused(module)}


def routing(tokens=24, experts=EXPERTS, k=2):
    """hidden [tokens, hidden], chosen [tokens, k], shares [tokens, k]"""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, generator=random)
    chosen = torch.rand(tokens, experts, generator=random).argsort(dim=-1)[:, :k]
    return hidden, chosen, torch.rand(tokens, k, generator=random)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_logits_are_those_of_fused_experts(moe_family, dtype):
    model = build(moe_family, dtype=dtype)
    fused = model(input_ids=token_ids()).logits
    assert unfuse(model) == [f"model.layers.{block}.mlp.experts" for block in range(4)]
    assert torch.equal(model(input_ids=token_ids()).logits, fused)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@torch.no_grad()
def test_any_number_of_experts_per_token(moe_family, k):
    fused = next(iter(fused_modules(build(moe_family)).values()))
    hidden, chosen, shares = routing(k=k)
    assert torch.equal(unfuse_module(fused)(hidden, chosen, shares), fused(hidden, chosen, shares))


def test_unfused_weights_share_memory(moe_family):
    model = build(moe_family)
    fused = next(iter(fused_modules(model).values()))
    experts = unfuse_module(fused)
    fused.down_proj.data[2] = 0
    assert not experts.down[2].weight.any()
    assert experts.down[1].weight.any()


@torch.no_grad()
def test_an_expert_is_called_with_its_tokens_only(moe_family):
    experts = unfuse_module(next(iter(fused_modules(build(moe_family)).values())))
    places = {linear: expert for expert, linear in enumerate(experts.gate_up)}
    heard = {}

    def hear(linear, args):
        heard[places[linear]] = args[0]

    for linear in places:
        linear.register_forward_pre_hook(hear)
    hidden, chosen, shares = routing(experts=EXPERTS - 1)  # the last one gets nothing
    experts(hidden, chosen, shares)
    assert sorted(heard) == [0, 1, 2]
    for expert, inputs in heard.items():
        tokens = (chosen == expert).any(dim=-1)
        assert sorted(inputs.tolist()) == sorted(hidden[tokens].tolist())


def test_matrices_are_read_as_out_by_in(moe_family):
    experts = unfuse_module(next(iter(fused_modules(build(moe_family)).values())))
    inner = read(experts.down[0]).shape[1]
    assert read(experts.gate_up[0]).shape == (2 * inner, HIDDEN)
    assert read(experts.down[0]).shape == (HIDDEN, inner)


def test_splitting_and_fusing_are_inverse(moe_family):
    model = build(moe_family)
    fused = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parts = {name: part for whole, tensor in fused.items() for name, part in split_fused(whole, tensor).items()}
    unfuse(model)
    state = model.state_dict()
    assert parts.keys() == state.keys()
    assert all(torch.equal(parts[name], state[name]) for name in state)
    for path, module in model.named_modules():
        if isinstance(module, ExpertLinears):
            own = {name.removeprefix(f"{path}."): part for name, part in parts.items() if name.startswith(path)}
            for again in (fused_state(module), fused_state(module, own)):
                assert {f"{path}.{name}" for name in again} == {name for name in fused if name.startswith(path)}
                assert all(torch.equal(tensor, fused[f"{path}.{name}"]) for name, tensor in again.items())


def test_more_than_nine_experts_keep_their_order():
    state = {f"down.{expert}.weight": torch.full((2, 2), float(expert)) for expert in reversed(range(12))}
    assert fused_state(None, state)["down_proj"][:, 0, 0].tolist() == list(range(12))


@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj.weight", "down_proj", "x.gate_up_proj_bias"])
def test_other_tensors_stay_as_they_are(name):
    tensor = torch.zeros(4)
    assert split_fused(name, tensor) == {name: tensor}


def test_models_without_experts_are_unchanged(tiny_model):
    assert unfuse(tiny_model) == []


def test_experts_on_meta_are_unfused(moe_family):
    experts = unfuse_module(next(iter(fused_modules(build(moe_family).to("meta")).values())))
    assert all(weight.is_meta for weight in experts.parameters())
