"""Perplexity of a model on windows of text, with the model in memory or streamed; both give the same number."""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from budwood.checkpoints.loading import load
from budwood.checkpoints.source import Source, open_source
from budwood.checkpoints.weights import storage_dtype
from budwood.data.evaluation import Variant, evaluation_windows
from budwood.data.sources import Data
from budwood.data.tokens import Bos, check_vocabulary, tokenizer_for
from budwood.errors import RunError, UsageError
from budwood.kernels.dispatch import exact
from budwood.progress import Progress, Silent
from budwood.stream.arithmetic import Arithmetic, dtype_named, known_device, name_of
from budwood.stream.model import Model

BOS_GAIN = 0.1  # a BOS that lowers the loss by more than this share is recommended
BOS_TOKENS = 256  # of the first window, to measure that


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
    """exp of the mean over windows of the mean loss per token, with the settings that it depends on.

    model: folder or hub name, dense or pruned. data, variant, bos: see `evaluation_windows`. dtype: of the forward
    pass; "auto" is float32 on a CPU, that of the checkpoint elsewhere. stream: one block in memory at a time. device:
    None or "auto" is a GPU if there is one, else the CPU.
    Raises UsageError for invalid requests, RunError where the loss is not finite.
    """
    progress = progress or Silent()
    start = time.perf_counter()
    place = known_device(device or "auto")
    source = open_source(model, trust_remote_code)
    tokenizer = tokenizer_for(source.folder, data, trust_remote_code)
    seq_length = min(seq_length, context(source.config))
    windows = evaluation_windows(
        data, tokenizer, variant=variant, seq_length=seq_length, limit=limit, bos=bos, seed=seed
    )
    compute = _compute_dtype(dtype, source, place)
    ids = windows.ids
    check_vocabulary(ids, vocabulary(source.config), windows.record["data"])
    losses_of = (streamed if stream else resident)(source, compute, place)
    pair = with_bos(ids[:1], tokenizer)
    note = bos_note(*losses_of(pair, Silent())) if pair is not None else None
    losses = losses_of(ids, progress)
    if not all(map(math.isfinite, losses)):
        raise RunError(f"{model}: the loss of window {[*map(math.isfinite, losses)].index(False)} is not finite")
    mean = math.fsum(losses) / len(losses)
    return {
        "perplexity": math.exp(mean),
        "mean_loss": mean,
        "windows": len(losses),
        "tokens": ids.numel(),
        "seq_length": ids.shape[1],
        "data": windows.record,
        "variant": variant,
        "bos": bos,
        "dtype": name_of(compute),
        "streamed": stream,
        "losses": losses,
        "notes": [note] if note else [],
        "seconds": time.perf_counter() - start,
    }


def window_loss(logits: Tensor, ids: Tensor) -> float:
    """Mean cross-entropy of one window: logits [1, tokens, vocabulary], ids [1, tokens]; tokens - 1 targets."""
    return F.cross_entropy(logits[0, :-1].float(), ids[0, 1:].to(logits.device)).item()


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
    progress = progress or Silent()
    progress.start(len(model), "blocks")
    try:
        before = time.perf_counter()
        for block in model.blocks(ids, batch=1):  # as in `resident`: the same sums, the same number
            progress.block(block.index, block.name, time.perf_counter() - before)
            before = time.perf_counter()
    finally:
        progress.finish()
    assert model.activations is not None
    losses = []
    with model.outside(), torch.no_grad():
        for batch in model.activations.indices():
            hidden = model.activations.read(batch, model.device)
            rows = ids[model.activations.span(batch)]
            logits = model.logits(hidden)
            losses += [window_loss(logits[i : i + 1], rows[i : i + 1]) for i in range(rows.shape[0])]
    return losses


def context(config: Any) -> int:
    """The context length of the model, in tokens. Raises UsageError where config.json gives none that can be."""
    return _size(config, 2**31, "max_position_embeddings", "n_positions")


def vocabulary(config: Any) -> int:
    """The rows of the model's embedding. Raises UsageError where config.json gives none that can be."""
    return _size(config.get_text_config(), 2**31, "vocab_size")


def _size(config: Any, default: int, *names: str) -> int:
    """The first of several fields that is given."""
    found = next((value for name in names if (value := getattr(config, name, None))), default)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise UsageError(f"config.json gives {names[0]} as {found!r}, which is no size; correct it")
    return found


def _compute_dtype(dtype: str, source: Source, device: torch.device) -> torch.dtype:
    if dtype != "auto":
        return dtype_named(dtype)
    if device.type == "cpu":
        return torch.float32
    return getattr(torch, str(getattr(source.config, "dtype", None) or "float32").removeprefix("torch."))


Losses = Callable[[Tensor, Progress], list[float]]  # of windows [windows, tokens], one at a time


def resident(source: Source, compute: torch.dtype, device: torch.device) -> Losses:
    """Losses with the whole model in memory."""
    model = load(source.folder, dtype=compute, device=str(device), trust_remote_code=source.trust_remote_code)

    def losses_of(ids: Tensor, progress: Progress) -> list[float]:
        losses = []
        progress.start(len(ids), "windows")
        try:
            for index, window in enumerate(ids.unsqueeze(1)):
                start = time.perf_counter()
                # Exact products: a perplexity measures the weights, not the kernels, and equals the streamed one.
                with torch.no_grad(), exact():
                    losses.append(window_loss(model(window.to(device), use_cache=False).logits, window))
                progress.block(index, f"window {index}", time.perf_counter() - start)
        finally:
            progress.finish()
        return losses

    return losses_of


def streamed(source: Source, compute: torch.dtype, device: torch.device) -> Losses:
    """Losses with one block in memory at a time."""
    storage = storage_dtype(source.shards, otherwise=torch.float32)
    return partial(streamed_losses, Model(source, storage=storage, arithmetic=Arithmetic(compute), device=device))
