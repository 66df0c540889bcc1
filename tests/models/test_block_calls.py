"""Blocks run one by one give what the model gives, bit for bit."""

from types import SimpleNamespace

import pytest
import torch
from families import build, token_ids
from torch import nn

from budwood.errors import UsageError
from budwood.models.block_calls import record_calls
from budwood.models.blocks import find_blocks
from budwood.models.experts import unfuse


def streamed(model, ids, learnt_from):
    """Logits with one block at a time; all others, and at first all of them, are on meta."""
    _, blocks = find_blocks(model)
    states = [{name: tensor.clone() for name, tensor in block.state_dict().items()} for block in blocks]
    for block in blocks:
        forget(block)
    calls = record_calls(model, blocks, learnt_from)
    hidden = calls.embed(ids)
    for index, block in enumerate(blocks):
        block.load_state_dict(states[index], assign=True)
        hidden = calls.run(index, block, hidden)
        forget(block)
    return calls.logits(hidden)


def forget(block):
    for module in block.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_streamed_logits_are_the_models_own(family, dtype):
    model = build(family, dtype=dtype)
    ids = token_ids()
    resident = model(input_ids=ids).logits
    assert torch.equal(streamed(model, ids, learnt_from=token_ids(seed=1)), resident)


@torch.no_grad()
def test_streamed_logits_with_unfused_experts(moe_family):
    model = build(moe_family)
    ids = token_ids()
    resident = model(input_ids=ids).logits
    unfuse(model)
    assert torch.equal(streamed(model, ids, learnt_from=token_ids(seed=1)), resident)


def test_no_stub_remains(family):
    model = build(family)
    _, blocks = find_blocks(model)
    record_calls(model, blocks, token_ids())
    assert all("forward" not in block.__dict__ for block in blocks)


def test_a_replaced_forward_is_restored(tiny_model):
    _, blocks = find_blocks(tiny_model)
    replaced = blocks[1].forward
    blocks[1].forward = replaced
    record_calls(tiny_model, blocks, token_ids())
    assert blocks[1].forward is replaced


def test_no_stub_remains_after_an_error(tiny_model):
    _, blocks = find_blocks(tiny_model)
    calls = record_calls(tiny_model, blocks, token_ids())
    with pytest.raises(RuntimeError):
        calls.logits(torch.zeros(2, 24, 5))
    assert all("forward" not in block.__dict__ for block in blocks)


def test_another_shape_needs_another_recording(tiny_model):
    calls = record_calls(tiny_model, find_blocks(tiny_model)[1], token_ids())
    with pytest.raises(ValueError, match=r"\[2, 24\], got \[1, 24\]"):
        calls.embed(token_ids(batch=1))


@pytest.mark.parametrize("name", ["llama", "bloom"], ids=["tensor", "tuple"])
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_the_form_of_a_single_block_is_found_from_the_logits(name, batch):
    model = build(name)
    path, blocks = find_blocks(model)
    model.set_submodule(path, nn.ModuleList([blocks[0]]))
    model.config.num_hidden_layers = 1
    ids = token_ids(batch)
    resident = model(input_ids=ids).logits
    assert torch.equal(streamed(model, ids, learnt_from=ids), resident)


class Between(nn.Module):
    """A model that does something of its own between its blocks."""

    def __init__(self, between=lambda hidden: hidden, extra=lambda ids: None):
        super().__init__()
        self.embedding = nn.Embedding(128, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.between, self.extra = between, extra

    def forward(self, input_ids, use_cache):
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden = block(self.between(hidden), self.extra(input_ids))
        return SimpleNamespace(logits=hidden)


class Block(nn.Module):
    def forward(self, hidden, extra):
        return hidden + 1


def test_a_plain_chain_is_run():
    model = Between(extra=lambda ids: torch.ones(ids.shape))
    calls = record_calls(model, model.blocks, token_ids())
    hidden = calls.embed(token_ids())
    assert torch.equal(calls.run(1, model.blocks[1], hidden), hidden + 1)


def test_work_between_blocks_is_refused():
    model = Between(between=lambda hidden: 2 * hidden)
    with pytest.raises(UsageError, match="to the next unchanged"):
        record_calls(model, model.blocks, token_ids())


def test_arguments_that_depend_on_the_tokens_are_refused():
    model = Between(extra=lambda ids: ids)
    with pytest.raises(UsageError, match="block 0 other arguments for other tokens"):
        record_calls(model, model.blocks, token_ids())
