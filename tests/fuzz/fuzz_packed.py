"""Packed tensors of one matrix, mutated: what passes the checks is unpacked, packed again and multiplied."""

from pathlib import Path
from random import Random
from typing import Any

import torch
from fuzz_folders import Unsound
from fuzz_seeds import Seeds, matrix
from torch import Tensor

from budwood.formats import FORMATS, rounds
from budwood.formats.bits import raw
from budwood.formats.checks import check_layout, check_positions
from budwood.formats.format import Refusal
from budwood.formats.two_four import covered
from budwood.kernels.linear import SparseLinear

SHAPES = ((4, 8), (8, 256), (16, 64), (3, 12), (32, 260), (1, 4), (128, 512))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPARSE = [name for name in FORMATS if name != "dense"]


def packed_tensors(chance: Random, seeds: Seeds, folder: Path) -> None:
    """Sound means that packing the unpacked matrix, with the same 2:4 part, gives the same tensors."""
    format = chance.choice(SPARSE)
    shape = chance.choice([shape for shape in SHAPES if format != "two_four_ell" or shape[0] % 4 == 0])
    tensors = matrix(format, shape, chance.choice(DTYPES), chance.randrange(4))
    for _ in range(chance.randint(1, 3)):
        suffix = chance.choice(sorted(tensors))
        tensors[suffix] = tensor_mutated(chance, tensors[suffix])
    if chance.random() < 0.1:
        shape = (shape[0] + chance.choice((-1, 1, 4)), shape[1] + chance.choice((-4, -1, 0, 4, 8)))
    if chance.random() < 0.05:
        tensors.pop(chance.choice(sorted(tensors)))
    found = {suffix: (tensor.dtype, tuple(tensor.shape)) for suffix, tensor in tensors.items()}
    check_layout("a", format, shape, found)
    check_positions("a", format, shape, tensors)
    check_again(format, shape, tensors)
    multiply(format, shape, tensors)


def tensor_mutated(chance: Random, tensor: Tensor) -> Tensor:
    """Bits, order, sizes or dtype changed."""
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    flat = tensor.reshape(-1)
    action = chance.randrange(10)
    if action == 0:
        return tensor.to(chance.choice((torch.uint8, torch.int32, torch.float32, torch.float64, torch.bool)))
    if action == 1:
        return tensor[: chance.randint(0, len(tensor))]
    if action == 2:
        return torch.cat([tensor, tensor[: chance.randint(0, len(tensor))]])
    if action == 3:
        return tensor.reshape(chance.choice(((-1,), (1, -1), (-1, 1), (-1, *tensor.shape[1:], 1))))
    if not flat.numel():
        return tensor
    one, other = chance.randrange(flat.numel()), chance.randrange(flat.numel())
    if action == 4:
        flat[one] = flat[other]
    elif action == 5:
        flat[[one, other]] = flat[[other, one]]
    elif action == 6 and not tensor.is_floating_point():
        flat[one] = chance.choice((0, 1, 2, 3, 4, 15, 16, 63, 64, 127))
    elif action == 7 and tensor.dtype == torch.int32:
        flat[one] = chance.choice((0, -1, 2**31 - 1, -(2**31), 0x7F800000, 0x3F800000, 1))
    elif action == 8 and one + 1 < flat.numel() and not tensor.is_floating_point():
        flat[one : one + 2] = flat[one : one + 2] + torch.tensor([1, -1]).to(flat.dtype)  # the sum stays
    else:
        bytes_ = flat.view(torch.uint8)
        bytes_[chance.randrange(bytes_.numel())] ^= 1 << chance.randrange(8)
    return tensor


def check_again(format: str, shape: tuple[int, int], tensors: dict[str, Tensor]) -> None:
    """Raises Unsound unless packing what is unpacked gives the same tensors, as far as no stored value is zero.

    Of formats that round, positions are compared: int8 values of another scale are the same matrix.
    """
    kind = FORMATS[format]
    weight = kind.unpack(tensors, shape)
    base = covered(tensors["places"], shape[1]) if "places" in tensors else None
    rounded = rounds(format)
    if bool(weight.isnan().any()):
        return  # torch turns some NaN into others as it copies them
    try:
        again = (kind.plain if rounded else kind).pack(weight, base)  # type: ignore[attr-defined]
    except Refusal as error:
        raise Unsound(f"{format} does not take back what it unpacks: {error}") from error
    values = kind.kept(tensors, shape)
    if all(bool((raw(value) != 0).all()) for value in values) and not (rounded and vanished(kind, tensors, weight)):
        for suffix, tensor in again.items():
            if rounded and suffix.endswith("values"):
                continue
            same = tensor.dtype == tensors[suffix].dtype and torch.equal(raw(tensor), raw(tensors[suffix]))
            if not same:
                raise Unsound(f"{format}: {suffix} is another after unpacking and packing")


def vanished(kind: Any, tensors: dict[str, Tensor], weight: Tensor) -> bool:
    """Whether an integer that is not zero became a zero weight, as int8 times a tiny scale may."""
    shape = (weight.shape[0], weight.shape[1])
    integers = kind.integers.unpack(tensors | {"values": kind.numbers(tensors, shape)}, shape)
    return bool(((integers != 0) & (weight == 0)).any())


def multiply(format: str, shape: tuple[int, int], tensors: dict[str, Tensor]) -> None:
    """The kernels see what is accepted; with finite weights they agree with the unpacked matrix."""
    weight = FORMATS[format].unpack(tensors, shape)
    layer = SparseLinear.from_packed(format, shape, tensors)
    x = torch.ones(2, shape[1], dtype=weight.dtype)
    with torch.no_grad():
        layer.to_native_format()
        product = layer(x).float()
    wanted = x.float() @ weight.float().T
    size = weight.float().abs().sum(1).clamp(min=1e-6)
    finite = bool(size.isfinite().all()) and float(size.max()) < 1e4
    if finite and not bool(((product - wanted).abs() <= 0.05 * size).all()):
        raise Unsound(f"{format}: the kernel multiplies by another matrix than is unpacked")
