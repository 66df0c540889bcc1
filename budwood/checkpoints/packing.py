"""From the tensors of a block to those of its shard: matrices in their format, unpacked experts fused again."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from budwood.errors import UsageError
from budwood.formats import store
from budwood.models.experts import ExpertLinears, fused_state

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
    are in their format already. reshaped: names of tensors whose shape changed or that were added; experts among them
    stay apart.
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
        apart = any(name.startswith(f"{path}.") for name in (*packed, *reshaped))
        if isinstance(module, ExpertLinears) and not apart:
            own = {name: tensors.pop(name) for name in list(tensors) if name.startswith(f"{path}.")}
            fused = fused_state(module, {name.removeprefix(f"{path}."): tensor for name, tensor in own.items()})
            tensors |= {f"{path}.{name}": tensor for name, tensor in fused.items()}
    return tensors, packed


def pack_named(name: str, weight: Tensor, layout: str) -> PackedTensors:
    """The matrix [out, in] of the linear `name` as the layout keeps it; raises UsageError when it cannot."""
    try:
        return store(weight, layout)
    except UsageError as error:
        raise UsageError(f"{name}: {error}; choose --format auto, or skip it with --skip '{name}'") from error
