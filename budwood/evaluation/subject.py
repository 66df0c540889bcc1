"""A model to measure: its logits for windows of tokens, with the model in memory or streamed; both give the same."""

import time
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from budwood.checkpoints.loading import load
from budwood.checkpoints.source import Source, open_source
from budwood.data.sources import Data
from budwood.data.tokens import check_vocabulary, tokenizer_for
from budwood.errors import UsageError
from budwood.kernels.dispatch import exact
from budwood.progress import Progress
from budwood.stream.arithmetic import Arithmetic, dtype_named, known_device
from budwood.stream.model import Model


class Subject:
    """A model by its name, with the dtype and device of its forward pass. It is loaded at the first use.

    dtype: "auto" is float32 on a CPU, that of the checkpoint elsewhere. stream: one block in memory at a time. Products
    are always torch's: figures measure the weights, not the kernels.
    """

    def __init__(
        self,
        name: str,
        *,
        dtype: str = "auto",
        device: str | None = None,
        stream: bool = False,
        trust_remote_code: bool = False,
    ):
        self.name, self.stream = str(name), stream
        self.device = known_device(device or "auto")
        self.source = open_source(name, trust_remote_code)
        self.dtype = compute_dtype(dtype, self.source, self.device)

    def tokenizer(self, data: Data) -> Any:
        """The tokenizer for a text; None where there is none and none is needed."""
        return tokenizer_for(self.source.folder, data, self.source.trust_remote_code)

    def check(self, ids: Tensor, name: str) -> None:
        """Raises UsageError where the text `name` holds a token id that the model has no embedding for."""
        check_vocabulary(ids, vocabulary(self.source.config), name)

    @property
    def context(self) -> int:
        """The context length, in tokens."""
        return context(self.source.config)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model in memory. Raises UsageError for a streamed one."""
        if self.stream:
            raise UsageError(f"{self.name} is read one block at a time (--stream), which serves for texts only")
        return load(
            self.source.folder,
            dtype=self.dtype,
            device=str(self.device),
            trust_remote_code=self.source.trust_remote_code,
        )

    def logits(self, ids: Tensor, progress: Progress) -> Iterator[Tensor]:
        """The logits [1, tokens, vocabulary] of every window of ids [windows, tokens], in order."""
        return self._streamed(ids, progress) if self.stream else self._resident(ids, progress)

    def _resident(self, ids: Tensor, progress: Progress) -> Iterator[Tensor]:
        model = self.model
        progress.start(len(ids), "windows")
        try:
            for index, window in enumerate(ids.unsqueeze(1)):
                start = time.perf_counter()
                with torch.no_grad(), exact():
                    logits = model(window.to(self.device), use_cache=False).logits
                yield logits
                progress.block(index, f"window {index}", time.perf_counter() - start)
        finally:
            progress.finish()

    def _streamed(self, ids: Tensor, progress: Progress) -> Iterator[Tensor]:
        model = Model(self.source, arithmetic=Arithmetic(self.dtype), device=self.device)
        return streamed_logits(model, ids, progress)


def streamed_logits(model: Model, ids: Tensor, progress: Progress) -> Iterator[Tensor]:
    """The logits [1, tokens, vocabulary] of every window of ids [windows, tokens], reading one block at a time."""
    progress.start(len(model), "blocks")
    try:
        before = time.perf_counter()
        for block in model.blocks(ids, batch=1):  # as in memory: the same sums, the same number
            progress.block(block.index, block.name, time.perf_counter() - before)
            before = time.perf_counter()
    finally:
        progress.finish()
    assert model.activations is not None
    with model.outside():
        for batch in model.activations.indices():
            with torch.no_grad():
                logits = model.logits(model.activations.read(batch, model.device))
            yield from logits.split(1)


def losses(found: Iterable[Tensor], ids: Tensor) -> list[float]:
    """The mean loss per token of every window of ids [windows, tokens], from its logits."""
    return [window_loss(logits, ids[place : place + 1]) for place, logits in enumerate(found)]


def window_loss(logits: Tensor, ids: Tensor) -> float:
    """Mean cross-entropy of one window: logits [1, tokens, vocabulary], ids [1, tokens]; tokens - 1 targets."""
    return torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:].to(logits.device)).item()


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


def compute_dtype(dtype: str, source: Source, device: torch.device) -> torch.dtype:
    """The dtype of the forward pass that `dtype` names."""
    if dtype != "auto":
        return dtype_named(dtype)
    if device.type == "cpu":
        return torch.float32
    return getattr(torch, str(getattr(source.config, "dtype", None) or "float32").removeprefix("torch."))
