"""FLAP: how much the inputs of a linear vary, and what its channels and units score (An et al., AAAI 2024, 2312.11983).

Removing input channel j takes W[:, j] x_j from the output. A bias W[:, j] mean_j returns its constant part, so only the
fluctuation of x_j around its mean is lost. Source of all equations: arXiv 2312.11983, sections 3.2 to 3.4.
"""

from collections.abc import Mapping
from typing import Literal, Self

import torch
from torch import Tensor

from budwood.sparsity.statistics import refuse_broken_inputs

Metric = Literal["wifv", "ifv", "wifn"]
TOKENS = 256  # centred at once, in float64
ROWS = 1024  # of a weight, multiplied at once in float64


class Moments:
    """Count, mean and centred sum of squares of every input feature, in float64.

    Parts are merged by the exact rule for means and centred sums (Chan, Golub and LeVeque 1983), so any division into
    batches gives the same values up to rounding. Sequences are added one by one, by elementwise operations in a fixed
    order: neither batch size nor number of threads changes a bit.
    """

    def __init__(self, width: int) -> None:
        self.count = 0  # tokens
        self.sequences = 0
        self.mean = torch.zeros(width, dtype=torch.float64)  # [in]
        self.centred = torch.zeros(width, dtype=torch.float64)  # [in], Σ (x - mean)²

    def add(self, x: Tensor) -> None:
        """x: [..., tokens, in]; two dimensions are one sequence."""
        for sequence in x[None] if x.dim() == 2 else x.flatten(0, -3):
            if len(sequence):
                self._add_sequence(*_moments(sequence))

    def _add_sequence(self, count: int, mean: Tensor, centred: Tensor) -> None:
        self.count, self.mean, self.centred = _merged(
            (self.count, self.mean.to(mean.device), self.centred.to(mean.device)), (count, mean, centred)
        )
        self.sequences += 1

    def merge(self, other: Self) -> None:
        """Adds what `other` has summed over other tokens."""
        if other.count:
            sequences = self.sequences + other.sequences
            self._add_sequence(other.count, other.mean, other.centred)
            self.sequences = sequences

    def state(self) -> dict[str, Tensor]:
        """Everything summed so far, as tensors; see `load_state`."""
        return {
            "count": torch.tensor(self.count),
            "sequences": torch.tensor(self.sequences),
            "mean": self.mean,
            "centred": self.centred,
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Replaces the sums by those that `state` returned."""
        self.count, self.sequences = int(state["count"]), int(state["sequences"])
        self.mean, self.centred = state["mean"].clone(), state["centred"].clone()

    def variance(self) -> Tensor:
        """Sample variance over tokens, float64 [in]; 0 of a single token."""
        return self.centred / max(1, self.count - 1)

    def energy(self) -> Tensor:
        """Sum of squares per sequence, float64 [in]."""
        return (self.centred + self.count * self.mean.square()) / max(1, self.sequences)

    def check(self, name: str) -> None:
        """Raise RunError when calibration gave the linear `name` a value that is not finite."""
        refuse_broken_inputs(self.centred, name)


class PublishedMoments(Moments):
    """Moments whose variance follows the recursion of the published program.

    The program centres the squares of sequence k on the mean of the first k sequences, not on the mean before as well,
    and so skips the first sequence: f = 1 / (N - 1) Σ_{k=2..N} (k - 1) / k Σ_t (x - mean_k)². Over few sequences it
    ranks otherwise than the variance, and it depends on their order, so parts cannot be merged.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.recursion = torch.zeros(width, dtype=torch.float64)  # [in], (N - 1) f

    def _add_sequence(self, count: int, mean: Tensor, centred: Tensor) -> None:
        super()._add_sequence(count, mean, centred)
        around = centred + count * (mean - self.mean).square()  # Σ (x - mean_k)²
        share = (self.sequences - 1) / self.sequences
        self.recursion = self.recursion.to(around.device) + share * around

    def merge(self, other: Self) -> None:
        raise NotImplementedError("the published recursion depends on the order of the sequences; add them in order")

    def state(self) -> dict[str, Tensor]:
        return {**super().state(), "recursion": self.recursion}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_state(state)
        self.recursion = state["recursion"].clone()

    def variance(self) -> Tensor:
        return self.recursion / max(1, self.sequences - 1)


def channel_scores(weight: Tensor, moments: Moments, metric: Metric) -> Tensor:
    """What each input channel of `weight` [out, in] scores, float64 [in]; the lowest are removed.

    ifv: variance. wifv: variance times the squared norm of the column, which is the squared output error of removing
    that channel alone with its bias. wifn: root of the energy times the mean magnitude of the column.
    """
    if metric == "ifv":
        return moments.variance()
    if metric == "wifv":
        return moments.variance() * column_norms(weight).to(moments.mean.device).square()
    return mean_magnitudes(weight).to(moments.mean.device) * moments.energy().sqrt()


def column_norms(weight: Tensor) -> Tensor:
    """2-norm of every column of `weight` [out, in], float64 [in]."""
    return torch.linalg.vector_norm(weight, dim=0, dtype=torch.float64)


def mean_magnitudes(weight: Tensor) -> Tensor:
    """Mean magnitude of every column of `weight` [out, in], float64 [in]."""
    return torch.linalg.vector_norm(weight, ord=1, dim=0, dtype=torch.float64) / weight.shape[0]


def standardised(values: Tensor) -> Tensor:
    """Values less their mean, over their sample deviation (float64); 0 where all are equal."""
    centred = values.double() - values.double().mean()
    deviation = (centred.square().sum() / max(1, values.numel() - 1)).sqrt()
    # Rounding leaves a deviation of this size where all values are equal.
    if deviation <= 1e-14 * values.double().abs().max():
        return torch.zeros_like(centred)
    return centred / deviation


def unit_scores(channels: Tensor, power: float = 1, standardise: bool = True) -> Tensor:
    """Scores of units, float64 [units], from those of their channels [units, width], each raised to `power`.

    standardise: the mean over a unit's channels, after standardising over all of them, so that the scores of different
    layers can be compared. Otherwise the sum. The published program squares the scores of attention (power=2).
    """
    channels = channels.double() ** power
    return standardised(channels).mean(dim=1) if standardise else channels.sum(dim=1)


def compensation(weight: Tensor, mean: Tensor, kept: Tensor) -> Tensor:
    """Bias that returns the mean of the removed channels, float32 [out]: Σ_{j not kept} W[:, j] mean_j.

    weight: [out, in]. mean: [in]. kept: int64 indices of channels.
    """
    removed = mean.to(weight.device, torch.float64, copy=True)
    removed[kept.to(weight.device)] = 0
    return mean_output(weight, removed).float()


def mean_output(weight: Tensor, mean: Tensor) -> Tensor:
    """Mean output, float64 [out], of a linear without bias whose inputs have this mean [in]; weight: [out, in]."""
    exact = mean.to(weight.device, torch.float64)
    return torch.cat([rows.double() @ exact for rows in weight.split(ROWS)])


def _moments(sequence: Tensor) -> tuple[int, Tensor, Tensor]:
    """[tokens, in] -> count, mean [in], centred sum of squares [in], float64."""
    whole: tuple[int, Tensor, Tensor] | None = None
    for rows in sequence.split(TOKENS):
        exact = rows.double()
        mean = _sum(exact) / len(exact)
        part = (len(exact), mean, _sum((exact - mean).square_()))
        whole = part if whole is None else _merged(whole, part)
    assert whole is not None
    return whole


def _merged(one: tuple[int, Tensor, Tensor], other: tuple[int, Tensor, Tensor]) -> tuple[int, Tensor, Tensor]:
    """Counts, means and centred sums of squares of two sets of tokens as those of their union."""
    count = one[0] + other[0]
    share = other[0] / count
    change = other[1] - one[1]
    return count, one[1] + change * share, one[2] + other[2] + change.square() * (one[0] * share)


def _sum(rows: Tensor) -> Tensor:
    """[tokens, in] -> [in]: the later half of the rows is added to the earlier one until one row is left."""
    rows, left = rows.clone(), len(rows)
    while left > 1:
        half = left // 2
        rows[:half] += rows[left - half : left]
        left -= half
    return rows[0]
