"""From the tensors of a block to those of its shard: matrices in their format, leftover experts fused again."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from budwood.errors import UsageError
from budwood.formats import choose, pack_as
from budwood.models.experts import ExpertLinears, fused_state

Packed = dict[str, dict[str, Any]]  # by linear: {"format": name, "shape": [out, in]}


def pack(
    prefix: str, block: nn.Module, state: dict[str, Tensor], linears: Mapping[str, Tensor], layout: str
) -> tuple[dict[str, Tensor], Packed]:
    """The tensors of a shard, and what of it is packed how.

    prefix: full name of the block. state: all its tensors in storage type by full name, in module orientation.
    linears: the pruned matrices [out, in] by full name. layout: a format's name, or "auto" for the smallest.
    Raises UsageError when a named format cannot hold a matrix.
    """
    tensors = dict(state)
    packed: Packed = {}
    for name, weight in linears.items():
        chosen, parts = choose(weight) if layout == "auto" else (layout, _pack_named(name, layout, weight))
        if chosen == "dense":
            continue
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        packed[name] = {"format": chosen, "shape": list(weight.shape)}
    for path, module in block.named_modules(prefix=prefix):
        if isinstance(module, ExpertLinears) and not any(name.startswith(f"{path}.") for name in packed):
            own = {name: tensors.pop(name) for name in list(tensors) if name.startswith(f"{path}.")}
            fused = fused_state(module, {name.removeprefix(f"{path}."): tensor for name, tensor in own.items()})
            tensors |= {f"{path}.{name}": tensor for name, tensor in fused.items()}
    return tensors, packed


def _pack_named(name: str, layout: str, weight: Tensor) -> dict[str, Tensor]:
    try:
        return pack_as(layout, weight)
    except UsageError as error:
        raise UsageError(f"{name}: {error}; choose --format auto, or skip it with --skip '{name}'") from error
