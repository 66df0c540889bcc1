"""Prepares a loaded model for the native kernels; leaves it unchanged where they cannot run."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from budwood.kernels import dispatch, native, tiles
from budwood.kernels.arena import Arena, file_mappings, mapped, release_file_pages
from budwood.kernels.head import accelerate_head
from budwood.kernels.linear import SparseLinear
from budwood.kernels.norm import accelerate_norms
from budwood.kernels.shared_input import observe_inputs

SMALL = 1 << 18  # weights: smaller matrices are too small to time
LARGE = 1 << 22  # larger ones are not timed if there is a smaller one


def optimize(model: nn.Module) -> dict[str, str]:
    """Move packed weights into one arena, in formats that the kernels read; returns name -> format where it changed."""
    if native.library() is None:
        return {}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    resident = {name: layer for name, layer in layers.items() if in_memory(layer)}
    before = {name: layer.format for name, layer in resident.items()}
    for layer in resident.values():
        layer.to_native_format()
    size = sum(tiles.room(layer.format, layer.packed().values()) for layer in resident.values())
    arena = Arena(size)  # pages that stay unused take no memory
    files, read = file_mappings(), []  # read: keeps the file mapped
    for layer in resident.values():
        copied = layer.packed().values()
        layer.to_native_format(arena)
        release_file_pages(copied, files)
        read += mapped(copied, files)
        layer.native_matrix()  # now and not at the first token
    release_file_pages(read, files)  # once more: a read brings pages around it too
    observe_inputs(resident.items())
    accelerate_head(model)
    accelerate_norms(model)
    sizes = {layer.in_features * layer.out_features: layer for layer in resident.values()}
    large_enough = sorted(size for size in sizes if size >= SMALL)
    if large_enough:
        largest = max((size for size in large_enough if size <= LARGE), default=large_enough[0])
        measure(sizes[largest], next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32))
        native.release()  # what products of many rows have taken
    return {name: layer.format for name, layer in resident.items() if layer.format != before[name]}


def in_memory(layer: SparseLinear) -> bool:
    """Whether all of a layer is in main memory, not offloaded or on a device."""
    return all(tensor.device.type == "cpu" for tensor in layer.packed().values())


def measure(layer: SparseLinear, dtype: torch.dtype) -> None:
    """Time the kernels on this layer, for activations of this dtype."""

    def unpacked(x: Tensor) -> Tensor:
        return F.linear(x, layer.unpack().to(dtype))

    matrix = layer.native_matrix()
    if matrix is not None and dtype.is_floating_point:
        with torch.no_grad():
            dispatch.measure(matrix, unpacked, dtype)


def fastest_kernels(width: int = 1024) -> dict[str, str]:
    """The fastest kernels on this machine for a matrix `[width, width]` pruned to 50 %: dtype -> a line to print."""
    weight = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
    weight[torch.rand(width, width, generator=torch.Generator().manual_seed(1)) < 0.5] = 0
    for dtype in (torch.bfloat16, torch.float32):
        layer = SparseLinear.from_dense(weight.to(dtype), format="bitmask")
        layer.to_native_format(Arena(tiles.room(layer.format, layer.packed().values())))  # as a loaded layer
        measure(layer, dtype)
    return {
        str(dtype).removeprefix("torch."): ", ".join(
            f"{rows} rows: {dispatch.NAMES[choice.kernel]}" for rows, choice in found.items()
        )
        for (dtype, *_), found in dispatch.measured.items()
    }
