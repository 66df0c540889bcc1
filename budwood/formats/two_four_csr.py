"""2:4 and the recovered weights in CSR with 32-bit columns: the form the WRP paper counts (ACL 2024)."""

import torch
from torch import Tensor

from budwood.formats.bits import columns, select
from budwood.formats.format import Format
from budwood.formats.two_four import TwoFour, skeleton_bytes, split
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
