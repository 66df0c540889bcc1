"""What evaluations found, as frozen records with their conditions, and their form as JSON.

There are five kinds. Each carries the digest of its token ids (`sha256`), so that results of different windows, tokens
or items are never compared (`evaluation/paired.py` refuses), and `conditions`: dtype, machine, threads, versions.

    Perplexity   losses of the windows of one text
    Divergence   the same windows against the dense model: KL divergence, equal top tokens, ln(ppl / ppl_dense)
    Repetition   repeated 4-grams in greedy continuations, beside dense
    TaskScore    one zero-shot task of lm-evaluation-harness, every item's score
    Pair         the difference of two models on the same windows or items, with its interval

`result_json.py` converts them; `result_files.py` keeps them in the section `results` of a folder's `report.json`.
Losses and divergences are in nats, lengths in tokens, times in seconds; shares are from 0 to 1.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from budwood.reports.conditions import Conditions, Text


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of a model on a text: exp of the mean over windows of the mean loss per token."""

    kind: ClassVar[str] = "perplexity"
    derived: ClassVar[tuple[str, ...]] = ("perplexity", "mean_loss", "error")

    model: str
    text: Text
    losses: tuple[float, ...]  # of every window, mean over its tokens
    conditions: Conditions
    streamed: bool = False
    seconds: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def mean_loss(self) -> float:
        return math.fsum(self.losses) / len(self.losses)

    @property
    def perplexity(self) -> float:
        return exp(self.mean_loss)

    @property
    def error(self) -> float | None:
        """Standard error of the perplexity, from the scatter of the windows; None for a single window."""
        scatter = error_of_mean(self.losses)
        return None if scatter is None else self.perplexity * scatter

    @property
    def key(self) -> tuple[str | None, ...]:
        return (self.kind, *text_key(self.text), self.conditions.dtype)


@dataclass(frozen=True)
class Divergence:
    """A model against the dense one on the same windows: the columns of llama.cpp, over all tokens of the windows."""

    kind: ClassVar[str] = "divergence"
    derived: ClassVar[tuple[str, ...]] = ("perplexity", "dense_perplexity", "ln_ratio", "same_top", "same_top_error")

    model: str
    against: str  # the dense model
    text: Text
    tokens: int  # compared: windows x (seq_length - 1)
    losses: tuple[float, ...]  # of every window, mean over its tokens
    dense_losses: tuple[float, ...]
    kl: tuple[float, ...]  # KL divergence of every window, mean over its tokens
    top: tuple[float, ...]  # share of tokens of every window for which both models have the same most probable one
    kl_mean: float
    kl_error: float  # standard error of the mean over tokens
    kl_median: float  # of tokens
    kl_99: float  # 99th percentile of tokens
    kl_999: float  # 99.9th percentile
    kl_max: float
    ln_ratio_error: float  # standard error over tokens, as llama.cpp has it
    dp_rms: float  # root of the mean square change of the probability of the token that follows
    conditions: Conditions
    seconds: float | None = None

    @property
    def perplexity(self) -> float:
        return exp(math.fsum(self.losses) / len(self.losses))

    @property
    def dense_perplexity(self) -> float:
        return exp(math.fsum(self.dense_losses) / len(self.dense_losses))

    @property
    def ln_ratio(self) -> float:
        """ln(ppl / ppl_dense): the difference of the mean losses."""
        return math.fsum(self.losses) / len(self.losses) - math.fsum(self.dense_losses) / len(self.dense_losses)

    @property
    def same_top(self) -> float:
        return math.fsum(self.top) / len(self.top)

    @property
    def same_top_error(self) -> float:
        return math.sqrt(max(0.0, self.same_top * (1 - self.same_top)) / max(1, self.tokens - 1))

    @property
    def key(self) -> tuple[str | None, ...]:
        return (self.kind, *text_key(self.text), self.conditions.dtype, self.against)


@dataclass(frozen=True)
class Repetition:
    """Greedy continuations of the starts of windows: the share of n-grams of tokens that occurred before in each."""

    kind: ClassVar[str] = "repetition"
    derived: ClassVar[tuple[str, ...]] = ("share", "error", "dense_share")

    model: str
    text: Text  # `seq_length` is the length of the prompts, `windows` their number
    new_tokens: int  # of each continuation
    gram: int
    shares: tuple[float, ...]  # of every continuation
    conditions: Conditions
    against: str | None = None  # the dense model
    dense_shares: tuple[float, ...] | None = None  # of the same prompts
    seconds: float | None = None

    @property
    def share(self) -> float:
        return statistics.fmean(self.shares)

    @property
    def error(self) -> float | None:
        return error_of_mean(self.shares)

    @property
    def dense_share(self) -> float | None:
        return None if self.dense_shares is None else statistics.fmean(self.dense_shares)

    @property
    def key(self) -> tuple[str | None, ...]:
        return (self.kind, *text_key(self.text), str(self.new_tokens), str(self.gram), self.conditions.dtype)


@dataclass(frozen=True)
class TaskMetric:
    """One metric of a task: a row of the harness's table."""

    name: str  # acc, acc_norm
    filter: str  # none
    value: float  # mean over the items
    error: float | None  # standard error, as the harness computes it
    higher_is_better: bool | None
    items: tuple[float, ...]  # of every item, in order


@dataclass(frozen=True)
class TaskScore:
    """One zero-shot (or few-shot) task by lm-evaluation-harness."""

    kind: ClassVar[str] = "task"
    derived: ClassVar[tuple[str, ...]] = ("value", "error")

    model: str
    task: str  # piqa, hellaswag, ...
    version: str
    shots: int
    metric: str  # the one that stands for the task: acc_norm where the harness has it, else acc
    metrics: tuple[TaskMetric, ...]
    items: int
    limit: int | None  # None: all items
    rows: str  # where the rows come from: a package with its version, a folder, the hub
    sha256: str  # of the token ids of all requests, in order
    conditions: Conditions
    batch_size: str = "1"  # in other batches sums are rounded otherwise, which can change a tie
    seconds: float | None = None  # of the whole run of several tasks, shared by tokens

    @property
    def headline(self) -> TaskMetric:
        return next(metric for metric in self.metrics if metric.name == self.metric)

    @property
    def value(self) -> float:
        return self.headline.value

    @property
    def error(self) -> float | None:
        return self.headline.error

    @property
    def key(self) -> tuple[str | None, ...]:
        return (self.kind, self.task, str(self.shots), str(self.limit), self.sha256, self.conditions.dtype)


@dataclass(frozen=True)
class Pair:
    """The difference of two models on the same windows or items: `model` minus `against`."""

    kind: ClassVar[str] = "pair"
    derived: ClassVar[tuple[str, ...]] = ()

    model: str
    against: str
    subject: str  # "mean loss on TEXT", or "acc_norm of TASK"
    count: int  # pairs: windows or items
    difference: float  # of the means; a loss in nats, a score as a share
    low: float | None  # of the interval; None for a single window
    high: float | None
    level: float  # of the interval: 0.95
    test: str  # "bootstrap over windows" or "McNemar, exact"
    p: float | None  # two-sided, of no difference; None for the bootstrap of a single window
    better: int  # pairs in which `model` is better
    worse: int
    sha256: str
    conditions: Conditions

    @property
    def key(self) -> tuple[str | None, ...]:
        return (self.kind, self.subject, self.against, self.sha256, self.conditions.dtype)


Result = Perplexity | Divergence | Repetition | TaskScore | Pair
KINDS: dict[str, type[Result]] = {kind.kind: kind for kind in (Perplexity, Divergence, Repetition, TaskScore, Pair)}


def mean_score(scores: Sequence[TaskScore]) -> tuple[float, float | None]:
    """Mean of the scores of several tasks, each with the same weight, and its standard error (of independent tasks)."""
    errors = [score.error for score in scores]
    known = [error for error in errors if error is not None]
    whole = math.sqrt(math.fsum(error**2 for error in known)) / len(scores) if len(known) == len(errors) else None
    return math.fsum(score.value for score in scores) / len(scores), whole


def exp(loss: float) -> float:
    """The perplexity of a mean loss; infinity where no float holds it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def error_of_mean(values: Sequence[float]) -> float | None:
    """Standard error of the mean; None for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def text_key(text: Text) -> tuple[str | None, ...]:
    return (text.name, text.variant, text.sha256)
