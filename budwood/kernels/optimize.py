"""A loaded model made ready for the native kernels, once, and where they cannot run left as it is."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from budwood.kernels import dispatch, native
from budwood.kernels.arena import Arena, file_mappings, forget, needed
from budwood.kernels.head import accelerate_head
from budwood.kernels.linear import SparseLinear
from budwood.kernels.shared_input import link_shared_inputs

SMALL = 1 << 18  # weights below which a matrix says nothing about speed
LARGE = 1 << 22  # and above which it need not be


def ready(model: nn.Module) -> dict[str, str]:
    """Move packed weights into one arena, in formats the kernels read; returns name -> format of what was changed."""
    if native.library() is None:
        return {}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    here = {name: layer for name, layer in layers.items() if resident(layer)}
    before = {name: layer.format for name, layer in here.items()}
    for layer in here.values():
        layer.settle()
    arena = Arena(sum(needed(tensor) for layer in here.values() for tensor in layer.packed().values()))
    files = file_mappings()
    for layer in here.values():
        unsettled = layer.packed().values()
        layer.settle(arena)
        forget(unsettled, files)
        layer.kernel()  # now and not at the first token
    link_shared_inputs(here.items())
    accelerate_head(model)
    sizes = {layer.in_features * layer.out_features: layer for layer in here.values()}
    telling = sorted(size for size in sizes if size >= SMALL)
    if telling:
        largest = max((size for size in telling if size <= LARGE), default=telling[0])
        measure(sizes[largest], next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32))
    return {name: layer.format for name, layer in here.items() if layer.format != before[name]}


def resident(layer: SparseLinear) -> bool:
    """Whether all of a layer is in main memory, not offloaded or on a device."""
    return all(tensor.device.type == "cpu" for tensor in layer.packed().values())


def measure(layer: SparseLinear, dtype: torch.dtype) -> None:
    """Measure the ways on this layer, for activations of this type."""

    def unpacked(x: Tensor) -> Tensor:
        return F.linear(x, layer.unpack().to(dtype))

    kernel = layer.kernel()
    if kernel is not None and dtype.is_floating_point:
        with torch.no_grad():
            dispatch.measure(kernel, unpacked, dtype)


def ways_here(width: int = 1024) -> dict[str, str]:
    """What wins on this machine for a matrix `[width, width]` pruned to half, by type: for people, in words."""
    weight = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
    weight[torch.rand(width, width, generator=torch.Generator().manual_seed(1)) < 0.5] = 0
    for dtype in (torch.bfloat16, torch.float32):
        measure(SparseLinear.from_dense(weight.to(dtype), format="bitmask"), dtype)
    return {
        str(dtype).removeprefix("torch."): ", ".join(
            f"{rows} rows: {dispatch.NAMES[choice.way]}" for rows, choice in found.items()
        )
        for (dtype, _), found in dispatch.measured.items()
    }
