"""Attention of one new token to the keys and values of a cache, by a native kernel."""

from struct import Struct

import torch
from torch import Tensor

from budwood.kernels import native
from budwood.kernels.native import TYPES

# The tensors of one call, as `native/kernels.h` declares it: query, key, value, seen or 0, out; batch, heads, shared,
# tokens, width; the strides of query, key, value and seen; scale, type.
_pack = Struct("5P5q10qfi").pack


def attend(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, scale: float | None) -> Tensor | None:
    """softmax(scale q kᵀ) v of one token of each sequence, [batch, heads, width]; None where there is no kernel.

    query: [batch, heads, width]; key, value: [batch, key heads, tokens, width], each for consecutive heads; seen: bool
    [batch, tokens], False for tokens that are not attended to; scale: 1 / sqrt(width) if None. Where a sequence
    attends to no token the result is 0.
    """
    library = native.library()
    (batch, heads, width), (shared, tokens) = query.shape, key.shape[1:3]
    tensors = [query, key, value] if seen is None else [query, key, value, seen]
    if (
        library is None
        or query.dtype not in TYPES
        or not query.dtype == key.dtype == value.dtype
        or not query.is_floating_point()
        or not key.shape == value.shape == (batch, shared, tokens, width)
        or not heads
        or not shared
        or heads % shared
        or not all(tensor.is_cpu for tensor in tensors)
        or (seen is not None and (seen.dtype != torch.bool or seen.shape != (batch, tokens)))
    ):
        return None
    query, key, value = (part if part.stride(-1) == 1 else part.contiguous() for part in (query, key, value))
    out = query.new_empty(batch, heads, width)
    call = _pack(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        0 if seen is None else seen.data_ptr(),
        out.data_ptr(),
        batch,
        heads,
        shared,
        tokens,
        width,
        *query.stride()[:2],
        *key.stride()[:3],
        *value.stride()[:3],
        *((0, 0) if seen is None else seen.stride()),
        width**-0.5 if scale is None else scale,
        TYPES[query.dtype],
    )
    return out if library.budwood_attend(call, torch.get_num_threads()) else None
