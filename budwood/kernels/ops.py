"""The product with a packed weight as an operator of torch, so that `torch.compile` and export see one node.

The definition is plain PyTorch: unpack, then `F.linear`. Eager code does not come by here, since an operator written in
Python costs more than a small product.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from budwood.formats import FORMATS
from budwood.kernels import dispatch
from budwood.kernels.native_matrix import Packed, prepare


def unpack(packed: Sequence[Tensor], format: str, shape: tuple[int, int]) -> Tensor:
    """The dense weight `[out, in]` of a format's tensors, which come in the order of its suffixes."""
    return FORMATS[format].unpack(dict(zip(FORMATS[format].suffixes, packed, strict=True)), shape)


def reference(
    input: Tensor, bias: Tensor | None, packed: Sequence[Tensor], format: str, shape: tuple[int, int]
) -> Tensor:
    """What every kernel computes: `input [..., in] -> [..., out]`."""
    return F.linear(input, unpack(packed, format, shape), bias)


def gradients(
    gradient: Tensor, weight: Callable[[], Tensor], needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of input and bias, those that are needed, from that of the product `[..., out]`.

    weight: makes the dense one `[out, in]` where it is needed.
    """
    to_input = to_bias = None
    if needed[0]:
        # Under autocast the product ran in a lower precision than the weight is kept in.
        to_input = gradient @ weight().to(gradient.dtype)  # [..., out] @ [out, in]
    if needed[1]:
        to_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
    return to_input, to_bias


_prepared: dict[tuple[Any, ...], tuple[list[StorageWeakRef], Packed | None]] = {}


def prepared(packed: Sequence[Tensor], format: str, shape: tuple[int, int]) -> Packed | None:
    """What the native library needs of this weight `[out, in]`, kept for as long as its memory is.

    An operator gets tensors and no layer that could keep it. An address alone does not say whose it is, since memory is
    used again: the weak references tell whether it still belongs to the same tensors.
    """
    key = (format, shape, *(tensor.data_ptr() for tensor in packed))
    found = _prepared.get(key)
    if found is not None and not any(storage.expired() for storage in found[0]):
        return found[1]
    for old in [old for old, (storages, _) in _prepared.items() if any(storage.expired() for storage in storages)]:
        del _prepared[old]
    ready = prepare(format, shape, dict(zip(FORMATS[format].suffixes, packed, strict=True)))
    if ready is not None:  # what is kept here must not keep the weight
        ready.held = [tensor for tensor in ready.held if all(tensor is not given for given in packed)]
    _prepared[key] = [StorageWeakRef(tensor.untyped_storage()) for tensor in packed], ready
    return ready


@torch.library.custom_op("budwood::unpack", mutates_args=())
def _unpack(packed: Sequence[Tensor], format: str, out_features: int, in_features: int) -> Tensor:
    return unpack(packed, format, (out_features, in_features))


@_unpack.register_fake
def _(packed: Sequence[Tensor], format: str, out_features: int, in_features: int) -> Tensor:
    values = packed[FORMATS[format].suffixes.index("values")]
    return values.new_empty(out_features, in_features)


@torch.library.custom_op("budwood::linear", mutates_args=())
def linear(
    input: Tensor, bias: Tensor | None, packed: Sequence[Tensor], format: str, out_features: int, in_features: int
) -> Tensor:
    shape = (out_features, in_features)
    ready = prepared(packed, format, shape)
    result = None if ready is None else dispatch.linear(ready, input, bias)
    return reference(input, bias, packed, format, shape) if result is None else result


@linear.register_fake
def _(
    input: Tensor, bias: Tensor | None, packed: Sequence[Tensor], format: str, out_features: int, in_features: int
) -> Tensor:
    return input.new_empty(*input.shape[:-1], out_features)


def _remember(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    _, _, packed, format, out_features, in_features = inputs
    ctx.save_for_backward(*packed)
    ctx.format, ctx.shape = format, (out_features, in_features)  # type: ignore[attr-defined]


def _backward(ctx, gradient: Tensor) -> tuple:  # type: ignore[no-untyped-def]
    packed = list(ctx.saved_tensors)
    to_input, to_bias = gradients(gradient, lambda: _unpack(packed, ctx.format, *ctx.shape), ctx.needs_input_grad[:2])
    return to_input, to_bias, [None] * len(packed), None, None, None


linear.register_autograd(_backward, setup_context=_remember)
