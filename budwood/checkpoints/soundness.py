"""Refuses packed tensors that do not describe a matrix of their declared shape, before a kernel trusts them.

A checkpoint is foreign input: a count, a column or an offset out of range would make a kernel read out of
bounds. Two steps, both cheap: `check_layout` compares types and sizes as the file header gives them,
`check_positions` looks through the position tensors alone, never through the values.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from budwood.errors import RunError
from budwood.formats import WITH_INT8
from budwood.formats.int8 import ROUNDED_TO

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # suffix -> type and shape
Check = Callable[[Mapping[str, Tensor], int, int], str | None]  # tensors by suffix, out, width -> a complaint
BLOCK = 256  # columns that a count of `two_four_compact` covers, and a scale of int8 values
INT8 = {format.name: plain for plain, format in WITH_INT8.items()}
BYTES = torch.arange(256, device="cpu")  # whatever default device holds while this is imported
PAIRS = (BYTES & 3) < (BYTES >> 2 & 3)  # [256], the low nibble names two different columns in order
PLACES = PAIRS & PAIRS[BYTES >> 4]  # [256], both nibbles do
ONES = (BYTES[:, None] >> torch.arange(8, device="cpu") & 1).sum(1)  # [256], set bits


def check_layout(name: str, format: str, shape: tuple[int, int], found: Layout) -> None:
    """Raises RunError when a tensor is missing, or has not the type and size that `format` needs."""
    expected = expected_layout(format, shape, found)
    for suffix in expected:
        if suffix not in found:
            raise RunError(f"the checkpoint lacks {name}.{suffix}; fetch or write it again")
    for suffix, (dtype, sizes) in expected.items():
        found_dtype, found_sizes = found[suffix]
        right_type = found_dtype == dtype if dtype is not None else found_dtype.is_floating_point
        if not right_type or found_sizes != sizes:
            wanted = str(dtype).removeprefix("torch.") if dtype is not None else "floating-point"
            raise RunError(
                f"{name}.{suffix} does not fit a {shape[0]} x {shape[1]} matrix in format {format}: expected "
                f"{wanted} {list(sizes)}, found {str(found_dtype).removeprefix('torch.')} {list(found_sizes)}"
            )


def expected_layout(
    format: str, shape: tuple[int, int], found: Layout
) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
    """Suffix -> type (None: any floating type) and size; what is free in a format is taken from the file."""
    out, width = shape
    if format in INT8:
        plain = expected_layout(INT8[format], shape, found)
        return plain | {
            "values": (torch.int8, plain["values"][1]),
            "scales": (torch.int32, (out, -(-width // BLOCK))),
            "epsilon": (None, (1,)),
        }

    def size(suffix: str, dimension: int) -> int:
        sizes = found[suffix][1] if suffix in found else ()
        return sizes[dimension] if len(sizes) > dimension else 0

    skeleton: dict[str, tuple[torch.dtype | None, tuple[int, ...]]] = {
        "values": (None, (out, width // 4 * 2)),
        "places": (torch.uint8, (out, -(-width // 8))),
    }
    if format == "dense":
        return {"weight": (None, (out, width))}
    if format == "bitmask":
        return {"values": (None, (size("values", 0),)), "bitmask": (torch.uint8, (out, -(-width // 8)))}
    if format == "two_four":
        return skeleton
    count = size("rec_values", 0)
    if format == "two_four_compact":
        return skeleton | {
            "rec_counts": (torch.uint8, (out, -(-width // BLOCK))),
            "rec_columns": (torch.uint8, (count,)),
            "rec_values": (None, (count,)),
        }
    if format == "two_four_csr":
        return skeleton | {
            "rec_offsets": (torch.int32, (out + 1,)),
            "rec_columns": (torch.int32, (count,)),
            "rec_values": (None, (count,)),
        }
    rows, blocks = size("ell_columns", 0), size("ell_columns", 1)
    side = out // rows if rows else 0
    return skeleton | {
        "ell_columns": (torch.int32, (out // side if side else 0, blocks)),
        "ell_values": (None, (out, blocks * side)),
    }


def check_positions(name: str, format: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> None:
    """Raises RunError when a position points outside the matrix or the counts do not add up."""
    complaint = CHECKS[format](tensors, *shape)
    if complaint:
        raise RunError(f"{name} is damaged: {complaint}; fetch or write the checkpoint again")


def dense(tensors: Mapping[str, Tensor], out: int, width: int) -> str | None:
    return None


def bitmask(tensors: Mapping[str, Tensor], out: int, width: int) -> str | None:
    bits = tensors["bitmask"]
    if width % 8 and bool((bits[:, -1] >> width % 8).any()):
        return "its bitmask marks columns beyond the last"
    if int(look_up(ONES, bits).sum()) != tensors["values"].numel():
        return "its bitmask does not mark as many weights as there are values"
    return None


def two_four(tensors: Mapping[str, Tensor], out: int, width: int) -> str | None:
    places = tensors["places"]
    if width % 4:
        return "its width does not divide by 4"
    whole = width // 8
    valid = look_up(PLACES, places[:, :whole]).all()
    if width % 8:
        last = places[:, whole]  # one group only; the high nibble is empty
        valid = valid & look_up(PAIRS, last).all() & (last < 16).all()
    return None if bool(valid) else "a group of four does not name two different columns in order"


def two_four_compact(tensors: Mapping[str, Tensor], out: int, width: int) -> str | None:
    counts, columns = tensors["rec_counts"], tensors["rec_columns"]
    if int(counts.sum(dtype=torch.int64)) != columns.numel():
        return "its counts do not add up to the number of recovered weights"
    if width % BLOCK:
        last = torch.zeros_like(counts, dtype=torch.bool)  # [out, blocks]
        last[:, -1] = True
        narrow = last.view(-1).repeat_interleave(counts.view(-1).int())  # [nnz], is it in the last block?
        if bool((columns[narrow] >= width % BLOCK).any()):
            return "a recovered weight lies beyond the last column"
    return two_four(tensors, out, width)


def two_four_csr(tensors: Mapping[str, Tensor], out: int, width: int) -> str | None:
    offsets, columns = tensors["rec_offsets"], tensors["rec_columns"]
    if int(offsets[0]) != 0 or int(offsets[-1]) != columns.numel() or bool((offsets.diff() < 0).any()):
        return "its row offsets do not rise from 0 to the number of recovered weights"
    if bool(((columns < 0) | (columns >= width)).any()):
        return "a recovered weight lies outside the columns"
    return two_four(tensors, out, width)


def two_four_ell(tensors: Mapping[str, Tensor], out: int, width: int) -> str | None:
    columns = tensors["ell_columns"]  # [out/side, blocks]
    side = out // max(1, columns.shape[0])
    if columns.shape[0] * side != out or width % side:
        return "its blocks do not divide the matrix"
    if bool(((columns < 0) | (columns >= width // side)).any()):
        return "a recovered block lies outside the columns"
    return two_four(tensors, out, width)


def int8(plain: Check) -> Check:
    """The check of a format with int8 values: that of the plain one, and of the numbers that undo the rounding."""

    def check(tensors: Mapping[str, Tensor], out: int, width: int) -> str | None:
        if not bool(tensors["scales"].view(torch.float32).isfinite().all()):
            return "a scale is no finite number"
        epsilon = tensors["epsilon"]
        if not epsilon.is_meta and epsilon.item() not in ROUNDED_TO:
            return "it does not say which type its weights are rounded to"
        return plain(tensors, out, width)

    return check


def look_up(table: Tensor, keys: Tensor) -> Tensor:
    return table.to(keys.device)[keys.reshape(-1).int()]


CHECKS: dict[str, Check] = {
    "dense": dense,
    "bitmask": bitmask,
    "two_four": two_four,
    "two_four_compact": two_four_compact,
    "two_four_csr": two_four_csr,
    "two_four_ell": two_four_ell,
    "two_four_int8": int8(two_four),
    "bitmask_int8": int8(bitmask),
    "two_four_compact_int8": int8(two_four_compact),
}
