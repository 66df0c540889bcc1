"""How a pruned matrix lies in the memory of a GPU, packed from the dense matrix and given back bit for bit.

Values travel as the bits of their type (int16), so that one layout serves bf16 and fp16. Rows are handled in
slabs of 16. Files never depend on these layouts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from budwood.errors import UsageError

SLAB = 16  # rows whose recovered weights are interleaved, and that one program of a few-rows kernel takes
BAND = 32  # rows that one program of the dot kernel takes; the number of rows is padded to it
WORD = 32  # columns whose sixteen 2:4 codes fill one int32
GROUP = 64  # columns of a bitmask that share one int64 of bits and one offset
FEW = 16  # rows of x that the few-rows kernels take
SOME = 64  # rows of x that the dot kernel takes
WIDEST = 65536  # a recovered weight names its column in 16 bits


@dataclass(frozen=True)
class TwoFourLayout:
    """A 2:4 part and recovered weights; rows sorted by how many they recovered, most first.

    `values` int16 `[rows, 16 words]`, the kept two of every four columns in column order.
    `index` int32 `[rows, words]`, sixteen codes of two bits: the code at bit `2 j` is the column, inside group
    `j // 2` of the word, of its value `j`.
    `entries` int32, `column | value << 16`, stored `[depth][16]` for each slab of 16 rows, `depth` being the
    most that a row of it recovered; a shorter row is filled with zeros.
    `starts` int64 `[rows/16 + 1]`, where the entries of each slab begin.
    `order` int32 `[rows]`, which row of the matrix each is; rows of padding carry the number of rows.

    Bytes a weight, in 16-bit types: 1.125 + 4 d, d being the share of recovered weights.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    values: Tensor
    index: Tensor
    entries: Tensor
    starts: Tensor
    order: Tensor

    def unpack(self) -> Tensor:
        """The dense matrix `[out, in]`."""
        dense = self._placed()
        slab = torch.arange(self.starts.numel() - 1, device=dense.device).repeat_interleave(self.starts.diff())
        slot = torch.arange(slab.numel(), device=dense.device)
        entries = self.entries[: slab.numel()]
        real = (entries >> 16) != 0  # a recovered weight is never all zero bits
        row = self.order.long()[(slab * SLAB + slot % SLAB)[real]]
        dense.view(-1)[row * self.shape[1] + (entries[real] & 0xFFFF)] = (entries[real] >> 16).to(torch.int16)
        return dense.view(self.dtype)

    def skeleton(self) -> Tensor:
        """The 2:4 part alone, dense `[out, in]`."""
        return self._placed().view(self.dtype)

    def _placed(self) -> Tensor:
        """The bits of the 2:4 part, dense int16 `[out, in]`."""
        out, width = self.shape
        shifts = torch.arange(0, 32, 2, dtype=torch.int32, device=self.index.device)
        codes = (self.index[:, :, None] >> shifts & 3).flatten(1)[:, : width // 2]  # [rows, in/2]
        columns = torch.arange(0, width, 4, device=codes.device).repeat_interleave(2) + codes
        sorted_rows = self.values.new_zeros(self.order.numel(), width)
        sorted_rows.scatter_(1, columns, self.values[:, : width // 2])
        dense = torch.empty_like(sorted_rows[:out])
        dense[self.order[:out].long()] = sorted_rows[:out]
        return dense

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.values, self.index, self.entries, self.starts, self.order))


@dataclass(frozen=True)
class BitmaskLayout:
    """Any mask: the kept values row by row, one bit a position, one offset per 64 columns.

    `values` int16 `[nnz + 1]`; the last is a zero, so that the tensor is never empty.
    `mask` int64 `[rows, groups]`, the bits of 64 columns, lowest first.
    `starts` int32 `[rows, groups]`, where in `values` a group begins: a lane then finds its value by counting
    bits inside its own word, without waiting for the rest of the row.

    Bytes a weight, in 16-bit types: 2 d + 0.125 + 0.0625, d being the density; the offsets are the 0.0625.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    values: Tensor
    mask: Tensor
    starts: Tensor

    def unpack(self) -> Tensor:
        """The dense matrix `[out, in]`."""
        out, width = self.shape
        shifts = torch.arange(8, dtype=torch.uint8, device=self.mask.device)
        bits = self.mask.view(torch.uint8)[:out, :, None] >> shifts & 1  # [out, bytes, 8]
        keep = bits.flatten(1)[:, :width].bool()
        dense = self.values.new_zeros(self.shape)
        return dense.masked_scatter_(keep, self.values).view(self.dtype)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.values, self.mask, self.starts))


def pack_two_four(weight: Tensor, base: Tensor) -> TwoFourLayout:
    """The layout of `weight [out, in]`, 16-bit, whose 2:4 part is `base`, bool `[out, in]`.

    `base` names two of every four columns; whatever else is not zero was recovered.
    Raises `UsageError` for other types, widths that do not divide by 4 or exceed 65536, and other masks.
    """
    out, width = _checked(weight)
    if width % 4 or width > WIDEST:
        raise UsageError(f"the 2:4 GPU kernel takes widths that divide by 4, up to {WIDEST}; this matrix has {width}")
    pairs = base.reshape(-1, 4)
    if bool((pairs.sum(1, dtype=torch.uint8) != 2).any()):
        raise UsageError("the 2:4 part of a matrix must name two of every four columns")
    bits = weight.contiguous().view(torch.int16)
    recovered = (bits != 0) & ~base
    counts = recovered.sum(1)
    order = counts.argsort(descending=True, stable=True)
    rows, words = -(-out // BAND) * BAND, -(-width // WORD)

    def padded(tensor: Tensor) -> Tensor:
        """[out, in/2] in the order of the matrix -> [rows, 16 words] in ours."""
        return F.pad(tensor[order], (0, 16 * words - width // 2, 0, rows - out))

    b0, b1, b2, b3 = pairs.unbind(1)
    lower = torch.where(b0, 0, torch.where(b1, 1, 2))
    upper = torch.where(b3, 3, torch.where(b2, 2, 1))
    codes = padded(torch.stack((lower, upper), 1).to(torch.int32).view(out, width // 2))
    shifts = torch.arange(0, 32, 2, dtype=torch.int32, device=weight.device)
    index = (codes.view(rows, words, 16) << shifts).sum(2, dtype=torch.int32)  # disjoint bits: a sum is an or

    entries, starts = _interleaved(bits[order], recovered[order], rows)
    return TwoFourLayout(
        shape=(out, width),
        dtype=weight.dtype,
        values=padded(torch.masked_select(bits, base).view(out, width // 2)),
        index=index,
        entries=entries,
        starts=starts,
        order=F.pad(order, (0, rows - out), value=out).to(torch.int32),
    )


def _interleaved(bits: Tensor, recovered: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Entries and starts of sorted rows: int16 and bool [out, in] -> int32 [slots + 1], int64 [rows/16 + 1]."""
    counts = recovered.sum(1)
    depth = F.pad(counts, (0, rows - counts.numel())).view(-1, SLAB).amax(1)  # [slabs]
    starts = F.pad((depth * SLAB).cumsum(0), (1, 0))
    row, column = recovered.nonzero(as_tuple=True)
    first = F.pad(counts.cumsum(0), (1, 0))
    turn = torch.arange(row.numel(), device=row.device) - first[row]  # the how-manieth of its row
    slot = starts[row // SLAB] + turn * SLAB + row % SLAB
    entries = torch.zeros(int(starts[-1]) + 1, dtype=torch.int32, device=bits.device)  # one more: never empty
    entries[slot] = torch.masked_select(bits, recovered).to(torch.int32) << 16 | column.to(torch.int32)
    return entries, starts


def pack_bitmask(weight: Tensor, keep: Tensor | None = None) -> BitmaskLayout:
    """The layout of `weight [out, in]`, 16-bit; `keep`, bool `[out, in]`, defaults to whatever is not zero bits.

    Raises `UsageError` for other types, a `keep` that would lose a weight, and 2**31 values or more.
    """
    out, width = _checked(weight)
    bits = weight.contiguous().view(torch.int16)
    keep = bits != 0 if keep is None else keep
    if bool(((bits != 0) & ~keep).any()):
        raise UsageError("the mask of a matrix must cover every weight that is not zero")
    rows, groups = -(-out // BAND) * BAND, -(-width // GROUP)
    spread = F.pad(keep, (0, groups * GROUP - width, 0, rows - out)).view(rows, groups * 8, 8)
    shifts = torch.arange(8, dtype=torch.uint8, device=weight.device)
    packed = (spread.to(torch.uint8) << shifts).sum(2, dtype=torch.uint8)  # [rows, bytes]
    counts = spread.view(rows * groups, GROUP).sum(1)
    total = int(counts.sum())
    if total >= 2**31:
        raise UsageError("the bitmask GPU kernel counts values in 31 bits; this matrix has more")
    return BitmaskLayout(
        shape=(out, width),
        dtype=weight.dtype,
        values=F.pad(torch.masked_select(bits, keep), (0, 1)),
        mask=packed.view(torch.int64),
        starts=(counts.cumsum(0) - counts).to(torch.int32).view(rows, groups),
    )


def _checked(weight: Tensor) -> tuple[int, int]:
    """The shape of a matrix of a type that the kernels read; raises `UsageError` for others."""
    if weight.dtype not in (torch.bfloat16, torch.float16):
        raise UsageError(f"the GPU kernels read bfloat16 and float16, not {str(weight.dtype).removeprefix('torch.')}")
    return weight.shape[0], weight.shape[1]
