"""An accelerator that computes on the CPU: its tensors say that they are on another device.

As on a GPU, operations on tensors of several devices fail, and such a tensor has no numpy array and no address.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
MOVES = {aten.copy_.default, aten._to_copy.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor}
NAME = torch.device("lazy", 0)  # which torch without a GPU can differentiate for


class Remote(torch.Tensor):
    """A tensor on the accelerator; `held` has its values."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "Remote":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=NAME,
            requires_grad=False,
        )
        made.held = held
        return made

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"Remote({self.held})"

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert lazy:0 device type tensor to numpy; use Tensor.cpu()")

    def data_ptr(self) -> int:
        raise RuntimeError("the address of a tensor on lazy:0 was asked for")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


class Accelerator(TorchDispatchMode):
    """In this context tensors can be made on lazy:0."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    remote = any(isinstance(tensor, Remote) for tensor in tensors)
    asked = kwargs.get("device")
    if func not in MOVES and remote:
        judged = [args[0], *args[2:]] if func in INDEXED else tensors
        strangers = [t for t in tree_leaves(judged) if isinstance(t, torch.Tensor) and not isinstance(t, Remote)]
        if func in INDEXED and not isinstance(args[0], Remote):
            raise RuntimeError(f"{func}: indices should be on the device of the indexed tensor (cpu)")
        if any(stranger.dim() and stranger.device.type != "meta" for stranger in strangers):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, found lazy:0 and cpu")
    if asked is not None:
        there = torch.device(asked).type == NAME.type
        kwargs = {**kwargs, "device": torch.device("cpu") if there else asked}
    else:
        there = isinstance(args[0], Remote) if func is aten.copy_.default else remote
    inner_args, inner_kwargs = tree_map(lambda leaf: leaf.held if isinstance(leaf, Remote) else leaf, (args, kwargs))
    if func is aten._to_copy.default and asked is not None:
        found = inner_args[0].to(**{k: v for k, v in inner_kwargs.items() if k in ("dtype",)}, copy=True)
        found = found if inner_kwargs["device"].type == "cpu" else func(*inner_args, **inner_kwargs)
    else:
        found = func(*inner_args, **inner_kwargs)
    if not there:
        return found
    wrapped = tree_map(lambda leaf: Remote(leaf) if isinstance(leaf, torch.Tensor) else leaf, found)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if remote else wrapped


@contextmanager
def accelerator() -> Iterator[str]:
    """In this context there is a device of this name."""
    before = torch.is_autocast_enabled, torch.autocast

    def autocast(device: str, **options: Any) -> Any:
        return nullcontext() if device == NAME.type else before[1](device, **options)

    torch.is_autocast_enabled = lambda device="cpu": device != NAME.type and before[0](device)
    torch.autocast = autocast  # type: ignore[assignment, misc]
    try:
        with Accelerator():
            yield str(NAME)
    finally:
        torch.is_autocast_enabled, torch.autocast = before  # type: ignore[misc]
