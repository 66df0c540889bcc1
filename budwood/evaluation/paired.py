"""Two models compared on the same windows or items, pair by pair.

The scatter of windows is large and common to both models; the scatter of their differences is small. So a difference
that two separate intervals would hide is seen in pairs. Results of other windows, tokens or variants are refused.
"""

import math
from collections.abc import Callable, Sequence

import numpy

from budwood.errors import UsageError
from budwood.reports.results import Pair, Perplexity, TaskScore, Text

LEVEL = 0.95
RESAMPLES = 10_000
FEWEST = 6  # windows: of fewer, not even equal signs of all differences are significant (2 / 2^n)


def paired_loss(one: Perplexity, other: Perplexity, *, seed: int = 0) -> Pair:
    """The difference of the mean losses, `one` minus `other`: below 0 where `one` is better. Bootstrap over windows.

    Raises UsageError where the two were not measured on the same windows in the same dtype.
    """
    subject = f"mean loss on {one.text.name}"
    refuse_other_windows(one.text, other.text, subject)
    refuse_other_dtype(one, other, subject)
    differences = [a - b for a, b in zip(one.losses, other.losses, strict=True)]
    low, high, p = bootstrap(differences, seed=seed)
    return Pair(
        model=one.model,
        against=other.model,
        subject=subject,
        count=len(differences),
        difference=math.fsum(differences) / len(differences),
        low=low,
        high=high,
        level=LEVEL,
        test="bootstrap over windows",
        p=p,
        better=sum(difference < 0 for difference in differences),
        worse=sum(difference > 0 for difference in differences),
        sha256=one.text.sha256,
        conditions=one.conditions,
    )


def paired_score(one: TaskScore, other: TaskScore) -> Pair:
    """The difference of the scores of a task, `one` minus `other`: above 0 where `one` is better, by an exact test.

    Raises UsageError where the two were not measured on the same items and tokens, or an item is not right or wrong.
    """
    subject = f"{one.metric} of {one.task}"
    for what, ours, theirs in (
        ("task", one.task, other.task),
        ("version of the task", one.version, other.version),
        ("metric", one.metric, other.metric),
        ("number of examples before the question", one.shots, other.shots),
        ("number of items", one.items, other.items),
    ):
        if ours != theirs:
            raise UsageError(
                f"{subject}: {one.model} and {other.model} differ in the {what} ({ours} and {theirs}); they are "
                "compared in pairs only where it is the same"
            )
    if one.sha256 != other.sha256:
        raise UsageError(
            f"{subject}: {one.model} and {other.model} were asked with different tokens (other rows or another "
            "tokenizer); they are compared in pairs only on the same ones"
        )
    refuse_other_dtype(one, other, subject)
    items, others = one.headline.items, other.headline.items
    if not items or len(items) != len(others) or not {*items, *others} <= {0.0, 1.0}:
        raise UsageError(f"{subject}: its items are not just right or wrong, so McNemar's test does not apply")
    better = sum(a > b for a, b in zip(items, others, strict=True))
    worse = sum(a < b for a, b in zip(items, others, strict=True))
    low, high, p = mcnemar(better, worse, len(items))
    return Pair(
        model=one.model,
        against=other.model,
        subject=subject,
        count=len(items),
        difference=(better - worse) / len(items),
        low=low,
        high=high,
        level=LEVEL,
        test="McNemar, exact",
        p=p,
        better=better,
        worse=worse,
        sha256=one.sha256,
        conditions=one.conditions,
    )


def refuse_other_windows(one: Text, other: Text, subject: str) -> None:
    """UsageError unless both are the same windows."""
    for what, ours, theirs in (
        ("variant", one.variant, other.variant),
        ("length of the windows", one.seq_length, other.seq_length),
        ("number of windows", one.windows, other.windows),
        ("use of a BOS token", one.bos, other.bos),
    ):
        if ours != theirs:
            raise UsageError(
                f"{subject}: the two results differ in the {what} ({ours} and {theirs}); measure both in the same way"
            )
    if one.sha256 != other.sha256:
        raise UsageError(
            f"{subject}: the two results are of different tokens ({one.data}, {one.sha256[:12]}, and {other.data}, "
            f"{other.sha256[:12]}); measure both on the same text with the same tokenizer"
        )


def refuse_other_dtype(one: Perplexity | TaskScore, other: Perplexity | TaskScore, subject: str) -> None:
    """UsageError where the forward passes were computed in different dtypes."""
    ours, theirs = one.conditions.dtype, other.conditions.dtype
    if ours != theirs:
        raise UsageError(
            f"{subject}: the two results were computed in different dtypes ({ours} and {theirs}); measure both with "
            f"--dtype {ours}"
        )


def bootstrap(
    differences: Sequence[float], *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float | None, float | None, float | None]:
    """Interval of the mean of `differences` by resampling them (percentiles), and a two-sided p of a mean of 0.

    Of few values resampling knows too little of the scatter, so there is neither an interval nor a p, and p is never
    below that of the sign test when all have one sign.
    """
    if len(differences) < FEWEST:
        return None, None, None
    values = numpy.asarray(differences, dtype=numpy.float64)
    random = numpy.random.default_rng(seed)
    means = numpy.concatenate(
        [random.choice(values, (part, len(values))).mean(axis=1) for part in parts_of(resamples, len(values))]
    )
    low, high = numpy.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    above, below = float((means >= 0).mean()), float((means <= 0).mean())
    least = max(1 / resamples, 2.0 ** -len(differences))
    return float(low), float(high), min(1.0, 2 * max(min(above, below), least))


def parts_of(resamples: int, values: int) -> list[int]:
    """Resamples to draw at a time, so that a million numbers are in memory at most."""
    size = max(1, min(resamples, 1_000_000 // values))
    return [min(size, resamples - start) for start in range(0, resamples, size)]


def mcnemar(better: int, worse: int, count: int, level: float = LEVEL) -> tuple[float, float, float]:
    """Interval of the difference of two shares of `count` items, and the exact two-sided p of McNemar's test.

    better, worse: items in which only the one, or only the other model is right. Given their sum, `better` is
    binomial; the interval is that of Clopper and Pearson (Biometrika 26, 1934) for its share, as a difference.
    """
    differing = better + worse
    if differing == 0:
        return 0.0, 0.0, 1.0
    tail = (1 - level) / 2
    low = 0.0 if better == 0 else solved(lambda share: 1 - binomial_cdf(better - 1, differing, share), tail)
    high = 1.0 if worse == 0 else solved(lambda share: 1 - binomial_cdf(better, differing, share), 1 - tail)
    p = min(1.0, 2 * binomial_cdf(min(better, worse), differing, 0.5))
    return (2 * low - 1) * differing / count, (2 * high - 1) * differing / count, p


def binomial_cdf(successes: int, trials: int, share: float) -> float:
    """The probability of at most so many successes."""
    if share in (0.0, 1.0):
        return 1.0 if share == 0.0 or successes >= trials else 0.0
    whole = math.lgamma(trials + 1)
    terms = (
        math.exp(
            whole
            - math.lgamma(hits + 1)
            - math.lgamma(trials - hits + 1)
            + hits * math.log(share)
            + (trials - hits) * math.log1p(-share)
        )
        for hits in range(successes + 1)
    )
    return min(1.0, math.fsum(terms))


def solved(rising: Callable[[float], float], value: float) -> float:
    """The argument in [0, 1] at which a rising function takes the value, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < value else (low, middle)
    return (low + high) / 2
