"""Sparsity patterns: objects that turn scores [out, in] into the mask `keep`, bool [out, in].

A mask is True where a weight is kept. N:M means N kept of M neighbouring inputs of one row. Scores that are
not finite raise `NotFinite`; of ties the lower index is kept.
"""

import re
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from budwood.errors import UsageError
from budwood.sparsity.forecast import Forecast
from budwood.sparsity.selection import largest, portion, published_largest

Scope = Literal["row", "matrix"]  # the weights that are ranked together
Shape = tuple[int, int]  # [out, in]


class Pattern(Protocol):
    def keep(self, scores: Tensor) -> Tensor: ...  # [out, in] -> bool [out, in]

    def check(self, shape: Shape, name: str) -> None: ...  # UsageError where it cannot be applied

    def forecast(self, shape: Shape) -> Forecast: ...


@dataclass(frozen=True)
class NM:
    """The `kept` largest of every aligned group of `group` inputs. published: ties as in the published programs."""

    kept: int
    group: int
    published: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.kept <= self.group:
            raise UsageError(f"{self}: N:M keeps N of M neighbours, so it needs 0 < N <= M")

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}"

    @property
    def density(self) -> float:
        return self.kept / self.group

    def keep(self, scores: Tensor) -> Tensor:
        if scores.shape[1] % self.group:
            raise ValueError(f"{self} needs the inputs to divide by {self.group}, got {scores.shape[1]}")
        choose = published_largest if self.published else largest
        return choose(scores.unflatten(1, (-1, self.group)), self.kept).flatten(1)  # [out, groups, group]

    def check(self, shape: Shape, name: str) -> None:
        if shape[1] % self.group:
            raise UsageError(
                f"{name}: {self} needs the inputs to divide by {self.group}, got {shape[1]}; {leave_dense(name)}"
            )

    def forecast(self, shape: Shape) -> Forecast:
        size = shape[0] * shape[1]
        return Forecast(size * self.density, recovered=self.beyond_two(size))

    def beyond_two(self, size: int) -> float | None:
        """Weights beyond two of each group of four; None where their number is not fixed."""
        return size * max(0.0, self.density - 0.5) if 4 % self.group == 0 else None


@dataclass(frozen=True)
class Share:
    """Drop exactly floor(drop * n) weights of every row, or of the whole matrix."""

    drop: float
    per: Scope = "row"

    def __post_init__(self) -> None:
        _check_share(self.drop, "the share to drop")

    def __str__(self) -> str:
        return f"{round(100 * self.drop, 10):.12g}%"

    def keep(self, scores: Tensor) -> Tensor:
        ranked = _ranked(scores, self.per)
        return largest(ranked, ranked.shape[-1] - portion(self.drop, ranked.shape[-1])).view(scores.shape)

    def check(self, shape: Shape, name: str) -> None: ...

    def forecast(self, shape: Shape) -> Forecast:
        rows, width = _ranked_shape(shape, self.per)
        return Forecast(rows * (width - portion(self.drop, width)))


@dataclass(frozen=True)
class Top:
    """The floor(share * n) largest of every row, or of the whole matrix."""

    share: float
    per: Scope = "row"

    def __post_init__(self) -> None:
        _check_share(self.share, "the share to keep")

    def keep(self, scores: Tensor) -> Tensor:
        ranked = _ranked(scores, self.per)
        return largest(ranked, portion(self.share, ranked.shape[-1])).view(scores.shape)

    def check(self, shape: Shape, name: str) -> None: ...

    def forecast(self, shape: Shape) -> Forecast:
        return Forecast(self.count(shape))

    def count(self, shape: Shape) -> int:
        rows, width = _ranked_shape(shape, self.per)
        return rows * portion(self.share, width)

    def ranked_among(self, shape: Shape) -> int:
        """How many weights are ranked together."""
        return _ranked_shape(shape, self.per)[1]


@dataclass(frozen=True)
class LowPrunes:
    """Another pattern with the opposite tie rule, the higher index is kept: bit parity with Wanda's program."""

    base: NM | Share

    def __str__(self) -> str:
        return str(self.base)

    def keep(self, scores: Tensor) -> Tensor:
        return self.base.keep(scores.flip(0, 1)).flip(0, 1)  # groups are aligned from both ends

    def check(self, shape: Shape, name: str) -> None:
        self.base.check(shape, name)

    def forecast(self, shape: Shape) -> Forecast:
        return self.base.forecast(shape)


def parse_pattern(text: str, per: Scope = "row") -> NM | Share:
    """Read "2:4" (N kept of M) or "50%" (dropped). `str` of the result returns the text."""
    if isinstance(text, str):
        if found := re.fullmatch(r"(\d{1,9}):(\d{1,9})", text.strip()):
            return NM(int(found[1]), int(found[2]))
        if found := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text.strip()):
            return Share(float(found[1]) / 100, per)
    raise UsageError(f"pattern {text!r} is neither N:M, such as '2:4', nor a share to drop, such as '50%'")


def leave_dense(name: str) -> str:
    """The advice to skip a linear in every block, as the option --skip takes it."""
    return "leave it dense with --skip '" + re.sub(r"\d+", r"\\d+", re.escape(name)) + "'"


def _ranked(scores: Tensor, per: Scope) -> Tensor:
    return scores if per == "row" else scores.reshape(-1)


def _ranked_shape(shape: Shape, per: Scope) -> tuple[int, int]:
    return shape if per == "row" else (1, shape[0] * shape[1])


def _check_share(share: float, what: str) -> None:
    if not 0 <= share <= 1:
        raise UsageError(f"{what} must be between 0 and 1 (0% and 100%), got {share}")
