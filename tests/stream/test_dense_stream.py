"""The second, unchanged stream of a run stays the dense model, at its own position."""

import torch
from families import BLOCKS, save_model, token_ids
from transformers import AutoModelForCausalLM

from budwood.checkpoints.source import open_source
from budwood.stream.dense_stream import DenseStream
from budwood.stream.model import Model


def hidden_states(folder, ids):
    """What enters each block of the resident model, one batch."""
    model, inputs = AutoModelForCausalLM.from_pretrained(folder).eval(), []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    model.model.norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    with torch.no_grad():
        model(ids, use_cache=False)
    return inputs


def test_inputs_and_outputs_are_those_of_the_dense_model(tmp_path):
    save_model("llama", tmp_path)
    ids = token_ids()
    expected = hidden_states(tmp_path, ids)
    model = Model(open_source(tmp_path))
    dense = DenseStream(model, ids, batch=2)
    for block in model.blocks(ids, batch=2):
        twin = dense.at(block.index)
        assert twin.module is not block.module
        assert torch.equal(twin.activations.hidden, expected[block.index])
        weights = {name: linear.weight.clone() for name, linear in block.linears.items()}
        for linear in block.linears.values():
            linear.weight = 0 * linear.weight  # the pruned stream differs
        outputs = dense.after(block.index).hidden
        assert torch.equal(outputs, expected[block.index + 1])
        with torch.no_grad():
            assert torch.equal(dense.run(block, weights, expected[block.index]), outputs)
    assert not torch.equal(model.activations.hidden, expected[-1])


def test_blocks_may_be_left_out_as_a_resumed_run_does(tmp_path):
    save_model("llama", tmp_path)
    ids = token_ids()
    expected = hidden_states(tmp_path, ids)
    dense = DenseStream(Model(open_source(tmp_path)), ids, batch=1)
    assert dense.at(2).index == 2
    torch.testing.assert_close(dense.at(2).activations.hidden, expected[2])
    torch.testing.assert_close(dense.after(BLOCKS - 1).hidden, expected[BLOCKS], rtol=1e-4, atol=1e-4)
