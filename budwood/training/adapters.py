"""What may move of a pruned matrix while its zeros stay zero: the weight that is computed with, its gradients, the end.

An adapter is a rule: it holds no tensors. Source: Zimmer, Andoni, Spiegel, Pokutta, "PERP", 2023, arXiv 2312.15230;
Spp: Lu and others, "SPP", 2024, arXiv 2405.16057. W [out, in] is the pruned weight, keep its mask; A [rank, in],
B [out, rank]; all in the dtype of the parameters, float32 in practice.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from budwood.errors import UsageError


@dataclass(frozen=True)
class Adapter:
    """rank: of the product BA. alpha: the product is multiplied by alpha / rank, where it is added."""

    rank: int = 16
    alpha: float = 32.0

    names: ClassVar[tuple[str, ...]] = ("A", "B")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def count(self, shape: tuple[int, int]) -> int:
        """Trained numbers for a matrix [out, in]."""
        return self.rank * sum(shape)

    def start(self, weight: Tensor, generator: torch.Generator) -> list[Tensor]:
        """The parameters before the first step, float32; with them the weight is the pruned one."""
        out, width = weight.shape
        bound = 1 / math.sqrt(width)  # Kaiming-uniform with a = √5
        return [
            torch.empty(self.rank, width).uniform_(-bound, bound, generator=generator),
            torch.zeros(out, self.rank),
        ]

    def weight(self, weight: Tensor, keep: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """The weight [out, in] that the forward pass multiplies by."""
        raise NotImplementedError

    def gradients(self, gradient: Tensor, weight: Tensor, keep: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Those of the parameters, from that of the weight that the forward pass multiplies by [out, in]."""
        raise NotImplementedError

    def merged(self, weight: Tensor, keep: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """The weight [out, in] that stays; +0 where `keep` is False."""
        return self.weight(weight, keep, parameters)


def masked(values: Tensor, keep: Tensor) -> Tensor:
    """+0 where `keep` is False; a product with the mask would leave negative zeros."""
    return torch.where(keep, values, 0)


class MaskLora(Adapter):
    """W + s (BA masked)."""

    def weight(self, weight: Tensor, keep: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        a, b = parameters
        return masked(weight + self.scale * (b @ a), keep)

    def gradients(self, gradient: Tensor, weight: Tensor, keep: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        a, b = parameters
        gradient = self.scale * masked(gradient, keep)
        return [b.T @ gradient, gradient @ a.T]


class Lora(Adapter):
    """W + s BA, dense; it cannot be merged without losing the zeros."""

    def weight(self, weight: Tensor, keep: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        a, b = parameters
        return weight + self.scale * (b @ a)

    def gradients(self, gradient: Tensor, weight: Tensor, keep: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        a, b = parameters
        return [self.scale * (b.T @ gradient), self.scale * (gradient @ a.T)]

    def merged(self, weight: Tensor, keep: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        raise UsageError("plain LoRA cannot be merged into a pruned matrix, whose zeros it would fill; use masklora")


class LoraPrune(Lora):
    """W + s BA, dense while training; masked at the end, so the loss jumps when it is merged."""

    def merged(self, weight: Tensor, keep: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        return masked(self.weight(weight, keep, parameters), keep)


class ScaleLora(Adapter):
    """W ⊙ (BA), from BA = 1."""

    def start(self, weight: Tensor, generator: torch.Generator) -> list[Tensor]:
        out, width = weight.shape
        value = 1 / math.sqrt(self.rank)
        return [torch.full((self.rank, width), value), torch.full((out, self.rank), value)]

    def weight(self, weight: Tensor, keep: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        a, b = parameters
        return masked(weight * (b @ a), keep)

    def gradients(self, gradient: Tensor, weight: Tensor, keep: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        a, b = parameters
        gradient = masked(gradient * weight, keep)
        return [b.T @ gradient, gradient @ a.T]


class Spp(Adapter):
    """W + s W ⊙ (BA)."""

    def weight(self, weight: Tensor, keep: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        a, b = parameters
        return masked(weight + self.scale * weight * (b @ a), keep)

    def gradients(self, gradient: Tensor, weight: Tensor, keep: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        a, b = parameters
        gradient = self.scale * masked(gradient * weight, keep)
        return [b.T @ gradient, gradient @ a.T]


class RowScales(Adapter):
    """W times one factor for each output."""

    names = ("scales",)

    def count(self, shape: tuple[int, int]) -> int:
        return shape[0]

    def start(self, weight: Tensor, generator: torch.Generator) -> list[Tensor]:
        return [torch.ones(weight.shape[0], 1)]

    def weight(self, weight: Tensor, keep: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        return masked(weight * parameters[0], keep)

    def gradients(self, gradient: Tensor, weight: Tensor, keep: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        return [masked(gradient * weight, keep).sum(dim=1, keepdim=True)]


class KeptWeights(Adapter):
    """The kept weights themselves: masked full training."""

    names = ("values",)

    def count(self, shape: tuple[int, int]) -> int:
        return shape[0] * shape[1]

    def start(self, weight: Tensor, generator: torch.Generator) -> list[Tensor]:
        return [weight.detach().float().clone(memory_format=torch.contiguous_format)]

    def weight(self, weight: Tensor, keep: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        return masked(parameters[0], keep)

    def gradients(self, gradient: Tensor, weight: Tensor, keep: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        return [masked(gradient, keep)]


ADAPTERS: dict[str, type[Adapter]] = {
    "masklora": MaskLora,
    "loraprune": LoraPrune,
    "scalelora": ScaleLora,
    "spp": Spp,
    "scales": RowScales,
    "weights": KeptWeights,
}


def stored(merged: Tensor, weight: Tensor) -> Tensor:
    """A merged weight [out, in] in the dtype of the pruned one, rounded once, with exactly its zeros.

    A kept weight that training made zero, or that the dtype rounds to zero, stays as it was: the packed size is that
    of before.
    """
    rounded = merged.to(weight.dtype)
    return torch.where((rounded == 0) & (weight != 0), weight, rounded)
