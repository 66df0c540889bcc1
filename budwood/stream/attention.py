"""Causal attention over whole windows, in blocks of queries; torch's own is slow on CPUs.

torch's fused kernel multiplies all keys by all queries and discards half of the products, and computes bfloat16 no
faster than float32. Blocks of queries, each with the keys up to its last query only, take two thirds of the time in
float32. As plain matmuls in bfloat16 they take half, on processors with bfloat16 instructions.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from budwood.models.attention import replace_attention

NAME = "budwood_blocked"
DTYPES = (torch.bfloat16, torch.float32)  # that are computed in blocks
QUERIES = 128  # per block in bfloat16
FEWER = 64  # per block in float32
SCORES = 1 << 21  # at a time, so that they stay in the cache


def attend_in_blocks(model: PreTrainedModel) -> None:
    """Replace torch's fused attention in the model by attention in blocks of queries.

    Calls other than plain causal attention (masks, sliding windows, dropout, other dtypes) still use torch's.
    """
    replace_attention(model, NAME, attend)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, causal: bool
) -> Tensor | None:
    """An `Attend`: plain causal attention over whole windows."""
    if not causal or mask is not None or query.dtype not in DTYPES or query.shape[2] != key.shape[2]:
        return None
    return blocked_attention(query, key, value, scaling).transpose(1, 2)


def blocked_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float | None = None) -> Tensor:
    """softmax(scaling q kᵀ) v, where each query attends to the keys up to its own position.

    query `[batch, heads, tokens, width]`; key, value `[batch, key heads, tokens, width]`, each shared by consecutive
    heads. scaling: 1 / sqrt(width) if None. Uses the faster way for the dtype.
    """
    return (by_products if query.dtype == torch.bfloat16 else by_fused_kernel)(query, key, value, scaling)


def by_fused_kernel(query: Tensor, key: Tensor, value: Tensor, scaling: float | None = None) -> Tensor:
    """Blocks of queries through torch's fused kernel."""
    batch, heads, tokens, _ = query.shape
    outputs = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
    # The mask of any block is a slice: zeros for the earlier keys, then the block's own triangle.
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
    """Blocks of queries as matmuls and a softmax."""
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
