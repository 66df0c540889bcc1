"""From the tensors of a block to those of its shard: matrices in their format, unpacked experts fused again."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from budwood.errors import UsageError
from budwood.formats import store
from budwood.models.experts import ExpertLinears, can_be_fused, fused_state, split_fused

PackedEntries = dict[str, dict[str, Any]]  # by linear: {"format": name, "shape": [out, in]}
PackedTensors = tuple[str, dict[str, Tensor]]  # one matrix: its format, the tensors by suffix


def pack(
    prefix: str,
    block: nn.Module,
    state: Mapping[str, Tensor],
    linears: Mapping[str, Tensor],
    layout: str,
    rounded: Mapping[str, PackedTensors],
    reshaped: Collection[str] = (),
) -> tuple[dict[str, Tensor], PackedEntries]:
    """The tensors of a shard, and what of it is packed how.

    prefix: full name of the block. state: all its tensors in storage dtype by full name, as the modules store them.
    linears: the pruned matrices [out, in] by full name. layout: how to store them; see `formats`. rounded: those that
    are in their format already. reshaped: names of tensors whose shape changed or that were added; experts of
    different shapes stay apart.
    Raises UsageError when a named format cannot hold a matrix.
    """
    tensors = dict(state)
    packed: PackedEntries = {}
    for name, weight in linears.items():
        format, parts = rounded[name] if name in rounded else pack_named(name, weight, layout)
        if format == "dense":
            continue
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        packed[name] = {"format": format, "shape": list(weight.shape)}
    for path, module in block.named_modules(prefix=prefix):
        inside = f"{path}."
        if not isinstance(module, ExpertLinears) or any(name.startswith(inside) for name in packed):
            continue
        own = {name.removeprefix(inside): tensor for name, tensor in tensors.items() if name.startswith(inside)}
        if not any(name.startswith(inside) for name in reshaped) or can_be_fused(module, own):
            for name in own:
                del tensors[inside + name]
            tensors |= {inside + name: tensor for name, tensor in fused_state(module, own).items()}
    return tensors, packed


def shapes_fused(shapes: Mapping[str, list[int]], tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Shapes by parameter, those of plain linears of experts as shapes of the fused tensors that hold them."""
    shapes = dict(shapes)
    for name, tensor in tensors.items():
        parts = split_fused(name, tensor).keys()
        if name not in parts and parts & shapes.keys():
            shapes = {part: shape for part, shape in shapes.items() if part not in parts} | {name: list(tensor.shape)}
    return shapes


def pack_named(name: str, weight: Tensor, layout: str) -> PackedTensors:
    """The matrix [out, in] of the linear `name` as the layout keeps it; raises UsageError when it cannot."""
    try:
        return store(weight, layout)
    except UsageError as error:
        raise UsageError(f"{name}: {error}; choose --format auto, or skip it with --skip '{name}'") from error
