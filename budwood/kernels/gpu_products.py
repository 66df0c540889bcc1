"""Products on a GPU for few rows, in Triton: y = x W^T + bias straight from the packed bytes, sums in float32.

16-bit numbers are read as integers and widened by a shift and a bitcast, so that the same code runs in
Triton's interpreter, where it is tested. Importing this file needs triton; see `gpu.why_not`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from budwood.kernels.gpu_layouts import BAND, FEW, SLAB, SOME, BitmaskLayout, TwoFourLayout

WARPS = 4


def rows_tile(rows: int) -> dict[str, int]:
    """How much `two_four_rows` takes at a time: the more rows of x, the fewer columns, or registers run out."""
    return {"ROWS": rows, "SLAB": SLAB, "HALVES": max(8, 32 // rows), "DEPTH": 8}


def bitmask_tile(rows: int) -> dict[str, int]:
    """The same for `bitmask_rows`."""
    return {"ROWS": rows, "SLAB": SLAB, "BYTES": max(8, 32 // rows)}


def dot_tile(rows: int) -> dict[str, int]:
    """The same for `two_four_dot`, whose registers hold all the same columns."""
    return {"ROWS": rows, "SLAB": SLAB, "BAND": BAND, "BLOCK": 128}


@triton.jit
def widened(bits, HALF: tl.constexpr):
    """The float32 of int16 bits of a bf16, or of an fp16 where HALF."""
    if HALF:
        return bits.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["rows", "words", "out"])
def two_four_rows(
    x, values, index, entries, starts, order, bias, y, rows, width, words, out,
    ROWS: tl.constexpr, HALF: tl.constexpr, BIASED: tl.constexpr,
    SLAB: tl.constexpr, HALVES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """y [ROWS, out] of x [rows, width] and a `TwoFourLayout`; a program takes a slab.

    Beyond `rows`, rows of y repeat the last: no lane asks which rows are real. A lane takes half a word,
    eight codes and eight values. x is gathered from the L1 cache.
    """
    slab = tl.program_id(0).to(tl.int64)
    local = tl.arange(0, SLAB)
    values += slab * SLAB * words * 16
    index += slab * SLAB * words
    lane = tl.arange(0, 8)[None, None, :]
    sums = ()
    beyond = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros((SLAB, HALVES), tl.float32),)
        beyond = beyond + (tl.zeros((DEPTH, SLAB), tl.float32),)

    for first in range(0, 2 * words, HALVES):
        half = first + tl.arange(0, HALVES)[None, :]
        inside = half < 2 * words
        codes = tl.load(index + local[:, None] * words + half // 2, mask=inside, other=0) >> (half % 2 * 16)
        place = local[:, None, None] * (words * 16) + half[:, :, None] * 8 + lane
        weight = widened(tl.load(values + place, mask=inside[:, :, None], other=0), HALF)
        column = half[:, :, None] * 16 + lane // 2 * 4 + ((codes[:, :, None] >> (lane * 2)) & 3)
        there = column < width
        added = ()
        for m in tl.static_range(ROWS):
            part = tl.load(x + tl.minimum(m, rows - 1) * width + column, mask=there, other=0)
            added = added + (sums[m] + tl.sum(weight * widened(part, HALF), 2),)
        sums = added

    start = tl.load(starts + slab)
    count = (tl.load(starts + slab + 1) - start).to(tl.int32)
    entries += start
    slot = tl.arange(0, DEPTH)[:, None] * SLAB + local[None, :]
    for first in range(0, count, DEPTH * SLAB):
        entry = tl.load(entries + first + slot, mask=first + slot < count, other=0)
        weight = widened((entry >> 16).to(tl.int16), HALF)
        added = ()
        for m in tl.static_range(ROWS):
            part = tl.load(x + tl.minimum(m, rows - 1) * width + (entry & 0xFFFF))
            added = added + (beyond[m] + weight * widened(part, HALF),)
        beyond = added

    target = tl.load(order + slab * SLAB + local)
    real = target < out
    for m in tl.static_range(ROWS):
        total = tl.sum(sums[m], 1) + tl.sum(beyond[m], 0)
        if BIASED:
            total += widened(tl.load(bias + target, mask=real, other=0), HALF)
        tl.store(y + m * out + target, total.to(y.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["rows", "groups", "out"])
def bitmask_rows(
    x, values, mask, starts, bias, y, rows, width, groups, out,
    ROWS: tl.constexpr, HALF: tl.constexpr, BIASED: tl.constexpr, SLAB: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """y [ROWS, out] of x [rows, width] and a `BitmaskLayout`; a program takes a slab; rows as in `two_four_rows`.

    A lane takes a byte of the mask, eight columns: x is read straight, the values at the group's offset plus
    the bits set before. Counts of bits are running sums by multiplication: of bytes inside the int64, of bits,
    spread to one nibble each, inside the byte.
    """
    slab = tl.program_id(0).to(tl.int64)
    local = tl.arange(0, SLAB)
    mask += slab * SLAB * groups
    starts += slab * SLAB * groups
    bit = tl.arange(0, 8)[None, None, :]
    sums = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros((SLAB, BYTES), tl.float32),)

    for first in range(0, 8 * groups, BYTES):
        byte = first + tl.arange(0, BYTES)[None, :]
        group = local[:, None] * groups + byte // 8
        inside = byte < 8 * groups
        word = tl.load(mask + group, mask=inside, other=0)
        pairs = word - ((word >> 1) & 0x5555555555555555)
        nibbles = (pairs & 0x3333333333333333) + ((pairs >> 2) & 0x3333333333333333)
        counts = (nibbles + (nibbles >> 4)) & 0x0F0F0F0F0F0F0F0F
        shift = (byte % 8 * 8).to(tl.int64)
        before = ((counts * 0x0101010101010101 - counts) >> shift) & 255  # bits set in lower bytes
        place = tl.load(starts + group, mask=inside, other=0) + before.to(tl.int32)

        spread = ((word >> shift) & 255).to(tl.int32)
        spread = (spread | (spread << 12)) & 0x000F000F
        spread = (spread | (spread << 6)) & 0x03030303
        spread = (spread | (spread << 3)) & 0x11111111
        lower = spread * 0x11111111 - spread  # nibble i: bits set below bit i
        kept = ((spread[:, :, None] >> (bit * 4)) & 1) == 1
        place = place[:, :, None] + ((lower[:, :, None] >> (bit * 4)) & 15)
        weight = widened(tl.load(values + place, mask=kept, other=0), HALF)
        # Every row of the slab reads x for itself, from L1: one read for all would go through shared memory.
        column = byte[:, :, None] * 8 + bit + local[:, None, None] * 0
        there = column < width
        added = ()
        for m in tl.static_range(ROWS):
            part = tl.load(x + tl.minimum(m, rows - 1) * width + column, mask=there, other=0)
            added = added + (sums[m] + tl.sum(weight * widened(part, HALF), 2),)
        sums = added

    target = slab * SLAB + local
    real = target < out
    for m in tl.static_range(ROWS):
        total = tl.sum(sums[m], 1)
        if BIASED:
            total += widened(tl.load(bias + target, mask=real, other=0), HALF)
        tl.store(y + m * out + target, total.to(y.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["rows", "words", "out"])
def two_four_dot(
    x, values, index, entries, starts, order, bias, y, rows, width, words, out,
    ROWS: tl.constexpr, HALF: tl.constexpr, BIASED: tl.constexpr, WIDE: tl.constexpr,
    SLAB: tl.constexpr, BAND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y [ROWS, out] of x [rows, width] and a `TwoFourLayout`; a program takes a band; rows as in `two_four_rows`.

    The 2:4 part is made dense in registers, BLOCK columns at a time, for the tensor cores. WIDE multiplies in
    float32 instead of the 16-bit type: for the interpreter, which knows no bf16.
    """
    band = tl.program_id(0).to(tl.int64)
    local = tl.arange(0, BAND)
    token = tl.arange(0, ROWS)
    x_row = tl.minimum(token, rows - 1) * width
    values += band * BAND * words * 16
    index += band * BAND * words
    narrow = tl.float16 if HALF else tl.bfloat16
    sums = tl.zeros((BAND, ROWS), tl.float32)

    for first in range(0, words * 32, BLOCK):
        half = first // 2 + tl.arange(0, BLOCK // 2)[None, :]
        pairs = tl.load(values + local[:, None] * (words * 16) + half, mask=half < words * 16, other=0)
        lower_value, upper_value = tl.split(tl.reshape(pairs, (BAND, BLOCK // 4, 2)))
        group = first // 4 + tl.arange(0, BLOCK // 4)[None, :]
        codes = tl.load(index + local[:, None] * words + group // 8, mask=group < words * 8, other=0)
        codes = codes >> (group % 8 * 4)
        lower, upper = codes & 3, (codes >> 2) & 3
        even = tl.interleave(
            tl.where(lower == 0, lower_value, tl.where(upper == 0, upper_value, 0)),
            tl.where(lower == 2, lower_value, tl.where(upper == 2, upper_value, 0)),
        )
        odd = tl.interleave(
            tl.where(lower == 1, lower_value, tl.where(upper == 1, upper_value, 0)),
            tl.where(lower == 3, lower_value, tl.where(upper == 3, upper_value, 0)),
        )
        weight = tl.interleave(even, odd)  # [BAND, BLOCK], columns in order
        column = first + tl.arange(0, BLOCK)[:, None]
        part = tl.load(x + x_row[None, :] + column, mask=column < width, other=0)  # [BLOCK, ROWS]
        if WIDE:
            sums = tl.dot(widened(weight, HALF), widened(part, HALF), sums, input_precision="ieee")
        else:
            sums = tl.dot(weight.to(narrow, bitcast=True), part.to(narrow, bitcast=True), sums)

    slab = band * (BAND // SLAB) + local // SLAB
    start = tl.load(starts + slab)
    depth = ((tl.load(starts + slab + 1) - start) // SLAB).to(tl.int32)
    beyond = tl.zeros((BAND, ROWS), tl.float32)
    for turn in range(0, tl.max(depth, 0)):
        entry = tl.load(entries + start + turn * SLAB + local % SLAB, mask=turn < depth, other=0)
        part = tl.load(x + x_row[None, :] + (entry & 0xFFFF)[:, None])
        beyond += widened((entry >> 16).to(tl.int16), HALF)[:, None] * widened(part, HALF)

    target = tl.load(order + band * BAND + local)
    total = sums + beyond
    if BIASED:
        total += widened(tl.load(bias + target, mask=target < out, other=0), HALF)[:, None]
    place = token[None, :] * out + target[:, None]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=place < token[None, :] * out + out)


def two_four_linear(
    layout: TwoFourLayout, x: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """`x [tokens, in] -> [tokens, out]` for up to 16 rows; the result in `dtype`, by default that of x."""
    out, width = layout.shape
    y = _result(layout, x, 1, FEW, dtype)
    two_four_rows[layout.order.numel() // SLAB,](
        _bits(x), layout.values, layout.index, layout.entries, layout.starts, layout.order, _bias(x, bias), y,
        x.shape[0], width, layout.index.shape[1], out,
        HALF=x.dtype == torch.float16, BIASED=bias is not None, num_warps=WARPS, **rows_tile(y.shape[0]),
    )  # fmt: skip
    return y[: x.shape[0]]


def bitmask_linear(
    layout: BitmaskLayout, x: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """`x [tokens, in] -> [tokens, out]` for up to 16 rows; the result in `dtype`, by default that of x."""
    out, width = layout.shape
    y = _result(layout, x, 1, FEW, dtype)
    bitmask_rows[triton.cdiv(out, SLAB),](
        _bits(x), layout.values, layout.mask, layout.starts, _bias(x, bias), y,
        x.shape[0], width, layout.mask.shape[1], out,
        HALF=x.dtype == torch.float16, BIASED=bias is not None, num_warps=WARPS, **bitmask_tile(y.shape[0]),
    )  # fmt: skip
    return y[: x.shape[0]]


def two_four_some(
    layout: TwoFourLayout, x: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None, wide: bool = False
) -> Tensor:
    """`x [tokens, in] -> [tokens, out]` for up to 64 rows, on tensor cores (`wide`: in float32)."""
    out, width = layout.shape
    y = _result(layout, x, 16, SOME, dtype)
    two_four_dot[layout.order.numel() // BAND,](
        _bits(x), layout.values, layout.index, layout.entries, layout.starts, layout.order, _bias(x, bias), y,
        x.shape[0], width, layout.index.shape[1], out,
        HALF=x.dtype == torch.float16, BIASED=bias is not None, WIDE=wide, num_warps=WARPS, **dot_tile(y.shape[0]),
    )  # fmt: skip
    return y[: x.shape[0]]


def _bits(x: Tensor) -> Tensor:
    """16-bit numbers as int16, rows one after another."""
    return x.contiguous().view(torch.int16)


def _bias(x: Tensor, bias: Tensor | None) -> Tensor:
    """The bias in the type of x, as bits; where there is none, something to point at that is never read."""
    return _bits(x if bias is None else bias.to(x.dtype))


def _result(
    layout: TwoFourLayout | BitmaskLayout, x: Tensor, least: int, most: int, dtype: torch.dtype | None
) -> Tensor:
    """An empty result `[ROWS, out]`, ROWS a power of two from `least` on.

    Raises `ValueError` where x does not fit the kernel.
    """
    if x.dim() != 2 or x.shape[1] != layout.shape[1] or not 0 < x.shape[0] <= most or x.dtype != layout.dtype:
        raise ValueError(
            f"this kernel takes x [1 to {most}, {layout.shape[1]}] of {layout.dtype}; got {list(x.shape)} of {x.dtype}"
        )
    rows = max(least, triton.next_power_of_2(x.shape[0]))
    return torch.empty(rows, layout.shape[0], dtype=dtype or x.dtype, device=x.device)
