"""Attention in blocks of queries equals torch's."""

import pytest
import torch
from families import BLOCKS, FAMILIES, build, save_model, token_ids
from torch.nn.functional import scaled_dot_product_attention

from budwood.checkpoints.source import open_source
from budwood.stream.arithmetic import Arithmetic
from budwood.stream.attention import NAME, attend_in_blocks, blocked_attention, by_fused_kernel, by_products
from budwood.stream.dense_stream import DenseStream
from budwood.stream.model import Model

BOTH = pytest.mark.parametrize("compute", [by_products, by_fused_kernel])


@BOTH
@pytest.mark.parametrize("tokens", [1, 7, 64, 128, 129, 300])
@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (6, 2), (3, 1)])
def test_it_equals_torchs_causal_attention(compute, tokens, heads, shared):
    torch.manual_seed(tokens)
    query = torch.randn(2, heads, tokens, 8, dtype=torch.float64)
    key = torch.randn(2, shared, tokens, 8, dtype=torch.float64)
    value = torch.randn(2, shared, tokens, 5, dtype=torch.float64)
    wanted = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True, scale=0.3)
    torch.testing.assert_close(compute(query, key, value, 0.3), wanted)


@BOTH
def test_gradients_equal_torchs(compute):
    torch.manual_seed(0)
    inputs = [torch.randn(2, heads, 150, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    wanted = torch.autograd.grad(
        scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True).sin().sum(), inputs
    )
    torch.testing.assert_close(torch.autograd.grad(compute(*inputs).sin().sum(), inputs), wanted)


def test_both_streams_of_a_run_use_the_same_attention(tmp_path):
    save_model("llama", tmp_path, dtype=torch.bfloat16)
    model = Model(open_source(tmp_path), arithmetic=Arithmetic(torch.bfloat16, blocked_attention=True))
    dense = DenseStream(model, token_ids())
    assert {some.module.config._attn_implementation for some in (model, dense.model)} == {NAME}
    assert Model(open_source(tmp_path)).module.config._attn_implementation == "sdpa"


def test_heads_in_parts_equal_all_at_once(monkeypatch):
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, heads, 150, 8, dtype=torch.float64) for heads in (4, 2, 2))
    whole = by_products(query, key, value)
    monkeypatch.setattr("budwood.stream.attention.SCORES", 1)
    torch.testing.assert_close(by_products(query, key, value), whole)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float32, 1e-5)], ids=str)
def test_models_compute_the_same(family, dtype, tolerance):
    model, ids = build(family, dtype=dtype), token_ids()
    with torch.no_grad():
        before = model(ids).logits.float()
        attend_in_blocks(model)
        after = model(ids).logits.float()
    assert (after - before).norm() <= tolerance * before.norm()
    if model.config._attn_implementation != NAME:  # families with attention of their own stay as they are
        assert torch.equal(before, after)
    assert model.config._attn_implementation == NAME or family not in ("llama", "mistral", "qwen3", "olmo2")


def test_only_plain_causal_attention_is_taken_over(monkeypatch):
    taken = []
    monkeypatch.setattr(
        "budwood.stream.attention.blocked_attention",
        lambda query, *others: taken.append(query.dtype) or blocked_attention(query, *others),
    )
    for family, dtype, padded in (
        ("llama", torch.bfloat16, False),
        ("llama", torch.float32, False),
        ("llama", torch.float64, False),
        ("llama", torch.bfloat16, True),
        ("mistral", torch.bfloat16, False),  # its window is shorter than the text
    ):
        model, ids = build(family, dtype=dtype), token_ids()
        attend_in_blocks(model)
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        with torch.no_grad():
            model(ids, attention_mask=mask if padded else None)
    assert taken == [torch.bfloat16] * BLOCKS + [torch.float32] * BLOCKS
