"""What of a decoder block is removed together: KV groups with their query heads, and the neurons of an MLP.

Two or more linears with the same parent form a set: the last one, the consumer, reads what the others, its producers,
make. A unit is some columns of the consumer and the rows of each producer that feed them. Shapes do not tell how the
rows of fused producers are ordered, so there are candidates; in the right one, zeroing the rows of a unit makes exactly
its columns zero at the consumer's input.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from budwood.models.heads import head_size, set_heads
from budwood.models.linears import read
from budwood.models.reshape import fit_parameters
from budwood.sparsity.units import Units

EXPERT = re.compile(r"(?P<path>.*)\.(?P<part>\w+)\.(?P<expert>\d+)")  # a linear of unfused experts


def candidates(block: nn.Module, without: Iterable[str] = ()) -> dict[str, list[Units]]:
    """The possible units of every set of linears of a block, by consumer, attention first; works on the meta device.

    without: linears that belong to no set, such as routers. All candidates of a consumer have the same shapes.
    """
    sets: dict[tuple[str, str], list[str]] = {}
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and name not in set(without):
            sets.setdefault(_set_of(name, block), []).append(name)
    found: dict[str, list[Units]] = {}
    for (path, _), names in sets.items():
        if units := _candidates(block, path, names):
            found[units[0].consumer] = units
    kinds = ("attention", "mlp")
    return {
        consumer: options
        for kind in kinds
        for consumer, options in found.items()
        if options and options[0].kind == kind
    }


def fit_shapes(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """`fit_parameters`, with the numbers of heads that follow from the new shapes."""
    changed = fit_parameters(model, shapes)
    for path in dict.fromkeys(name.rpartition(".")[0].rpartition(".")[0] for name in changed):
        count_heads(model.get_submodule(path))
    return changed


def count_heads(attention: nn.Module) -> None:
    """Makes an attention module's numbers of heads those of its matrices; no effect on other modules."""
    names = [name for name, child in attention.named_children() if isinstance(child, nn.Linear | Conv1D)]
    size = head_size(attention)
    options = _candidates(attention, "", names) if size is not None else []
    if options:
        units = options[0]
        assert size is not None
        set_heads(attention, units.columns.numel() // size, len(units))


def _set_of(name: str, block: nn.Module) -> tuple[str, str]:
    """The module that holds the linear `name`, and which of its sets: the number of an expert, else nothing."""
    parent = name.rpartition(".")[0]
    match = EXPERT.fullmatch(name)
    if match and isinstance(block.get_submodule(parent), nn.ModuleList):
        return match["path"], match["expert"]
    return parent, ""


def _candidates(block: nn.Module, path: str, names: list[str]) -> list[Units]:
    """Possible units of linears that are children of the module `path`.

    The consumer is the last one, or, where the shapes forbid that, the nearest before it that they allow.
    """
    for consumer in reversed(names):
        producers = [name for name in names if name != consumer]
        if units := _fed_by(block, path, producers, consumer) if producers else []:
            return units
    return []


def _fed_by(block: nn.Module, path: str, producers: list[str], consumer: str) -> list[Units]:
    shapes = {name: tuple(read(block.get_submodule(name)).shape) for name in (*producers, consumer)}
    parent = block.get_submodule(path)
    width = shapes[consumer][1]
    size = head_size(parent)
    rows_of = {name: shapes[name][0] for name in producers}
    layouts = _mlp_rows(rows_of, width) if size is None else _attention_rows(rows_of, width, size)
    found = []
    for rows in layouts:
        count = len(next(iter(rows.values())))
        columns = torch.arange(width).view(count, -1)
        entries = _entries(parent, path, width // size, count) if size is not None else {}
        cost = columns.shape[1] * shapes[consumer][0] + sum(places.shape[1] for places in entries.values())
        for name, places in rows.items():
            bias = getattr(block.get_submodule(name), "bias", None) is not None
            cost += places.shape[1] * (shapes[name][1] + bias)
        found.append(Units("mlp" if size is None else "attention", consumer, columns, rows, entries, cost))
    return found


def _attention_rows(rows: Mapping[str, int], width: int, size: int) -> list[dict[str, Tensor]]:
    """Rows of every KV group, for possible layouts: separate producers; one that holds query, key and value."""
    heads = width // size
    if heads * size != width:
        return []
    if len(rows) > 1:
        groups = min(rows.values()) // size
        if not groups or heads % groups or any(count % (groups * size) for count in rows.values()):
            return []
        return [{name: _even(count, groups) for name, count in rows.items()}]
    ((name, count),) = rows.items()
    groups = (count - width) // (2 * size)
    if groups < 1 or heads % groups or (heads + 2 * groups) * size != count:
        return []
    part = groups * size  # rows of all keys, and of all values
    keys, values = (_even(part, groups) + width + start for start in (0, part))
    stacked = torch.cat([_even(width, groups), keys, values], dim=1)
    return [{name: stacked}, {name: _even(count, groups)}]


def _mlp_rows(rows: Mapping[str, int], width: int) -> list[dict[str, Tensor]]:
    """Rows of every neuron, for possible layouts: gate and up apart; both in one, stacked or interleaved."""
    if not width or any(count not in (width, 2 * width) for count in rows.values()):
        return []
    plain = {name: _even(count, width) for name, count in rows.items() if count == width}
    fused = [name for name, count in rows.items() if count != width]
    if not fused:
        return [plain]
    stacked = _even(2 * width, 2).T.contiguous()
    return [plain | dict.fromkeys(fused, places) for places in (stacked, _even(2 * width, width))]


def _entries(parent: nn.Module, path: str, heads: int, groups: int) -> dict[str, Tensor]:
    """Entries of every KV group in the parameters of an attention module that have one for each query head."""
    prefix = f"{path}." if path else ""
    return {
        prefix + name: _even(heads, groups)
        for name, parameter in parent.named_parameters(recurse=False)
        if tuple(parameter.shape) == (heads,)
    }


def _even(count: int, parts: int) -> Tensor:
    """0 ... count - 1 as [parts, count / parts]."""
    return torch.arange(count).view(parts, -1)
