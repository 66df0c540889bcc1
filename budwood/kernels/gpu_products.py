"""Products on a GPU, in Triton: y = x W^T + bias from the packed bytes, sums in float32; and unpacking.

16-bit numbers are read as integers, several at a time, and converted by a shift and a bitcast, so that the same
code runs in Triton's interpreter, where it is tested. Importing this file needs triton; see `gpu.why_not`.

Loops over a small number of rows are unrolled (`tl.static_range`) over tensors of one dimension, one element per
lane, so that no layout conversion is needed and adjacent lanes read adjacent bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from budwood.kernels.gpu_layouts import BAND, FEW, SOME, TwoFourLayout

BLOCK = 128  # columns that the dot kernel expands at a time
LEAST = 16  # rows of x that a tensor core needs
PROGRAMS = 1024  # of the dot kernel in all: about eight per multiprocessor of a large device
SPLITS = 16
TALL = 4  # rows that one program unpacks


def rows_tile(rows: int, words: int) -> dict[str, int]:
    """The tile of a program of `two_four_rows`: smaller for more rows of x, to fit the registers."""
    lanes = min({1: 128, 2: 32, 4: 64}[rows], max(32, triton.next_power_of_2(words)))
    return {"ROWS": rows, "TALL": 4 if rows == 1 and words > 64 else 2, "LANES": lanes, "num_warps": lanes // 32}


def dot_tile(rows: int, bands: int, width: int) -> dict[str, int]:
    """The tile of `two_four_dot`: the fewer the bands, the more programs share the columns of a band."""
    fitting = max(1, min(SPLITS, PROGRAMS // bands, width // BLOCK))
    split = 1 << (fitting.bit_length() - 1)
    return {"ROWS": rows, "SPLIT": split, "BAND": BAND, "BLOCK": BLOCK, "num_warps": 4}


@triton.jit
def widened(bits, HALF: tl.constexpr):
    """The float32 of the lower sixteen bits of an int32: a bf16, or an fp16 where HALF."""
    if HALF:
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def upper(bits, HALF: tl.constexpr):
    """The float32 of the upper sixteen bits of an int32."""
    if HALF:
        return widened(bits >> 16, HALF)
    else:
        return (bits & -65536).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["rows", "words", "out"])
def two_four_rows(
    x, values, index, entries, starts, bias, y, rows, width, words, out,
    ROWS: tl.constexpr, HALF: tl.constexpr, BIASED: tl.constexpr,
    STRIDE: tl.constexpr, TALL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """y [ROWS, out] of x [rows, width] and a `TwoFourLayout`; a program takes TALL rows of the matrix.

    Rows of y beyond `rows` repeat the last, which needs no mask. A lane takes a word of codes, and per group reads two
    values of each row of the matrix and four numbers of x, of which the code selects two.
    """
    first_row = tl.program_id(0).to(tl.int64) * TALL
    lane = tl.arange(0, LANES)
    pairs = values.to(tl.pointer_type(tl.int32)) + first_row * words * 8
    quads = x.to(tl.pointer_type(tl.int64))
    index += first_row * words
    starts += first_row
    sums = ()  # of row r of the matrix and row m of x at r ROWS + m
    for _ in tl.static_range(TALL * ROWS):
        sums = sums + (tl.zeros((LANES,), tl.float32),)

    for first in range(0, words, LANES):
        word = first + lane
        inside = word < words
        group = word // STRIDE * (8 * STRIDE) + word % STRIDE
        codes = ()
        weights = ()
        for r in tl.static_range(TALL):
            codes = codes + (tl.load(index + r * words + word, mask=inside, other=0),)
        for j in tl.static_range(8):
            for r in tl.static_range(TALL):
                pair = tl.load(pairs + r * (words * 8) + group + j * STRIDE, mask=inside, other=0)
                weights = weights + (pair,)
        for j in tl.static_range(8):
            place = group + j * STRIDE
            xs = ()
            for m in tl.static_range(ROWS):
                quad = quads + tl.minimum(m, rows - 1) * (width // 4) + place
                xs = xs + (tl.load(quad, mask=place * 4 < width, other=0),)
            added = ()
            for r in tl.static_range(TALL):
                # The code of two bits, times sixteen: the shift that selects one of the four numbers of x.
                if j == 0:
                    lower_shift, upper_shift = (codes[r] << 4) & 48, (codes[r] << 2) & 48
                else:
                    lower_shift, upper_shift = (codes[r] >> (4 * j - 4)) & 48, (codes[r] >> (4 * j - 2)) & 48
                pair = weights[j * TALL + r]
                for m in tl.static_range(ROWS):
                    one = widened((xs[m] >> lower_shift.to(tl.int64)).to(tl.int32), HALF)
                    two = widened((xs[m] >> upper_shift.to(tl.int64)).to(tl.int32), HALF)
                    added = added + (sums[r * ROWS + m] + widened(pair, HALF) * one + upper(pair, HALF) * two,)
            sums = added

    begins = ()
    for r in tl.static_range(TALL):
        begins = begins + (tl.load(starts + r),)
    end = tl.load(starts + TALL)
    for first in range(begins[0], end, LANES):
        slot = first + lane
        entry = tl.load(entries + slot, mask=slot < end, other=0)
        xs = ()
        for m in tl.static_range(ROWS):
            xs = xs + (widened(tl.load(x + tl.minimum(m, rows - 1) * width + (entry & 0xFFFF)).to(tl.int32), HALF),)
        added = ()
        for r in tl.static_range(TALL):
            own = slot >= begins[r]
            if r + 1 < TALL:
                own &= slot < begins[r + 1]
            weight = tl.where(own, upper(entry, HALF), 0.0)
            for m in tl.static_range(ROWS):
                added = added + (sums[r * ROWS + m] + weight * xs[m],)
        sums = added

    for r in tl.static_range(TALL):
        row = first_row + r
        for m in tl.static_range(ROWS):
            total = tl.sum(sums[r * ROWS + m], 0)
            if BIASED:
                total += widened(tl.load(bias + row, mask=row < out, other=0).to(tl.int32), HALF)
            tl.store(y + m * out + row, total.to(y.dtype.element_ty), mask=row < out)


@triton.jit(do_not_specialize=["words", "out"])
def two_four_dot(
    turned, values, index, entries, starts, partial, width, words, out,
    ROWS: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr, STRIDE: tl.constexpr,
    SPLIT: tl.constexpr, BAND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial float32 [SPLIT, ROWS, out] of x turned, [width, ROWS], and a `TwoFourLayout`.

    A program takes a band of rows of the matrix and one part of SPLIT of its columns. The 2:4 part is expanded
    in registers, BLOCK columns at a time, for the tensor cores. WIDE multiplies in float32 instead of the 16-bit
    dtype: for the interpreter, which does not support bf16.
    """
    band = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    local = tl.arange(0, BAND)
    token = tl.arange(0, ROWS)
    row = band * BAND + local
    pairs = values.to(tl.pointer_type(tl.int32)) + band * BAND * words * 8
    index += band * BAND * words
    narrow = tl.float16 if HALF else tl.bfloat16
    sums = tl.zeros((BAND, ROWS), tl.float32)

    blocks = tl.cdiv(words * 32, BLOCK)
    share = tl.cdiv(blocks, SPLIT)
    # One stage: concurrent programs hide the latency, and copies to shared memory cost more than they save.
    for block in tl.range(split * share, tl.minimum(blocks, split * share + share), num_stages=1):
        group = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)[None, :]
        inside = group < words * 8
        pair = tl.load(pairs + local[:, None] * (words * 8) + group, mask=inside, other=0)
        word = group // (8 * STRIDE) * STRIDE + group % STRIDE
        codes = tl.load(index + local[:, None] * words + word, mask=inside, other=0)
        codes = codes >> (group % (8 * STRIDE) // STRIDE * 4)
        first, second = codes & 3, (codes >> 2) & 3
        one, two = pair.to(tl.int16), (pair >> 16).to(tl.int16)
        even = tl.join(
            tl.where(first == 0, one, tl.where(second == 0, two, 0)),
            tl.where(first == 2, one, tl.where(second == 2, two, 0)),
        )
        odd = tl.join(
            tl.where(first == 1, one, tl.where(second == 1, two, 0)),
            tl.where(first == 3, one, tl.where(second == 3, two, 0)),
        )
        weight = tl.reshape(tl.join(even, odd), (BAND, BLOCK))  # columns in order
        column = block * BLOCK + tl.arange(0, BLOCK)[:, None]
        part = tl.load(turned + column * ROWS + token[None, :], mask=column < width, other=0)
        if WIDE:
            dense = widened(weight.to(tl.int32), HALF)
            sums = tl.dot(dense, widened(part.to(tl.int32), HALF), sums, input_precision="ieee")
        else:
            sums = tl.dot(weight.to(narrow, bitcast=True), part.to(narrow, bitcast=True), sums)

    start = tl.load(starts + row)
    depth = tl.load(starts + row + 1) - start
    for turn in range(split, tl.max(depth, 0), SPLIT):
        entry = tl.load(entries + start + turn, mask=turn < depth, other=0)
        part = tl.load(turned + ((entry & 0xFFFF) * ROWS)[:, None] + token[None, :])
        sums += upper(entry, HALF)[:, None] * widened(part.to(tl.int32), HALF)

    place = (split * ROWS + token)[None, :] * out + row[:, None]
    tl.store(partial + place, sums, mask=row[:, None] < out)


@triton.jit(do_not_specialize=["out", "size"])
def added_up(partial, bias, y, out, size, ROWS: tl.constexpr, HALF: tl.constexpr, BIASED: tl.constexpr,
             SPLIT: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """y, `size` numbers of [rows, out]: the sum of the parts [SPLIT, ROWS, out], always in the same order."""
    place = tl.program_id(0) * LANES + tl.arange(0, LANES)
    real = place < size
    total = tl.zeros((LANES,), tl.float32)
    for split in tl.static_range(SPLIT):
        total += tl.load(partial + split * ROWS * out + place, mask=real, other=0.0)
    if BIASED:
        total += widened(tl.load(bias + place % out, mask=real, other=0).to(tl.int32), HALF)
    tl.store(y + place, total.to(y.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["words"])
def two_four_dense(
    values, index, entries, starts, dense, width, words,
    STRIDE: tl.constexpr, TALL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """dense int16 [rows, width] of a `TwoFourLayout`; a program takes TALL rows; a lane writes four columns at once."""
    first_row = tl.program_id(0).to(tl.int64) * TALL
    lane = tl.arange(0, LANES)
    pairs = values.to(tl.pointer_type(tl.int32)) + first_row * words * 8
    quads = dense.to(tl.pointer_type(tl.int64)) + first_row * (width // 4)
    index += first_row * words
    starts += first_row
    for first in range(0, width // 4, LANES):
        group = first + lane
        inside = group < width // 4
        word = group // (8 * STRIDE) * STRIDE + group % STRIDE
        shift = group % (8 * STRIDE) // STRIDE * 4
        for r in tl.static_range(TALL):
            codes = tl.load(index + r * words + word, mask=inside, other=0) >> shift
            pair = tl.load(pairs + r * (words * 8) + group, mask=inside, other=0).to(tl.int64)
            lower_shift, upper_shift = (codes << 4) & 48, (codes << 2) & 48
            quad = (pair & 0xFFFF) << lower_shift.to(tl.int64)
            quad |= ((pair >> 16) & 0xFFFF) << upper_shift.to(tl.int64)
            tl.store(quads + r * (width // 4) + group, quad, mask=inside)

    tl.debug_barrier()  # recovered weights overwrite zeros that other lanes have just written
    begins = ()
    for r in tl.static_range(TALL):
        begins = begins + (tl.load(starts + r),)
    end = tl.load(starts + TALL)
    for first in range(begins[0], end, LANES):
        slot = first + lane
        entry = tl.load(entries + slot, mask=slot < end, other=0)
        row = tl.zeros((LANES,), tl.int64) + first_row
        for r in tl.static_range(1, TALL):
            row += (slot >= begins[r]).to(tl.int64)
        tl.store(dense + row * width + (entry & 0xFFFF), (entry >> 16).to(tl.int16), mask=slot < end)


def two_four_linear(
    layout: TwoFourLayout, x: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """`x [tokens, in] -> [tokens, out]` for up to 4 rows; the result in `dtype`, by default that of x."""
    _check(layout, x, FEW)
    out, width = layout.shape
    tile = rows_tile(triton.next_power_of_2(x.shape[0]), layout.index.shape[1])
    y = torch.empty(tile["ROWS"], out, dtype=dtype or x.dtype, device=x.device)
    two_four_rows[triton.cdiv(out, tile["TALL"]),](
        _bits(x), layout.values, layout.index, layout.entries, layout.starts, _bias(x, bias), y,
        x.shape[0], width, layout.index.shape[1], out,
        HALF=x.dtype == torch.float16, BIASED=bias is not None, STRIDE=layout.stride, **tile,
    )  # fmt: skip
    return y[: x.shape[0]]


def two_four_some(
    layout: TwoFourLayout, x: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None, wide: bool = False
) -> Tensor:
    """`x [tokens, in] -> [tokens, out]` for up to 64 rows, on tensor cores (`wide`: in float32)."""
    _check(layout, x, SOME)
    out, width = layout.shape
    rows, bands = max(LEAST, triton.next_power_of_2(x.shape[0])), layout.index.shape[0] // BAND
    tile = dot_tile(rows, bands, width)
    partial = torch.empty(tile["SPLIT"], rows, out, dtype=torch.float32, device=x.device)
    y = torch.empty(x.shape[0], out, dtype=dtype or x.dtype, device=x.device)
    half = x.dtype == torch.float16
    two_four_dot[bands, tile["SPLIT"]](
        _bits(F.pad(x.T, (0, rows - x.shape[0]))), layout.values, layout.index, layout.entries, layout.starts, partial,
        width, layout.index.shape[1], out, HALF=half, WIDE=wide, STRIDE=layout.stride, **tile,
    )  # fmt: skip
    added_up[triton.cdiv(y.numel(), 256),](
        partial, _bias(x, bias), y, out, y.numel(),
        ROWS=rows, HALF=half, BIASED=bias is not None, SPLIT=tile["SPLIT"], LANES=256,
    )  # fmt: skip
    return y


def two_four_unpacked(layout: TwoFourLayout) -> Tensor:
    """The dense matrix `[out, in]`."""
    out, width = layout.shape
    programs = triton.cdiv(out, TALL)
    dense = torch.empty(programs * TALL, width, dtype=torch.int16, device=layout.values.device)
    two_four_dense[programs,](
        layout.values, layout.index, layout.entries, layout.starts, dense, width, layout.index.shape[1],
        STRIDE=layout.stride, TALL=TALL, LANES=128,
    )  # fmt: skip
    return dense[:out].view(layout.dtype)


def _bits(x: Tensor) -> Tensor:
    """16-bit numbers as int16, rows one after another, aligned so that four can be read at a time."""
    x = x.contiguous()
    return (x if x.data_ptr() % 8 == 0 else x.clone()).view(torch.int16)


def _bias(x: Tensor, bias: Tensor | None) -> Tensor:
    """The bias in the type of x, as bits; without a bias, any valid pointer, which is never read."""
    return _bits(x if bias is None else bias.to(x.dtype))


def _check(layout: TwoFourLayout, x: Tensor, most: int) -> None:
    """Raises `ValueError` where x does not fit the kernel."""
    if x.dim() != 2 or x.shape[1] != layout.shape[1] or not 0 < x.shape[0] <= most or x.dtype != layout.dtype:
        raise ValueError(
            f"this kernel takes x [1 to {most}, {layout.shape[1]}] of {layout.dtype}; got {list(x.shape)} of {x.dtype}"
        )
