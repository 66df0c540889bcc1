"""The streamed model is the resident one, block by block, and keeps nothing of it."""

from functools import partial

import pytest
import torch
from families import BLOCKS, build, save_model, token_ids
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from budwood.checkpoints.source import open_source
from budwood.checkpoints.writer import OUTSIDE, Writer
from budwood.errors import RunError
from budwood.sparsity.statistics import SquaredNorm
from budwood.stream.arithmetic import Arithmetic
from budwood.stream.model import Model

STREAMED = ("llama", "gpt2", "gemma3", "falcon", "bloom", "mixtral", "gpt_oss")


def parameters(model):
    return {name: (parameter.device.type, tuple(parameter.shape)) for name, parameter in model.named_parameters()}


def logits(model):
    with model.outside(), torch.no_grad():
        hidden = (model.activations.read(index, model.device) for index in model.activations.indices())
        return torch.cat([model.logits(states) for states in hidden])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", STREAMED)
def test_streamed_logits_are_the_resident_ones(family, dtype, tmp_path):
    """Bit for bit: batches of two windows, the last of one."""
    save_model(family, tmp_path)
    ids = token_ids(batch=3)
    model = Model(open_source(tmp_path), arithmetic=Arithmetic(dtype))
    before = parameters(model.module)
    assert {device for device, _ in before.values()} == {"meta"}
    assert [block.index for block in model.blocks(ids, batch=2)] == list(range(BLOCKS))
    streamed = logits(model)
    assert parameters(model.module) == before  # nothing is kept
    resident = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    with torch.no_grad():
        expected = torch.cat([resident(part, use_cache=False).logits for part in (ids[:2], ids[2:])])
    assert torch.equal(streamed, expected)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save_model("llama", folder)
    return folder


def halve(block):
    for linear in block.linears.values():
        linear.weight = linear.weight * (torch.arange(linear.shape[1]) % 4 < 2)
        linear.recovered = 7


def shards(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("layout", ["dense", "auto", "auto_int8", "auto_int4"])
def test_finished_blocks_are_replayed_and_not_yielded(llama, tmp_path, layout):
    ids = token_ids()
    model = Model(open_source(llama))
    for block in model.blocks(ids, Writer(tmp_path, "run", BLOCKS, layout)):
        halve(block)
    whole, hidden = shards(tmp_path), model.activations.hidden.clone()
    assert len(whole) == BLOCKS
    for name in list(whole)[2:]:
        (tmp_path / name).unlink()
    again, seen = Model(open_source(llama)), []
    for block in again.blocks(ids, Writer(tmp_path, "run", BLOCKS, layout)):
        seen.append(block.index)
        halve(block)
    assert seen == [2, 3]
    assert shards(tmp_path) == whole
    first = model.activations.span(0)  # of the last block only the first batch is run
    assert torch.equal(again.activations.hidden[first], hidden[first])


def test_shards_of_another_run_are_not_replayed(llama, tmp_path):
    for block in Model(open_source(llama)).blocks(None, Writer(tmp_path, "run", BLOCKS, "auto")):
        halve(block)
    other = Writer(tmp_path, "other run", BLOCKS, "auto")
    assert [block.index for block in Model(open_source(llama)).blocks(None, other)] == list(range(BLOCKS))
    assert [other.about(index).run for index in range(BLOCKS)] == ["other run"] * BLOCKS


def test_rewrite_yields_what_was_written_and_writes_what_the_loop_makes_of_it(llama, tmp_path):
    model = Model(open_source(llama))
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    first, second = (Writer(tmp_path / name, "run", BLOCKS, "auto") for name in ("first", "second"))
    for block in model.blocks(token_ids(), first):
        block.collect(SquaredNorm)  # so that the error of the outputs is known
        halve(block)
    before = parameters(model.module)
    seen = []
    for block in model.rewrite(first, second):
        seen.append(block.index)
        assert block.activations is None
        assert block.relative_error == first.about(block.index).notes["relative_error"] > 0
        for linear in block.linears.values():
            assert linear.recovered == 7
            assert not linear.weight[:, 2::4].any()
            linear.weight = 2 * linear.weight
    assert seen == list(range(BLOCKS))
    assert list(model.rewrite(first, second)) == []  # all are finished
    for index in range(BLOCKS):
        once, twice = (writer.read(index, model.structure)[0] for writer in (first, second))
        assert all(torch.equal(twice[name], 2 * once[name] if "proj" in name else once[name]) for name in once)
    assert parameters(model.module) == before


def test_what_is_outside_the_blocks_is_on_meta_again_after_a_failure(llama):
    model = Model(open_source(llama))
    before = parameters(model.module)
    with model.outside():
        assert model.module.get_input_embeddings().weight.device.type == "cpu"
    assert parameters(model.module) == before
    with pytest.raises(KeyError), model.outside():
        raise KeyError
    assert parameters(model.module) == before
    stream = model.blocks(token_ids())
    next(stream)
    stream.close()
    assert parameters(model.module) == before


def test_the_names_outside_are_all_that_blocks_do_not_hold(tmp_path):
    for family in ("llama", "qwen2"):  # the latter's head is tied to its embeddings
        save_model(family, tmp_path / family)
        model = Model(open_source(tmp_path / family), storage=torch.bfloat16)
        own = {name for name, _ in build(family).named_parameters() if ".layers." not in name}
        assert set(model.names_outside()) == own
        writer = Writer(tmp_path, "run", BLOCKS, "auto")
        writer.write_outside(partial(model.outside_in_files, "auto", {}))
        written = load_file(writer.shard(OUTSIDE))
        assert set(written) == own
        assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
        writer.shard(OUTSIDE).unlink()


@pytest.mark.parametrize("lost", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_missing_tensor_is_named(tmp_path, lost):
    save_model("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunError, match=f"lacks {lost}"):
        list(Model(open_source(tmp_path)).blocks(token_ids()))


def test_a_copy_streams_alike(llama):
    ids = token_ids()
    model = Model(open_source(llama), arithmetic=Arithmetic(torch.bfloat16), activation_limit=0)
    copy = model.copy()
    for one, other in zip(model.blocks(ids), copy.blocks(ids), strict=True):
        assert one.module is not other.module
    assert torch.equal(model.activations.hidden, copy.activations.hidden)
    assert copy.activations.hidden.dtype == torch.bfloat16
