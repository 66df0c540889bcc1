"""Gradients of the loss of the dense model, one linear at a time: never those of the whole model at once.

Two ways with the same results. `accumulate` holds all weights and takes one window after the other.
`accumulate_by_block` holds one block and the inputs of every block for all windows, and goes through the blocks
backwards. Both compute each block twice forward and once backward. `gradients` chooses one.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from budwood.environment import memory
from budwood.errors import RunError
from budwood.models.linears import read
from budwood.progress import Progress
from budwood.stream.activations import Activations
from budwood.stream.arithmetic import name_of
from budwood.stream.model import Model

Fold = Callable[[str, Tensor], None]  # full name of a linear, its gradient [out, in] float32 for one batch of windows
Finished = Callable[[int], None]  # index of a block whose linears get no more gradients; its weights are still loaded

SCALE = 2.0**12  # of the loss in float16, where gradients below 6e-8 would be 0


class Sums:
    """A fold that adds gradients g up, by name of the linear.

    kinds: which sums, of "gradient" g, "magnitude" |g| and "square" g².
    """

    def __init__(self, *kinds: str):
        self.kinds = kinds
        self.sums: dict[str, dict[str, Tensor]] = {}

    def __call__(self, name: str, gradient: Tensor) -> None:
        sums = self.sums.setdefault(name, {})
        for kind in self.kinds:
            total = sums.get(kind)
            if total is None:
                total = sums[kind] = torch.zeros_like(gradient)
            if kind == "square":
                total.addcmul_(gradient, gradient)
            else:
                total.add_(gradient.abs() if kind == "magnitude" else gradient)

    def take(self, name: str, like: Tensor) -> dict[str, Tensor]:
        """The sums of one linear, which are then freed; zeros, shaped `like` its weight, where no token reached it."""
        found = self.sums.pop(name, None)
        return found or {kind: torch.zeros_like(like, dtype=torch.float32) for kind in self.kinds}


def gradients(
    model: Model,
    windows: Tensor,
    linears: Mapping[str, nn.Module],
    fold: Fold,
    finished: Finished | None = None,
    *,
    held: int = 4,
    batch: int = 1,
    progress: Progress | None = None,
) -> None:
    """By block, except where the inputs of all blocks take more than all weights do with what the fold holds, and the
    latter take at most half of the memory: then `accumulate`.

    held: bytes that the fold holds per weight of `linears` until their block is finished.
    """
    resident = model.structure.parameters * model.compute.itemsize
    resident += held * sum(read(module).numel() for module in linears.values())
    inputs = len(model) * windows.numel() * _width(model) * model.compute.itemsize
    fits = resident <= memory_of(model.device) / 2
    way = accumulate if fits and resident < inputs else accumulate_by_block
    way(model, windows, linears, fold, finished, batch=batch, progress=progress)


def _width(model: Model) -> int:
    """Of the hidden states."""
    embedding = model.module.get_output_embeddings()
    return read(embedding).shape[1]


def memory_of(device: torch.device) -> int:
    """Bytes of memory of a device; 0 where the system does not tell."""
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else memory() or 0


def accumulate(
    model: Model,
    windows: Tensor,
    linears: Mapping[str, nn.Module],
    fold: Fold,
    finished: Finished | None = None,
    *,
    batch: int = 1,
    progress: Progress | None = None,
) -> None:
    """Hands the gradient of every linear to `fold`, for one batch of windows after the other, all weights in memory.

    windows: token ids [windows, tokens]. linears: by full name, of any blocks. The loss is the mean cross-entropy of
    the next token over the windows of a batch and all positions but the last. Blocks are recomputed in the backward
    pass; a gradient is freed once it is folded. A linear that no token reaches is not folded.
    Raises RunError where a loss is not finite.
    """
    progress = progress or model.progress
    inputs = model.embed(windows, batch)
    first = first_block(model, linears)
    progress.start(len(inputs), "batches of gradients")
    try:
        with model.resident(), torch.enable_grad(), folding(linears, fold, scale_of(model)):
            for index in inputs.indices():
                begun = time.perf_counter()
                ids = windows[inputs.span(index)].to(model.device)
                hidden = inputs.read(index, model.device)
                for place in range(len(model)):
                    if place < first:  # nothing below it needs a gradient
                        with torch.no_grad():
                            hidden = run_block(model, place, hidden)
                    else:
                        hidden = checkpoint(run_block, model, place, hidden, use_reentrant=False)
                loss_of(model, hidden, ids).backward()
                progress.block(index, f"batch {index}", time.perf_counter() - begun)
            for place in range(first, len(model)):
                if finished is not None:
                    finished(place)
    finally:
        progress.finish()


def accumulate_by_block(
    model: Model,
    windows: Tensor,
    linears: Mapping[str, nn.Module],
    fold: Fold,
    finished: Finished | None = None,
    *,
    batch: int = 1,
    progress: Progress | None = None,
) -> None:
    """`accumulate` with one block in memory at a time, last block first; `fold` gets all batches of a block in turn.

    The inputs of all blocks are kept: [windows, tokens, hidden] each, in files beyond the model's limit for
    activations.
    """
    progress = progress or model.progress
    first = first_block(model, linears)
    inputs: dict[int, Activations] = {}
    for block in model.survey(windows, "inputs of the dense blocks", batch):
        if block.index >= first:
            assert block.activations is not None
            inputs[block.index] = copied(model, block.activations)
    outputs = model.activations
    assert outputs is not None
    upstream = blank(model, outputs, torch.float32)  # gradients of the loss by the outputs of the block at hand
    with model.outside(), torch.enable_grad():
        for index in outputs.indices():
            hidden = outputs.read(index, model.device).requires_grad_()
            loss_of(model, hidden, windows[outputs.span(index)].to(model.device)).backward()
            assert hidden.grad is not None
            upstream.write(index, hidden.grad)
    model.activations = outputs = None
    progress.start(len(model) - first, "gradients of blocks")
    try:
        for place in reversed(range(first, len(model))):
            begun = time.perf_counter()
            own = {name: module for name, module in linears.items() if block_of(model, name) == place}
            held = inputs.pop(place)
            with model.loaded(place), torch.enable_grad(), folding(own, fold, scale_of(model)):
                for index in held.indices():
                    hidden = held.read(index, model.device).requires_grad_()
                    result = run_block(model, place, hidden)
                    result.backward(upstream.read(index, model.device).to(result.dtype))
                    assert hidden.grad is not None
                    upstream.write(index, hidden.grad)
                if finished is not None:
                    finished(place)
            progress.block(place, f"{model.path}.{place}", time.perf_counter() - begun)
    finally:
        progress.finish()


@contextmanager
def folding(linears: Mapping[str, nn.Module], fold: Fold, scale: float) -> Iterator[None]:
    """In this context weights require gradients, and each gradient, divided by `scale`, goes to `fold` and is freed."""

    def hook(name: str, module: nn.Module) -> Callable[[Tensor], None]:
        def folded(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            gradient = read(module, gradient).float()
            fold(name, gradient if scale == 1 else gradient / scale)

        return folded

    weights = {name: module.get_parameter("weight") for name, module in linears.items()}
    before = {name: weight.requires_grad for name, weight in weights.items()}
    handles = []
    try:
        for name, weight in weights.items():
            weight.requires_grad_(True)
            handles.append(weight.register_post_accumulate_grad_hook(hook(name, linears[name])))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, weight in weights.items():
            weight.requires_grad_(before[name])
            weight.grad = None


def run_block(model: Model, index: int, hidden: Tensor) -> Tensor:
    """[batch, tokens, hidden] -> the same, by a loaded block."""
    return model.calls(hidden.shape[0], hidden.shape[1]).run(index, model.modules[index], hidden)


def loss_of(model: Model, hidden: Tensor, ids: Tensor) -> Tensor:
    """The mean loss of the next token, times `scale_of`, from the outputs of the last block; needs `model.outside`."""
    logits = model.logits(hidden)[:, :-1].float()
    loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    if not loss.isfinite():
        raise RunError(
            f"the loss of a calibration window is {loss.item()} in {name_of(model.compute)}, so it has no gradients; "
            "compute in float32 (--compute-dtype), or check the checkpoint"
        )
    return loss * scale_of(model)


def scale_of(model: Model) -> float:
    return SCALE if model.compute == torch.float16 else 1.0


def block_of(model: Model, linear: str) -> int:
    """The index of the block that a linear belongs to, from its full name."""
    return int(linear.removeprefix(f"{model.path}.").split(".", 1)[0])


def first_block(model: Model, linears: Mapping[str, nn.Module]) -> int:
    return min((block_of(model, name) for name in linears), default=len(model))


def blank(model: Model, like: Activations, dtype: torch.dtype) -> Activations:
    """Activations of the same shape; all blocks together keep to the model's limit."""
    limit = model.activation_limit // (len(model) + 1)
    return Activations(like.shape, dtype, like.batch, limit, model.scratch)


def copied(model: Model, states: Activations) -> Activations:
    copy = blank(model, states, states.hidden.dtype)
    copy.hidden.copy_(states.hidden)
    return copy
