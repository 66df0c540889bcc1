"""Refuses packed tensors that do not describe a matrix of their declared shape, before a kernel reads them.

A checkpoint is untrusted: a count, a column or an offset out of range would make a kernel read or write out of
bounds. Both checks are cheap: `check_layout` compares dtypes and sizes, `check_positions` reads the position tensors,
never the values.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from budwood.errors import RunError
from budwood.formats import named
from budwood.formats.format import Found

REMEDY = "fetch or write the checkpoint again"
WEIGHTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # dtypes that a matrix may have


def check_layout(name: str, format: str, shape: tuple[int, int], found: Found, remedy: str = REMEDY) -> None:
    """Raises RunError when a tensor is missing, or does not have the dtype and size that `format` needs.

    All floating-point tensors of a matrix have its dtype. Raises UsageError when there is no such format.
    remedy: how the message ends.
    """
    expected, typed = named(format).expected(shape, found), named(format).typed
    for suffix in expected:
        if suffix not in found:
            raise RunError(f"the {format} matrix lacks {name}.{suffix}; {remedy}")
    own = found[typed][0]  # the dtype of the matrix
    for suffix in sorted(expected, key=lambda suffix: suffix != typed):
        dtype, sizes = expected[suffix]
        found_dtype, found_sizes = found[suffix]
        right_dtype = found_dtype == dtype if dtype is not None else found_dtype == own and own in WEIGHTS
        if not right_dtype or found_sizes != sizes:
            wanted = dtype if dtype is not None else own if own in WEIGHTS else "floating-point of 16, 32 or 64 bits"
            raise RunError(
                f"{name}.{suffix} does not fit a {shape[0]} x {shape[1]} matrix in format {format}: expected "
                f"{str(wanted).removeprefix('torch.')} {list(sizes)}, found "
                f"{str(found_dtype).removeprefix('torch.')} {list(found_sizes)}; {remedy}"
            )


def check_positions(
    name: str, format: str, shape: tuple[int, int], tensors: Mapping[str, Tensor], remedy: str = REMEDY
) -> None:
    """Raises RunError when a position is outside the matrix or doubled, or the counts do not add up.

    The tensors must have passed `check_layout`. Raises UsageError when there is no such format.
    """
    fault = named(format).fault(tensors, shape)
    if fault:
        raise RunError(f"{name} is damaged: {fault}; {remedy}")
