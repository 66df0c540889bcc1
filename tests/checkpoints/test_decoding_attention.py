"""Loaded models decode with the kernel for the attention of one token, and stay ordinary models of transformers."""

import pytest
import torch
from folders import write_packed
from native_paths import use
from torch import Tensor
from transformers import AutoModelForCausalLM

from budwood.checkpoints.decoding_attention import NAME
from budwood.checkpoints.quantizer import register
from budwood.kernels import dispatch
from budwood.kernels.attention import attend

register()


@pytest.fixture(autouse=True)
def fastest(monkeypatch):
    use("avx2", monkeypatch)  # the path that has the kernel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_packed(tmp_path_factory.mktemp("packed") / "packed", format="two_four_compact")[0]


def decoded(model, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits of the last token, computed with the keys and values of those before."""
    with torch.no_grad():
        cache = model(ids[:, :-1], attention_mask=None if mask is None else mask[:, :-1], use_cache=True)
        return model(ids[:, -1:], attention_mask=mask, past_key_values=cache.past_key_values).logits


def test_a_loaded_model_decodes_with_it(folder, tmp_path, monkeypatch):
    calls: list[torch.Size] = []
    kernel = attend

    def counted(query, *rest):
        calls.append(query.shape)
        return kernel(query, *rest)

    monkeypatch.setattr("budwood.kernels.attention.attend", counted)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    assert model.config._attn_implementation == NAME
    ids = torch.arange(3, 25).view(2, 11)
    padded = torch.ones(2, 11, dtype=torch.long)
    padded[0, :4] = 0
    blocks = model.config.num_hidden_layers
    for mask in (None, padded):
        calls.clear()
        found = decoded(model, ids, mask)
        assert len(calls) == blocks  # one token; the others are torch's
        with dispatch.exact():
            torch.testing.assert_close(found, decoded(model, ids, mask), rtol=0, atol=0.05)
        assert len(calls) == blocks
    with torch.enable_grad():
        model(ids[:, :1])
    assert len(calls) == blocks
    tokens = model.generate(ids, attention_mask=padded, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert len(calls) > blocks
    assert tokens.shape == (2, 15)
    model.save_pretrained(tmp_path / "saved")
    assert "attn_implementation" not in (tmp_path / "saved" / "config.json").read_text()
    model.set_attn_implementation("sdpa")  # as any model
    calls.clear()
    decoded(model, ids)
    assert not calls


def test_an_attention_that_was_asked_for_stays(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


def test_a_static_cache_and_compilation(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    ids = torch.arange(3, 14).view(1, 11)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    first = {"output_logits": True, "return_dict_in_generate": True, **options, "max_new_tokens": 2}
    usual, static = model.generate(ids, **first), model.generate(ids, cache_implementation="static", **first)
    torch.testing.assert_close(usual.logits[0], static.logits[0], rtol=0, atol=0.05)
    assert model.generate(ids, cache_implementation="static", **options).shape == (1, 16)
    block = model.get_decoder().layers[0].self_attn
    states = torch.randn(1, 1, model.config.hidden_size).bfloat16()
    angles = torch.ones(1, 1, model.config.head_dim).bfloat16()
    with torch.no_grad():
        compiled = torch.compile(block, backend="eager", fullgraph=True)
        found = compiled(states, (angles, angles), None)[0]
        torch.testing.assert_close(found, block(states, (angles, angles), None)[0], rtol=0, atol=0.05)
