"""Recovery without training data or a trained model: a random model is its own corpus, and its own best predictor."""

import math

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from budwood.checkpoints.source import open_source
from budwood.models.linears import read
from budwood.sparsity.patterns import parse_pattern
from budwood.stream.model import Model
from budwood.training import recovery as recovery_module
from budwood.training.descent import Descent, descend
from budwood.training.move import parse_move
from budwood.training.recovery import Recovery, blocks_recomputed, held_out, loss_of, order, slope, trainable_of

STEPS, BATCH, TOKENS, VOCABULARY, HIDDEN = 48, 32, 32, 64, 64
RATES = {"biases+norms": 1e-2, "biases+norms+weights": 2e-3}
MOVES = [
    "biases+norms",
    "biases+norms+scalelora",
    "biases+norms+masklora",
    "biases+norms+loraprune",
    "biases+norms+weights",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with a random model, 1024 training and 256 test windows that it wrote."""
    config = AutoConfig.for_model(
        "opt",
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        word_embed_proj_dim=HIDDEN,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        tie_word_embeddings=False,
        dropout=0.0,
        pad_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                scale = 3 if module is model.lm_head else 1.6
                module.weight.copy_(torch.randn(module.weight.shape, generator=random) * scale / HIDDEN**0.5)
                if module.in_features != HIDDEN:
                    module.weight.mul_((HIDDEN / module.in_features) ** 0.5)
                if module.bias is not None:
                    module.bias.copy_(0.1 * torch.randn(module.bias.shape, generator=random))
            elif isinstance(module, nn.Embedding):
                module.weight.copy_(0.3 * torch.randn(module.weight.shape, generator=random))
        ids = torch.randint(VOCABULARY, (1280, 1), generator=random)
        cache = None
        for _ in range(TOKENS - 1):
            found = model(ids[:, -1:], past_key_values=cache, use_cache=True)
            shares, cache = found.logits[:, -1].softmax(-1), found.past_key_values
            ids = torch.cat([ids, torch.multinomial(shares, 1, generator=random)], 1)
    folder = tmp_path_factory.mktemp("corpus")
    model.save_pretrained(folder)
    return folder, ids[:1024], ids[1024:]


def perplexities(corpus, text, pattern="2:4"):
    """Of the test windows: as pruned, after training with the weights of the forward pass, and with those that stay."""
    folder, windows, test = corpus
    model = Model(open_source(folder))
    rule = parse_pattern(pattern)
    move = parse_move(text, rank=4, alpha=8)
    recovery = Recovery(move, Descent(STEPS, RATES.get(text, 5e-3)), rank=4, alpha=8, batch=BATCH)
    with model.resident():
        dense = {name: read(linear).clone() for name, linear in model.linears.items()}
        with torch.no_grad():
            for name, linear in model.linears.items():
                read(linear).copy_(torch.where(rule.keep(dense[name].abs()), dense[name], 0))
        trainable = trainable_of(model, recovery, windows, None)
        with trainable.attached():
            pruned = held_out(model, trainable, test, len(test))
            descend(trainable, lambda step: slope(model, windows, recovery, BATCH, step), recovery.descent)
            with torch.no_grad():
                training = float(loss_of(model, test))
            stays = held_out(model, trainable, test, len(test))
    return math.exp(pruned), math.exp(training), math.exp(stays)


def test_the_order_of_what_moves(corpus):
    folder, _, test = corpus
    model = Model(open_source(folder))
    with model.resident(), torch.no_grad():
        dense = math.exp(float(loss_of(model, test)))
    found = {text: perplexities(corpus, text) for text in MOVES}
    pruned = found["biases+norms"][0]
    few, scaled, masked, cut, full = (found[text][2] for text in MOVES)
    assert dense < full < masked < scaled < few < pruned
    assert masked < cut
    assert found["biases+norms+loraprune"][1] < cut  # its loss jumps when it is merged
    for text in MOVES:
        if "loraprune" not in text:
            assert found[text][1] == pytest.approx(found[text][2], rel=1e-5)


def test_blocks_computed_again_have_the_same_gradients(corpus, monkeypatch):
    folder, windows, _ = corpus
    gradients = []
    for limit in (2**40, 0):
        monkeypatch.setattr(recovery_module, "RECOMPUTED", limit)
        model = Model(open_source(folder))
        recovery = Recovery(parse_move("biases+norms+masklora", rank=4), batch=4)
        with model.resident():
            trainable = trainable_of(model, recovery, windows, None)
            with trainable.attached(), blocks_recomputed(model, 4 * TOKENS):
                slope(model, windows, recovery, 2, 0)
                gradients.append({key: master.grad.clone() for key, master in trainable.masters.items()})
    for key, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][key]), key


def test_every_window_comes_once_before_any_comes_again():
    drawn = [place for step in range(15) for place in order(10, 4, step, seed=3)]
    for start in range(0, 60, 10):
        assert sorted(drawn[start : start + 10]) == list(range(10))
    assert drawn[:10] != drawn[10:20]
    assert drawn[:4] == order(10, 4, 0, seed=3)
