"""The layout of a pruned matrix in GPU memory, packed from the dense matrix and unpacked bit for bit.

Values are stored as their bits (int16), so that one layout serves bf16 and fp16. Files do not depend on this layout.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from budwood.errors import UsageError

BAND = 64  # rows of one program of the dot kernel; the number of rows is padded to it
WORD = 32  # columns whose eight codes fill one int32
FEW = 4  # most rows of x of the kernel for few rows
SOME = 64  # most rows of x of the dot kernel
WIDEST = 65536  # columns: a recovered weight has its column in 16 bits


@dataclass(frozen=True)
class TwoFourLayout:
    """Two of every four columns, and all other nonzero weights, which count as recovered.

    `values` int16 `[rows, 16 words]`, the kept two of every four columns in column order.
    `index` int32 `[rows, words]`, eight codes of four bits, each the two kept columns of a group of four.
    Word `b stride + l` holds groups `8 b stride + j stride + l` at bits `4 j`: adjacent lanes that take a
    word each then read adjacent groups at every step, of the values and of x.
    `entries` int32, `column | value << 16`, the recovered weights row by row; `starts` int32 `[rows + 1]`.

    Bytes per weight, in 16-bit dtypes: 1.125 + 4 d, d being the share of recovered weights. For an unstructured pattern
    of 50 % d is .094, and a layout of one bit per position would take 1.19 bytes instead of 1.5; its products were
    slower, since counting bits costs more than the bytes it saves.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    stride: int
    values: Tensor
    index: Tensor
    entries: Tensor
    starts: Tensor

    def unpack(self) -> Tensor:
        """The dense matrix `[out, in]`."""
        dense = self._placed()
        row = torch.arange(self.starts.numel() - 1, device=dense.device).repeat_interleave(self.starts.diff())
        entries = self.entries[: row.numel()]
        dense.view(-1)[row * self.shape[1] + (entries & 0xFFFF)] = (entries >> 16).to(torch.int16)
        return dense.view(self.dtype)

    def skeleton(self) -> Tensor:
        """The 2:4 part alone, dense `[out, in]`."""
        return self._placed().view(self.dtype)

    def _placed(self) -> Tensor:
        """The bits of the 2:4 part, dense int16 `[out, in]`."""
        out, width = self.shape
        words = self.index[:out].view(out, -1, 1, self.stride)
        nibbles = words >> _shifts(self.index.device) & 15
        codes = nibbles.view(out, -1)[:, : width // 4, None]
        codes = torch.cat((codes & 3, codes >> 2), 2)  # [out, groups, 2]
        columns = torch.arange(0, width, 4, device=codes.device)[:, None] + codes
        dense = self.values.new_zeros(self.shape)
        return dense.scatter_(1, columns.flatten(1), self.values[:out, : width // 2])

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.values, self.index, self.entries, self.starts))


def pack_two_four(weight: Tensor, base: Tensor | None = None) -> TwoFourLayout:
    """The layout of `weight [out, in]`, 16-bit, whose 2:4 part is `base`, bool `[out, in]`.

    `base` marks two of every four columns, by default the first nonzero ones; all other nonzero weights are recovered.
    Raises `UsageError` for other dtypes, widths that do not divide by 4 or exceed 65536, and other masks.
    """
    out, width = weight.shape
    if weight.dtype not in (torch.bfloat16, torch.float16):
        raise UsageError(f"the GPU kernels read bfloat16 and float16, not {str(weight.dtype).removeprefix('torch.')}")
    if not fits(width):
        raise UsageError(
            f"the GPU kernels take widths that divide by 4, up to {WIDEST} columns; this matrix has {width}"
        )
    base = two_of_four(weight != 0) if base is None else base
    fours = base.reshape(-1, 4)
    if bool((fours.sum(1, dtype=torch.uint8) != 2).any()):
        raise UsageError("the 2:4 mask of a matrix must keep two of every four columns")
    rows, words = -(-out // BAND) * BAND, -(-width // WORD)
    stride = next(size for size in (8, 4, 2, 1) if words % size == 0)
    bits = weight.contiguous().view(torch.int16)

    b0, b1, b2, b3 = fours.unbind(1)
    lower = torch.where(b0, 0, torch.where(b1, 1, 2))
    upper = torch.where(b3, 3, torch.where(b2, 2, 1))
    codes = (lower | upper << 2).to(torch.int32).view(out, width // 4)
    codes = F.pad(codes, (0, 8 * words - width // 4, 0, rows - out)).view(rows, -1, 8, stride)
    index = (codes << _shifts(weight.device)).sum(2, dtype=torch.int32)  # disjoint bits: the sum equals the or

    recovered = (bits != 0) & ~base
    columns = recovered.nonzero()[:, 1].to(torch.int32)
    entries = torch.masked_select(bits, recovered).to(torch.int32) << 16 | columns
    counts = F.pad(recovered.sum(1), (1, rows - out))
    return TwoFourLayout(
        shape=(out, width),
        dtype=weight.dtype,
        stride=stride,
        values=F.pad(torch.masked_select(bits, base).view(out, -1), (0, 16 * words - width // 2, 0, rows - out)),
        index=index.view(rows, words),
        entries=F.pad(entries, (0, 1)),  # one more: never empty
        starts=counts.cumsum(0).to(torch.int32),
    )


def fits(width: int) -> bool:
    """Whether matrices of this width can be packed."""
    return width % 4 == 0 and width <= WIDEST


def two_of_four(keep: Tensor) -> Tensor:
    """Two of every four columns of a mask, bool `[out, in]`, in divisible by 4: the first kept ones, else others."""
    fours = keep.reshape(-1, 4)
    preference = fours.to(torch.uint8) * 4 + torch.arange(3, -1, -1, dtype=torch.uint8, device=keep.device)
    return torch.zeros_like(fours).scatter_(1, preference.topk(2, dim=1).indices, True).view(keep.shape)


def _shifts(device: torch.device) -> Tensor:
    """The bit offsets of the eight codes in a word, `[8, 1]`."""
    return torch.arange(0, 32, 4, dtype=torch.int32, device=device)[:, None]
