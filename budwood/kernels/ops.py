"""The product with a packed weight as a torch operator, so that `torch.compile` and export see one node.

The definition is plain PyTorch: unpack, then `F.linear`. Eager code does not use the operator: one written in Python
costs more than a small product.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from budwood.formats import FORMATS
from budwood.kernels import dispatch
from budwood.kernels.native_matrix import NativeMatrix, check_input, native_matrix, refuse_unsound
from budwood.kernels.snapshot import Snapshot


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
    """The gradients of input and bias, where needed, from the gradient of the product `[..., out]`.

    weight: returns the dense weight `[out, in]`; called only where it is needed.
    """
    to_input = to_bias = None
    if needed[0]:
        # Under autocast the product ran in a lower precision than that of the weight.
        to_input = gradient @ weight().to(gradient.dtype)  # [..., out] @ [out, in]
    if needed[1]:
        to_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
    return to_input, to_bias


_cache: dict[tuple[Any, ...], tuple[Snapshot, NativeMatrix | None]] = {}


def cached_matrix(packed: Sequence[Tensor], format: str, shape: tuple[int, int]) -> NativeMatrix | None:
    """The `native_matrix` of this weight `[out, in]`, cached for as long as its memory exists and nobody changes it.

    Raises RunError where the tensors do not describe such a matrix.

    An operator gets tensors and no layer that could hold it.
    """
    key = (format, shape, *((tensor.data_ptr(), tensor.shape, tensor.dtype) for tensor in packed))
    found = _cache.get(key)
    if found is not None and found[0].of(packed):
        return found[1]
    for old in [old for old, (snapshot, _) in _cache.items() if not snapshot.alive()]:
        del _cache[old]
    snapshot = Snapshot(packed)
    tensors = dict(zip(FORMATS[format].suffixes, packed, strict=True))
    matrix = native_matrix(format, shape, tensors)
    if matrix is None:
        refuse_unsound(format, shape, tensors)
    else:  # the cache must not keep the weight alive
        matrix.held = [tensor for tensor in matrix.held if all(tensor is not other for other in packed)]
    _cache[key] = snapshot, matrix
    return matrix


@torch.library.custom_op("budwood::unpack", mutates_args=())
def _unpack(packed: Sequence[Tensor], format: str, out_features: int, in_features: int) -> Tensor:
    return unpack(packed, format, (out_features, in_features))


@_unpack.register_fake
def _(packed: Sequence[Tensor], format: str, out_features: int, in_features: int) -> Tensor:
    typed = packed[FORMATS[format].suffixes.index(FORMATS[format].typed)]
    return typed.new_empty(out_features, in_features)


@torch.library.custom_op("budwood::linear", mutates_args=())
def linear(
    input: Tensor, bias: Tensor | None, packed: Sequence[Tensor], format: str, out_features: int, in_features: int
) -> Tensor:
    shape = (out_features, in_features)
    matrix = cached_matrix(packed, format, shape)
    result = None if matrix is None else dispatch.linear(matrix, input, bias)
    return reference(input, bias, packed, format, shape) if result is None else result


@linear.register_fake
def _(
    input: Tensor, bias: Tensor | None, packed: Sequence[Tensor], format: str, out_features: int, in_features: int
) -> Tensor:
    check_input(input, in_features)
    return input.new_empty(*input.shape[:-1], out_features)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    _, _, packed, format, out_features, in_features = inputs
    ctx.save_for_backward(*packed)
    ctx.format, ctx.shape = format, (out_features, in_features)  # type: ignore[attr-defined]


def _backward(ctx, gradient: Tensor) -> tuple:  # type: ignore[no-untyped-def]
    packed = list(ctx.saved_tensors)
    to_input, to_bias = gradients(gradient, lambda: _unpack(packed, ctx.format, *ctx.shape), ctx.needs_input_grad[:2])
    return to_input, to_bias, [None] * len(packed), None, None, None


linear.register_autograd(_backward, setup_context=_save)
