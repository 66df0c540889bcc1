"""Cutting units out of a decoder block, and the proof that the smaller block computes what the masked one does."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from budwood.models.linears import read, resize
from budwood.models.reshape import note_sizes, replace
from budwood.models.units import count_heads
from budwood.sparsity.units import Units, close, places, removed

Run = Callable[[], Tensor]


def verify(block: nn.Module, options: Mapping[str, list[Units]], run: Run) -> tuple[dict[str, Units], dict[str, str]]:
    """The right candidate of every consumer, and for consumers without one the reason; by running the block.

    run: a forward pass of the block on some tokens, which returns its outputs. Experts that get none of these tokens
    take the layout of the others. Attention is also sliced for a trial: what depends on the number of a head shows.
    """
    right: dict[str, Units] = {}
    refused: dict[str, str] = {}
    for kind in ("attention", "mlp"):
        mine = {name: units for name, units in options.items() if units[0].kind == kind}
        expected, _ = consumer_inputs(block, mine, run)
        layouts: set[int] = set()
        for layout in range(max((len(units) for units in mine.values()), default=0)):
            tried = {
                name: units[layout]
                for name, units in mine.items()
                if name not in right and name in expected and layout < len(units)
            }
            kept = {name: half(units) for name, units in tried.items()}
            with masked(block, tried, kept):
                found, _ = consumer_inputs(block, tried, run)
            for name, units in tried.items():
                if name in found and _feeds(units, kept[name], expected[name], found[name]):
                    right[name] = units
                    layouts.add(layout)
        for name, options_of in mine.items():
            if name not in expected and len(layouts) == 1 and max(layouts) < len(options_of):
                right[name] = options_of[max(layouts)]
            elif name not in right:
                refused[name] = "what it reads from one of its units depends on others"
    for name, units in list(right.items()):
        if units.kind == "attention" and len(units) > 1:
            with restored(block):
                if same_when_sliced(block, {name: units}, {name: half(units)}, run):
                    refused[name] = "its heads compute something else once others are gone"
                    del right[name]
    return {name: right[name] for name in options if name in right}, refused


def half(units: Units) -> Tensor:
    """Every second unit."""
    return torch.arange(0, len(units), 2)


@contextmanager
def restored(block: nn.Module) -> Iterator[None]:
    """After this context the parameters of a block are those of before, also where they were replaced."""
    before = [(owner, dict(owner._parameters)) for owner in block.modules()]
    try:
        yield
    finally:
        put_back(before)


def put_back(before: list[tuple[nn.Module, dict[str, Any]]]) -> None:
    """Gives modules their former parameters, and the sizes and numbers of heads that follow from these."""
    for owner, parameters in before:
        owner._parameters.clear()
        owner._parameters.update(parameters)
        if parameters.get("weight") is not None:
            note_sizes(owner)
    for owner, _ in before:
        count_heads(owner)


@contextmanager
def masked(block: nn.Module, units: Mapping[str, Units], kept: Mapping[str, Tensor]) -> Iterator[None]:
    """In this context the rows of producers that feed other units than the kept ones are zero, biases included."""
    before: list[tuple[Tensor, Tensor]] = []
    try:
        for name, each in units.items():
            gone = removed(len(each), kept[name])
            for producer, rows in each.rows.items():
                module = block.get_submodule(producer)
                for tensor in (read(module), getattr(module, "bias", None)):
                    if tensor is not None:
                        before.append((tensor.detach(), tensor.detach().clone()))
                        tensor.detach()[places(rows, gone)] = 0
        yield
    finally:
        for tensor, values in before:
            tensor.copy_(values)


def slice_units(block: nn.Module, units: Units, kept: Tensor) -> None:
    """Cuts all units but these out of the modules of a block, and corrects the numbers of heads."""
    for producer, rows in units.rows.items():
        module, staying = block.get_submodule(producer), places(rows, kept)
        resize(module, read(module).detach()[staying])
        bias = getattr(module, "bias", None)
        if bias is not None:
            replace(module, "bias", bias.detach()[staying], bias.requires_grad)
    consumer = block.get_submodule(units.consumer)
    resize(consumer, read(consumer).detach()[:, places(units.columns, kept)])
    path = units.consumer.rpartition(".")[0]
    for name, entries in units.entries.items():
        parameter = block.get_parameter(name)
        replace(block.get_submodule(path), name.rpartition(".")[2], parameter.detach()[places(entries, kept)], False)
    if units.kind == "attention":
        count_heads(block.get_submodule(path))


def same_when_sliced(block: nn.Module, units: Mapping[str, Units], kept: Mapping[str, Tensor], run: Run) -> list[str]:
    """Slices a block, and returns the consumers at which it then differs from the block with these units masked.

    run: a forward pass of the block on some tokens, which returns its outputs.
    """
    with masked(block, units, kept):
        expected, before = consumer_inputs(block, units, run)
    for name, each in units.items():
        slice_units(block, each, kept[name])
    try:
        found, after = consumer_inputs(block, units, run)
    except RuntimeError:  # sizes that do not fit one another
        return list(units)
    wrong = [
        name
        for name, each in units.items()
        if name in expected and not close(found[name], expected[name][..., places(each.columns, kept[name])])
    ]
    return wrong if wrong or close(after, before) else list(units)


def consumer_inputs(block: nn.Module, consumers: Iterable[str], run: Run) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs [..., in] of these linears in one run, and its outputs; linears that are not called are missing."""
    inputs: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args: inputs.__setitem__(name, args[0].detach().clone())

    hooks = [block.get_submodule(name).register_forward_pre_hook(hook(name)) for name in consumers]
    try:
        with torch.no_grad():
            outputs = run()
    finally:
        for each in hooks:
            each.remove()
    return inputs, outputs


def _feeds(units: Units, kept: Tensor, expected: Tensor, found: Tensor) -> bool:
    """Whether in `found` the columns of the removed units are zero and all others are as in `expected`."""
    gone = places(units.columns, removed(len(units), kept))
    stay = places(units.columns, kept)
    return not found[..., gone].any() and close(found[..., stay], expected[..., stay])
