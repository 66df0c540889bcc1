"""What may move: the parts, the published program's trainable sets, the published shares, tied heads."""

import pytest
import reference
import torch
from families import build
from transformers import AutoConfig

from budwood.checkpoints.meta_model import read_config
from budwood.checkpoints.source import open_source
from budwood.checkpoints.structure import ModelStructure
from budwood.errors import UsageError
from budwood.stream.model import Model
from budwood.training.move import check_head, parse_move, vectors, without_effect
from budwood.training.recovery import Recovery, trainable_of

MODES = {
    "bias": "biases",
    "ln": "norms",
    "bias_ln": "biases+norms",
    "mask_lora": "masklora",
    "lora_prune": "loraprune",
    "scale_lora": "scalelora",
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["tiny-opt", "tiny-mha", "tiny-gqa"])
def test_trainable_sets_are_those_of_the_published_program(name, mode):
    """But for the biases of keys, which have no effect."""
    record = reference.record("perp/perp")["trainable"][f"{name}.{mode}.retrain"]
    model = Model(open_source(reference.model(name)))
    move = parse_move(MODES[mode], rank=4, alpha=8)
    with model.resident():
        trainable = trainable_of(model, Recovery(move, rank=4, alpha=8), reference.tokens() % 128, None)
    expected = {key: shape for key, shape in record["names"].items() if not key.endswith("k_proj.bias")}
    if move.adapter is None:
        assert {key: list(master.shape) for key, master in trainable.masters.items()} == expected
    else:
        shapes = sorted(list(master.shape) for master in trainable.masters.values())
        assert shapes == sorted(expected.values())
        assert trainable.count == record["count"]


def test_a_head_is_a_plain_low_rank_term_on_request():
    record = reference.record("perp/perp")["trainable"]["tiny-mha.head.retrain"]
    model = Model(open_source(reference.model("tiny-mha")))
    with model.resident():
        from budwood.training.adapters import MaskLora

        move = parse_move("head", rank=4, alpha=8)
        trainable = trainable_of(model, Recovery(move), reference.tokens(), MaskLora(4, 8))
        assert trainable.count == record["count"]


def test_published_counts_of_opt_125m():
    config = AutoConfig.for_model("opt", vocab_size=50272)  # the defaults are OPT-125M
    structure = ModelStructure(config)
    count = lambda text: sum(p.numel() for p in vectors(structure.module, parse_move(text)).values())
    assert (count("biases"), count("norms"), count("biases+norms")) == (102_144, 38_400, 121_344)
    rule = parse_move("masklora", rank=16).adapter
    assert sum(rule.count(shape) for shape in structure.shapes.values()) == 2_654_208


@pytest.mark.parametrize(
    ("text", "message"),
    [("bias", "there is no 'bias'"), ("masklora+spp", "by one rule"), ("", "there is no ''"), (3, "there is no '3'")],
)
def test_what_cannot_move_is_refused(text, message):
    with pytest.raises(UsageError, match=message):
        parse_move(text)


def test_a_tied_head_is_refused_and_an_untied_one_is_not():
    tied = ModelStructure(read_config(reference.model("tiny-opt")))
    with pytest.raises(UsageError, match=r"tied to its embeddings.*leave head out"):
        check_head(parse_move("head"), tied.module)
    check_head(parse_move("biases"), tied.module)
    check_head(parse_move("head"), ModelStructure(read_config(reference.model("tiny-mha"))).module)


@pytest.mark.parametrize(("name", "idle"), [("opt", {"self_attn.k_proj.bias"}), ("qwen2", set()), ("gpt2", set())])
def test_biases_that_softmax_cancels_are_found(name, idle):
    """With rotary embeddings the bias of keys has an effect; the fused one of GPT-2 has others in it."""
    model = build(name)
    block = (
        model.model.decoder.layers if name == "opt" else model.model.layers if name == "qwen2" else model.transformer.h
    )[0]
    hidden = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(0))
    extra = {}
    if name == "qwen2":
        extra["position_embeddings"] = model.model.rotary_emb(hidden, torch.arange(16)[None])
    before = {key: value.clone() for key, value in block.state_dict().items()}

    def run():
        answer = block(hidden, **extra)
        return answer[0] if isinstance(answer, tuple) else answer

    assert without_effect(block, run) == idle
    assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())
