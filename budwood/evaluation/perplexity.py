"""Perplexity of a model on windows of text."""

import time
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from budwood.data.evaluation import Variant, evaluation_windows
from budwood.data.sources import Data
from budwood.data.tokens import Bos
from budwood.data.windows import Windows
from budwood.errors import RunError
from budwood.evaluation.conditions import conditions
from budwood.evaluation.subject import Subject, losses, streamed_logits
from budwood.progress import Progress, Silent
from budwood.reports.results import Perplexity, Text
from budwood.stream.model import Model

BOS_GAIN = 0.1  # a BOS that lowers the loss by more than this share is recommended
BOS_TOKENS = 256  # of the first window, to measure that


def measure_perplexity(
    subject: Subject, windows: Windows, name: str, tokenizer: Any, progress: Progress | None = None
) -> Perplexity:
    """exp of the mean over windows of the mean loss per token. name: what the text is called.

    Raises RunError where the loss is not finite.
    """
    start = time.perf_counter()
    subject.check(windows.ids, name)
    note = note_on_bos(subject, windows.ids, tokenizer)
    found = checked(losses(subject.logits(windows.ids, progress or Silent()), windows.ids), subject.name)
    return Perplexity(
        model=subject.name,
        text=text_of(windows, name),
        losses=found,
        conditions=conditions(subject.dtype, subject.device),
        streamed=subject.stream,
        seconds=time.perf_counter() - start,
        notes=(note,) if note else (),
    )


def evaluate(
    model: str,
    data: Data,
    *,
    variant: Variant = "plain",
    seq_length: int = 2048,
    limit: int | None = None,
    bos: Bos = "auto",
    seed: int = 0,
    stream: bool = False,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The perplexity of a model on one text, as plain JSON with the settings that it depends on.

    model: folder or hub name, dense or pruned. data, variant, bos: see `evaluation_windows`. dtype, device, stream: see
    `Subject`. Raises UsageError for invalid requests, RunError where the loss is not finite.
    """
    subject = Subject(model, dtype=dtype, device=device, stream=stream, trust_remote_code=trust_remote_code)
    tokenizer = subject.tokenizer(data)
    seq_length = min(seq_length, subject.context)
    windows = evaluation_windows(
        data, tokenizer, variant=variant, seq_length=seq_length, limit=limit, bos=bos, seed=seed
    )
    found = measure_perplexity(subject, windows, windows.record["data"], tokenizer, progress)
    return {
        "perplexity": found.perplexity,
        "mean_loss": found.mean_loss,
        "windows": len(found.losses),
        "tokens": windows.ids.numel(),
        "seq_length": found.text.seq_length,
        "data": windows.record,
        "variant": variant,
        "bos": bos,
        "dtype": found.conditions.dtype,
        "streamed": stream,
        "losses": list(found.losses),
        "notes": list(found.notes),
        "seconds": found.seconds,
    }


def text_of(windows: Windows, name: str) -> Text:
    """The record of evaluation windows, as results carry it."""
    record = windows.record
    return Text(
        name=name,
        data=record["data"],
        variant=record["variant"],
        bos=record["bos"],
        seed=record["seed"],
        windows=record["windows"],
        seq_length=record["seq_length"],
        sha256=record["sha256"],
        documents=record["documents"],
        tokens_available=record["tokens_available"],
    )


def checked(found: list[float], name: str) -> tuple[float, ...]:
    """The losses; RunError where one is not finite."""
    if not all(map(isfinite, found)):
        raise RunError(f"{name}: the loss of window {[*map(isfinite, found)].index(False)} is not finite")
    return tuple(found)


def note_on_bos(subject: Subject, ids: Tensor, tokenizer: Any) -> str | None:
    """A recommendation of a BOS where this model needs one before the windows of ids [windows, tokens]."""
    pair = with_bos(ids[:1], tokenizer)
    return None if pair is None else bos_note(*losses(subject.logits(pair, Silent()), pair))


def with_bos(window: Tensor, tokenizer: Any) -> Tensor | None:
    """The start of the window without and with a BOS, [2, tokens]; None where the window begins with one."""
    token = getattr(tokenizer, "bos_token_id", None)
    if token is None or window[0, 0] == token:
        return None
    plain = window[:, : min(BOS_TOKENS, window.shape[1])]
    led = torch.cat([torch.full((1, 1), token), plain[:, :-1]], dim=1)
    return torch.cat([plain, led])


def bos_note(plain: float, led: float) -> str | None:
    """A recommendation where a BOS lowers the loss by more than a tenth, else None."""
    if led > (1 - BOS_GAIN) * plain:
        return None
    return (
        f"this model needs a BOS token: with one before the first window its loss is {led:.3f} instead of "
        f"{plain:.3f}; use --bos every"
    )


def streamed_losses(model: Model, ids: Tensor, progress: Progress | None = None) -> list[float]:
    """Loss of every window [windows, tokens], reading one block at a time."""
    return losses(streamed_logits(model, ids, progress or Silent()), ids)
