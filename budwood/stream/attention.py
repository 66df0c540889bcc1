"""Causal attention for forward passes over whole windows, faster on a CPU than torch's fused kernel.

torch's fused kernel multiplies all keys with all queries and discards half of the products, and computes bfloat16 no
faster than float32. Blocks of queries, each with the keys up to its end only, take two thirds of the time in float32.
In bfloat16 they take half, as plain matmuls, where the processor has bfloat16 instructions.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "budwood_blocked"
HARMLESS = {"position_ids", "cache_position", "use_cache", "sliding_window"}  # a window that applies comes as a mask
DTYPES = (torch.bfloat16, torch.float32)  # that are computed in blocks
QUERIES = 128  # at a time in bfloat16
FEWER = 64  # at a time in float32
SCORES = 1 << 21  # at a time, so that they stay in the cache


def attend_in_blocks(model: PreTrainedModel) -> None:
    """Computes the model's attention in blocks of queries, where it would call torch's fused kernel.

    Other calls (masks, sliding windows, dropout, other dtypes) still use the fused kernel.
    """
    if model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation():
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls: `[batch, heads, tokens, width]` each -> `[batch, tokens, heads, width]`."""
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    plain = causal and attention_mask is None and not dropout and set(kwargs) <= HARMLESS
    if not plain or query.dtype not in DTYPES or query.shape[2] != key.shape[2]:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    return blocked_attention(query, key, value, scaling).transpose(1, 2), None


def blocked_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float | None = None) -> Tensor:
    """Softmax of `scaling q kT`, each query seeing the keys up to its own, times v; by the faster of two methods.

    query `[batch, heads, tokens, width]`; key, value `[batch, fewer heads, tokens, width]`, each shared by
    consecutive heads. scaling: None is 1 / root of the width.
    """
    return (by_products if query.dtype == torch.bfloat16 else by_fused_kernel)(query, key, value, scaling)


def by_fused_kernel(query: Tensor, key: Tensor, value: Tensor, scaling: float | None = None) -> Tensor:
    """By torch's fused kernel, called for each block of queries."""
    batch, heads, tokens, _ = query.shape
    outputs = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
    # The mask of every block is a slice: zeros for the keys before the block, then the causal mask of its own keys.
    later = torch.cat((query.new_zeros(FEWER, tokens), query.new_full((FEWER, FEWER), -torch.inf).triu(1)), 1)
    for start in range(0, tokens, FEWER):
        stop = min(start + FEWER, tokens)
        outputs[:, :, start:stop] = scaled_dot_product_attention(
            query[:, :, start:stop],
            key[:, :, :stop],
            value[:, :, :stop],
            attn_mask=later[: stop - start, tokens - start : tokens - start + stop],
            scale=scaling,
            enable_gqa=heads != key.shape[1],
        )
    return outputs


def by_products(query: Tensor, key: Tensor, value: Tensor, scaling: float | None = None) -> Tensor:
    """By matmuls and a softmax."""
    batch, heads, tokens, width = query.shape
    shared = key.shape[1]
    group = heads // shared
    query = query.reshape(batch * shared, group, tokens, width) * (width**-0.5 if scaling is None else scaling)
    key = key.reshape(batch * shared, tokens, -1).transpose(1, 2)
    value = value.reshape(batch * shared, tokens, -1)
    later = torch.full((QUERIES, QUERIES), -torch.inf, dtype=query.dtype).triu(1)
    outputs = query.new_empty(batch * shared, group, tokens, value.shape[-1])
    at_once = max(1, SCORES // (group * QUERIES * tokens))
    for part in (slice(first, first + at_once) for first in range(0, batch * shared, at_once)):
        for start in range(0, tokens, QUERIES):
            stop = min(start + QUERIES, tokens)
            rows = query[part, :, start:stop].flatten(1, 2)
            scores = torch.bmm(rows, key[part, :, :stop]).unflatten(1, (group, -1))
            scores[..., start:] += later[: stop - start, : stop - start]
            sums = torch.bmm(scores.softmax(-1).flatten(1, 2), value[part, :stop])
            outputs[part, :, start:stop] = sums.unflatten(1, (group, -1))
    return outputs.view(batch, heads, tokens, -1)
