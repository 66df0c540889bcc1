"""Repetition in greedy continuations. Pruned models that still choose well among answers may only repeat themselves."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from budwood.data.windows import Windows
from budwood.errors import UsageError
from budwood.evaluation.conditions import conditions
from budwood.evaluation.perplexity import text_of
from budwood.evaluation.subject import Subject
from budwood.progress import Progress, Silent, tracked
from budwood.reports.results import Repetition

CONTINUATIONS, PROMPT, NEW = 32, 32, 128  # number, tokens of each prompt and of each answer
GRAM = 4
BATCH = 8  # prompts that are continued together


def measure_repetition(
    subject: Subject,
    windows: Windows,
    name: str,
    against: Subject | None = None,
    *,
    new_tokens: int = NEW,
    progress: Progress | None = None,
) -> Repetition:
    """The share of repeated 4-grams in greedy continuations of `windows`, which are the prompts.

    against: the dense model, which continues the same prompts. Answers are cut to fit the context of the model.
    """
    start = time.perf_counter()
    new_tokens = min(new_tokens, subject.context - windows.ids.shape[1])
    if new_tokens < GRAM:
        raise UsageError(
            f"{subject.name} has a context of {subject.context} tokens, too few for continuations of prompts of "
            f"{windows.ids.shape[1]}; leave them out with --continuations 0"
        )
    shares = [
        tuple(repetition(each.model, windows.ids, new_tokens, progress or Silent(), each.name))
        for each in ([subject] if against is None else [subject, against])
    ]
    return Repetition(
        model=subject.name,
        text=text_of(windows, name),
        new_tokens=new_tokens,
        gram=GRAM,
        shares=shares[0],
        conditions=conditions(subject.dtype, subject.device),
        against=None if against is None else against.name,
        dense_shares=None if against is None else shares[1],
        seconds=time.perf_counter() - start,
    )


def repetition(
    model: torch.nn.Module, prompts: Tensor, new_tokens: int, progress: Progress | None = None, name: str = "the model"
) -> list[float]:
    """The share of repeated 4-grams in the continuation of every prompt [prompts, tokens]."""
    shares: list[float] = []
    batches = prompts.split(BATCH)
    device = next(model.parameters()).device
    for some in tracked(progress or Silent(), batches, len(batches), f"continuations of {name}", lambda _: "prompts"):
        with torch.no_grad():  # with the kernels that a user gets
            tokens = model.generate(  # type: ignore[operator]
                some.to(device),
                attention_mask=torch.ones_like(some, device=device),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        shares += [repeated(answer) for answer in tokens[:, some.shape[1] :].tolist()]
    return shares


def repeated(tokens: Sequence[int], gram: int = GRAM) -> float:
    """The share of n-grams of `tokens` that occurred before in them; 0 where there is none."""
    grams = [tuple(tokens[start : start + gram]) for start in range(len(tokens) - gram + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
