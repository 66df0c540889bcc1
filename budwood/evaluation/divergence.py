"""How far a model's predictions are from the dense model's on the same tokens, in the columns of llama.cpp.

llama.cpp compares the second half of every window; here all tokens but the first of a window are compared.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from budwood.data.windows import Windows
from budwood.errors import UsageError
from budwood.evaluation.conditions import conditions
from budwood.evaluation.perplexity import checked, text_of
from budwood.evaluation.subject import Subject, window_loss
from budwood.progress import Progress, Silent
from budwood.reports.results import Divergence

CHUNK = 256  # tokens whose probabilities are in memory at a time


@dataclass(frozen=True)
class Gaps:
    """Every token's gap between a model and the dense one, float64 [tokens]."""

    kl: Tensor  # KL divergence of the dense distribution to the model's, in nats
    loss: Tensor  # loss of the token that follows, model minus dense
    probability: Tensor  # its probability, model minus dense
    top: Tensor  # 1 where both find the same token the most probable


def gaps(logits: Tensor, dense: Tensor, targets: Tensor) -> Gaps:
    """The gaps at tokens with these logits [tokens, vocabulary], followed by `targets` [tokens]."""
    found = [_gaps(*part) for part in zip(logits.split(CHUNK), dense.split(CHUNK), targets.split(CHUNK), strict=True)]
    return joined(found)


def _gaps(logits: Tensor, dense: Tensor, targets: Tensor) -> Gaps:
    ours, theirs = (torch.log_softmax(part.float(), dim=-1) for part in (logits, dense))
    kl = torch.linalg.vecdot(theirs.exp(), theirs - ours)
    ours_next, theirs_next = (
        part.gather(1, targets[:, None].to(part.device))[:, 0].double() for part in (ours, theirs)
    )
    return Gaps(
        kl=kl.double().cpu(),
        loss=(theirs_next - ours_next).cpu(),
        probability=(ours_next.exp() - theirs_next.exp()).cpu(),
        top=(ours.argmax(-1) == theirs.argmax(-1)).double().cpu(),
    )


def joined(parts: Sequence[Gaps]) -> Gaps:
    """The gaps of all parts, one after the other."""
    return Gaps(
        *(torch.cat([getattr(part, field) for part in parts]) for field in ("kl", "loss", "probability", "top"))
    )


def measure_divergence(
    subject: Subject, dense: Subject, windows: Windows, name: str, progress: Progress | None = None
) -> Divergence:
    """The divergence of `subject` from `dense` on the windows. name: what the text is called.

    Raises UsageError where the vocabularies differ, RunError where a loss is not finite.
    """
    start = time.perf_counter()
    ids = windows.ids
    subject.check(ids, name)
    parts: list[Gaps] = []
    losses: list[tuple[float, float]] = []
    pairs = zip(subject.logits(ids, progress or Silent()), dense.logits(ids, Silent()), strict=True)
    for place, (ours, theirs) in enumerate(pairs):
        if ours.shape != theirs.shape:
            raise UsageError(
                f"{subject.name} predicts {ours.shape[-1]} tokens and {dense.name} {theirs.shape[-1]}; models with "
                "different vocabularies cannot be compared token by token"
            )
        window = ids[place : place + 1]
        losses.append((window_loss(ours, window), window_loss(theirs, window)))
        parts.append(gaps(ours[0, :-1], theirs[0, :-1].to(ours.device), window[0, 1:]))
    ours_, theirs_ = zip(*losses, strict=True)
    every = joined(parts)
    return Divergence(
        model=subject.name,
        against=dense.name,
        text=text_of(windows, name),
        tokens=every.kl.numel(),
        losses=checked(list(ours_), subject.name),
        dense_losses=checked(list(theirs_), dense.name),
        kl=tuple(part.kl.mean().item() for part in parts),
        top=tuple(part.top.mean().item() for part in parts),
        **figures(every),
        conditions=conditions(subject.dtype, subject.device),
        seconds=time.perf_counter() - start,
    )


def figures(every: Gaps) -> dict[str, float]:
    """Means, percentiles and standard errors over all tokens, by the fields of `Divergence`."""
    ordered = every.kl.sort().values
    return {
        "kl_mean": every.kl.mean().item(),
        "kl_error": error(every.kl),
        "kl_median": percentile(ordered, 0.5),
        "kl_99": percentile(ordered, 0.99),
        "kl_999": percentile(ordered, 0.999),
        "kl_max": ordered[-1].item(),
        "ln_ratio_error": error(every.loss),
        "dp_rms": every.probability.square().mean().sqrt().item(),
    }


def error(values: Tensor) -> float:
    """Standard error of the mean of values [n]; 0 for a single one."""
    return (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else 0.0


def percentile(ordered: Tensor, share: float) -> float:
    """The value below which this share of the ordered values [n] lies, between neighbours in proportion."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    rest = place - below
    return ((1 - rest) * ordered[below] + rest * ordered[min(below + 1, len(ordered) - 1)]).item()


def check_tokens(dense: Subject, data: Any, windows: Windows, **options: Any) -> None:
    """UsageError where the dense model's tokenizer makes other tokens of the text; one without a tokenizer is taken.

    options: of `evaluation_windows`, as for `windows`.
    """
    from budwood.data.evaluation import evaluation_windows

    try:
        tokenizer = dense.tokenizer(data)
    except UsageError:
        return
    theirs = evaluation_windows(data, tokenizer, **options).record
    if theirs["sha256"] != windows.record["sha256"]:
        raise UsageError(
            f"the tokenizer of {dense.name} makes other tokens of {theirs['data']} than that of the model, so the two "
            "cannot be compared token by token; give the dense model that was pruned"
        )
