"""Refuses packed tensors that do not describe a matrix of their declared shape, before a kernel reads them.

A checkpoint is untrusted: a count, a column or an offset out of range would make a kernel read or write out of
bounds. Both checks are cheap: `check_layout` compares dtypes and sizes, `check_positions` reads the position tensors,
never the values.
"""

from collections.abc import Mapping

from torch import Tensor

from budwood.errors import RunError
from budwood.formats import named
from budwood.formats.format import Found


def check_layout(name: str, format: str, shape: tuple[int, int], found: Found) -> None:
    """Raises RunError when a tensor is missing, or does not have the dtype and size that `format` needs.

    Raises UsageError when there is no such format.
    """
    expected = named(format).expected(shape, found)
    for suffix in expected:
        if suffix not in found:
            raise RunError(f"the checkpoint lacks {name}.{suffix}; fetch or write it again")
    for suffix, (dtype, sizes) in expected.items():
        found_dtype, found_sizes = found[suffix]
        right_dtype = found_dtype == dtype if dtype is not None else found_dtype.is_floating_point
        if not right_dtype or found_sizes != sizes:
            wanted = str(dtype).removeprefix("torch.") if dtype is not None else "floating-point"
            raise RunError(
                f"{name}.{suffix} does not fit a {shape[0]} x {shape[1]} matrix in format {format}: expected "
                f"{wanted} {list(sizes)}, found {str(found_dtype).removeprefix('torch.')} {list(found_sizes)}; "
                "fetch or write the checkpoint again"
            )


def check_positions(name: str, format: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> None:
    """Raises RunError when a position is outside the matrix or doubled, or the counts do not add up.

    The tensors must have passed `check_layout`. Raises UsageError when there is no such format.
    """
    fault = named(format).fault(tensors, shape)
    if fault:
        raise RunError(f"{name} is damaged: {fault}; fetch or write the checkpoint again")
