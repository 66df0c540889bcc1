"""2:4 and the recovered weights in CSR with 32-bit columns: the format whose bytes the WRP paper counts (ACL 2024)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from budwood.formats.bits import columns, select
from budwood.formats.format import Expected, Format, Found, dtype_found, size_found
from budwood.formats.two_four import TwoFour, recovered_fault, skeleton_bytes, split
from budwood.sparsity.forecast import Forecast


class TwoFourCsr(Format):
    """`two_four`, and `rec_offsets` int32 `[out+1]`, `rec_columns` int32 `[nnz]`, `rec_values [nnz]`."""

    name = "two_four_csr"
    suffixes = (*TwoFour.suffixes, "rec_offsets", "rec_columns", "rec_values")

    @staticmethod
    def pack(weight: Tensor, base: Tensor | None = None) -> dict[str, Tensor]:
        skeleton, recovered = split(weight, base)
        offsets = torch.zeros(weight.shape[0] + 1, dtype=torch.int32, device=weight.device)
        offsets[1:] = recovered.sum(1).cumsum(0)
        return skeleton | {
            "rec_offsets": offsets,
            "rec_columns": columns(recovered, torch.int32, within=weight.shape[1]),
            "rec_values": select(weight, recovered),
        }

    @staticmethod
    def unpack(tensors: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        dense = TwoFour.unpack(tensors, shape)
        rows = torch.arange(shape[0], device=dense.device).repeat_interleave(tensors["rec_offsets"].diff())
        dense.view(-1).scatter_(0, rows * shape[1] + tensors["rec_columns"], tensors["rec_values"])
        return dense

    @staticmethod
    def nbytes(shape: tuple[int, int], forecast: Forecast, itemsize: int) -> int | None:
        if shape[1] % 4 or forecast.recovered is None:
            return None
        return skeleton_bytes(shape, itemsize) + 4 * (shape[0] + 1) + (4 + itemsize) * round(forecast.recovered)

    @staticmethod
    def expected(shape: tuple[int, int], found: Found) -> Expected:
        count = size_found(found, "rec_values")
        return TwoFour.expected(shape, found) | {
            "rec_offsets": (torch.int32, (shape[0] + 1,)),
            "rec_columns": (torch.int32, (count,)),
            "rec_values": (dtype_found(found, "values"), (count,)),
        }

    @staticmethod
    def fault(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> str | None:
        offsets, columns = tensors["rec_offsets"].long(), tensors["rec_columns"].long()  # int32 differences may wrap
        counts = offsets.diff()
        if int(offsets[0]) != 0 or int(offsets[-1]) != columns.numel() or bool((counts < 0).any()):
            return "its row offsets do not rise from 0 to the number of recovered weights"
        if bool(((columns < 0) | (columns >= shape[1])).any()):
            return "a recovered weight is outside the columns"
        rows = torch.arange(shape[0], device=columns.device).repeat_interleave(counts)
        return TwoFour.fault(tensors, shape) or recovered_fault(tensors["places"], rows, columns)
