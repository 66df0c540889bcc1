"""The dense weight of a packed layer, to read only."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


class UnpackedWeight(Tensor):
    """The weight of a `SparseLinear`, unpacked: a tensor that can be read, and raises `RuntimeError` when written to.

    A change would only reach this copy: merging an adapter by `linear.weight.data += delta` would silently do nothing.
    """

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        raise RuntimeError(READ_ONLY)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        writes = name in _WRITING or (name.endswith("_") and not name.startswith("__"))
        target = args[0] if args else (kwargs or {}).get("tensor")  # torch.nn.init passes it by name
        if writes and isinstance(target, cls):
            raise RuntimeError(READ_ONLY)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


_WRITING = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__idiv__", "__itruediv__"}
READ_ONLY = (
    "the weight of a SparseLinear is unpacked at every access and a change to it would be lost; "
    "call dequantize() on the layer first and change the weight of the nn.Linear it returns"
)
