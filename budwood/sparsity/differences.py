"""Second moments of differences between tokens, mixed into those of the tokens (arXiv 2608.06630).

A part of the inputs that is the same for all tokens cancels in differences. Over all pairs of tokens, ½ the mean of
(x_a - x_b)(x_a - x_b)ᵀ is their covariance; neighbours in the text have more than position in common.
"""

from collections.abc import Mapping
from typing import Literal, Self

import torch
from torch import Tensor

from budwood.sparsity.statistics import Gram

Pairs = Literal["neighbours", "all"]
LEAST = 0.01  # factor of a row


class MixedGram(Gram):
    """Second moments H of the inputs with a share of those of differences D: (1 - share) H + share D, [in, in].

    D is scaled to the number of tokens. pairs: neighbouring tokens of a sequence, or all.
    """

    def __init__(self, width: int, share: float, pairs: Pairs = "neighbours"):
        super().__init__(width)
        self.share, self.pairs = share, pairs
        self.sum = torch.zeros(width, dtype=torch.float64)  # [in], over all tokens
        self.neighbours = Gram(width)

    def add(self, x: Tensor) -> None:
        """x: [..., tokens, in]; two dimensions are one sequence."""
        super().add(x)
        self.sum = self.sum.to(x.device) + x.double().flatten(0, -2).sum(dim=0)
        if self.pairs == "neighbours" and x.shape[-2] > 1:
            self.neighbours.add(x[..., 1:, :].float() - x[..., :-1, :].float())

    def merge(self, other: Self) -> None:
        super().merge(other)
        self.sum = self.sum.to(other.sum.device) + other.sum
        self.neighbours.merge(other.neighbours)

    def state(self) -> dict[str, Tensor]:
        neighbours = {f"neighbours/{name}": tensor for name, tensor in self.neighbours.state().items()}
        return {**super().state(), "sum": self.sum, **neighbours}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_state(state)
        self.sum = state["sum"].clone()
        self.neighbours.load_state({name: state[f"neighbours/{name}"] for name in ("count", "total")})

    @property
    def mean(self) -> Tensor:
        """Of every input, float64 [in]."""
        return self.sum / max(1, self.count)

    def matrix(self) -> Tensor:
        plain = super().matrix()
        return torch.lerp(plain, self.differences(plain), self.share)

    def differences(self, plain: Tensor) -> Tensor:
        """D, float64 [in, in]. plain: H. Without a pair it is H itself."""
        if self.pairs == "all":
            return plain - self.count * torch.outer(self.mean, self.mean)
        if not self.neighbours.count:
            return plain
        return self.neighbours.matrix() * (self.count / (2 * self.neighbours.count))


def row_factors(sensitivities: Tensor) -> Tensor:
    """What the rows of a matrix are multiplied by before a mask is chosen [out], from how much the loss depends on
    their outputs: the mean squares of the gradients of these, [out] (arXiv 2608.00481).

    The error of a row then counts by its sensitivity. Relative to the mean, and at least LEAST.
    """
    mean = sensitivities.mean()
    if not mean > 0:
        return torch.ones_like(sensitivities)
    return (sensitivities / mean).sqrt().clamp(min=LEAST)
