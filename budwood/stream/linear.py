"""One prunable matrix of a block: stored in the storage dtype, multiplied in the compute dtype, scored in float32."""

from typing import Any

import torch
from torch import Tensor, nn

from budwood.checkpoints.packing import PackedTensors, pack_named
from budwood.errors import RunError
from budwood.formats import FORMATS
from budwood.models.linears import read, resize, write
from budwood.sparsity.histogram import x4_histogram


class Linear:
    """One prunable matrix: stored in the storage dtype, multiplied in the compute dtype, scored in float32."""

    def __init__(self, name: str, module: nn.Module, stored: Tensor):
        self.name, self.module = name, module  # in full, "model.layers.7.self_attn.q_proj"
        self.stored = stored  # [out, in], storage dtype
        self.recovered: int | None = None  # positions beyond the base pattern, set by methods that recover
        self.rounded: PackedTensors | None = None  # the packed tensors, where `round` has made them
        self.rounding_error: float | None = None  # of the pruned weight, relative in the norm
        if not all_finite(stored):
            raise RunError(
                f"{name} holds NaN or infinite weights; repair the checkpoint, or skip it with --skip '{name}'"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.stored.shape[0], self.stored.shape[1]

    @property
    def weight(self) -> Tensor:
        """[out, in] float32. In float32 storage it shares its memory with the linear: clone it to keep it."""
        return self.stored.float()

    @weight.setter
    def weight(self, value: Tensor) -> None:
        """Rounded to the storage dtype, kept where the stored weight was. A new shape resizes the module.

        Raises RunError for NaN and overflow.
        """
        self.stored = value.to(self.stored.device, self.stored.dtype)
        if not all_finite(self.stored):
            raise RunError(f"{self.name}: the new weights do not fit {self.stored.dtype}; choose another --dtype")
        if read(self.module).shape == self.stored.shape:
            write(self.module, self.stored)
        else:
            resize(self.module, self.stored)

    @property
    def bias(self) -> Tensor | None:
        """[out] float32."""
        bias = getattr(self.module, "bias", None)
        return None if bias is None else bias.detach().float()

    @bias.setter
    def bias(self, value: Tensor) -> None:
        """Rounded to the storage dtype; added where the linear has none."""
        held = read(self.module)
        bias = value.to(self.stored.dtype).to(held.device, held.dtype)
        if bias.shape != (held.shape[0],):
            raise ValueError(f"{self.name}: a bias of {tuple(bias.shape)} does not fit {held.shape[0]} outputs")
        if not all_finite(bias):
            raise RunError(f"{self.name}: the new bias does not fit {self.stored.dtype}; choose another --dtype")
        self.module.register_parameter("bias", nn.Parameter(bias, requires_grad=held.requires_grad))

    def round(self, layout: str) -> None:
        """Replaces the weight by the one that a layout with rounded values unpacks to."""
        format, tensors = pack_named(self.name, self.stored, layout)
        rounded = FORMATS[format].unpack(tensors, self.shape)
        self.rounded, self.rounding_error = (format, tensors), relative_error(rounded, self.stored)
        self.weight = rounded  # last: the linear may share the memory of what is stored


def same(stored: Tensor, held: Tensor) -> bool:
    """Whether a tensor in the compute dtype is the stored one."""
    return stored.shape == held.shape and torch.equal(stored.to(held.device, held.dtype), held)


def all_finite(tensor: Tensor) -> bool:
    """No NaN and no infinity. Minimum and maximum show it, in one pass and without a mask as large as the tensor."""
    return bool(torch.stack(tensor.aminmax()).isfinite().all()) if tensor.numel() else True


def relative_error(changed: Tensor, before: Tensor) -> float:
    """Norm of the difference over the norm before; 0 where nothing changed."""
    difference = (changed.float() - before.float()).norm()
    return (difference / before.float().norm()).item() if difference else 0.0


def describe(linear: Linear) -> dict[str, Any]:
    """The figures of one pruned matrix, JSON-plain.

    x4: how many groups of four adjacent inputs keep 0, 1, 2, 3, 4 weights; None where 4 does not divide the width.
    """
    divides = linear.shape[1] % 4 == 0
    return {
        "shape": list(linear.shape),
        "nonzeros": int(torch.count_nonzero(linear.stored)),
        "recovered": linear.recovered,
        "rounding_error": linear.rounding_error,
        "x4": x4_histogram(linear.stored != 0).tolist() if divides else None,
    }
