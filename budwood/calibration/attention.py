"""Causal attention for passes over whole windows in half precision, where torch's own is slow on processors.

torch's fused kernel computes bfloat16 no faster than float32 there; as plain products, a few queries at a time and
each with the keys up to it only, it takes half the time.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "budwood_blocked"
HARMLESS = {"position_ids", "cache_position", "use_cache", "sliding_window"}  # a window that matters comes as a mask
QUERIES = 128  # at a time
SCORES = 1 << 21  # at a time, so that they stay in the cache


def attend_in_blocks(model: PreTrainedModel) -> None:
    """Let the model's attention run by blocks of queries, where it would have been torch's fused kernel.

    Calls that are no plain causal attention (masks, sliding windows, dropout, other types) still are.
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
    """What transformers calls: `[batch, heads, tokens, width]` each -> `[batch, tokens, heads, width]`."""
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    plain = causal and attention_mask is None and not dropout and set(kwargs) <= HARMLESS
    if not plain or query.dtype != torch.bfloat16 or query.shape[2] != key.shape[2]:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    return causal_attention(query, key, value, scaling).transpose(1, 2), None


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float | None = None) -> Tensor:
    """Softmax of `scaling q kT`, each query seeing the keys up to its own, times v.

    query `[batch, heads, tokens, width]`; key, value `[batch, fewer heads, tokens, width]`, each shared by heads that
    follow each other. scaling: 1 / root of the width where None.
    """
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
