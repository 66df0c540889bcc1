"""Attention of one new token to the keys and values of a cache, by a native kernel."""

from ctypes import Structure, addressof, c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from budwood.kernels import native
from budwood.kernels.native import TYPES


class Attention(Structure):
    """The tensors of one call, as `native/kernels.h` declares it."""

    _fields_ = [
        ("query", c_void_p),
        ("key", c_void_p),
        ("value", c_void_p),
        ("seen", c_void_p),
        ("out", c_void_p),
        ("batch", c_int64),
        ("heads", c_int64),
        ("shared", c_int64),
        ("tokens", c_int64),
        ("width", c_int64),
        ("query_strides", c_int64 * 2),
        ("key_strides", c_int64 * 3),
        ("value_strides", c_int64 * 3),
        ("seen_strides", c_int64 * 2),
        ("scale", c_float),
        ("type", c_int32),
    ]


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
    call = Attention(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        None if seen is None else seen.data_ptr(),
        out.data_ptr(),
        batch,
        heads,
        shared,
        tokens,
        width,
        query.stride()[:2],
        key.stride()[:3],
        value.stride()[:3],
        (0, 0) if seen is None else seen.stride(),
        width**-0.5 if scale is None else scale,
        TYPES[query.dtype],
    )
    return out if library.budwood_attend(addressof(call), torch.get_num_threads()) else None
