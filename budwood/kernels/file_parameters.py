"""The parameters of a layer whose weight is in another layout: restored when they are read."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


class FileParameters(dict):
    """The `_parameters` of a layer in tiles. Reading a tensor of the file puts the layer back into the file's layout.

    So a state dict, `.to()`, offloading and adapters find ordinary parameters, and a change in place is a change of the
    weight. The bias can be read without that.
    """

    def __init__(self, suffixes: Sequence[str], bias: Parameter | None, restore: Callable[[], dict[str, Any]]):
        super().__init__({**dict.fromkeys(suffixes), "bias": bias})
        self.restore = restore
        self.bias = bias
        self.at_hand = [] if bias is None else [bias]  # the parameters that exist while the layer is in tiles

    def __getitem__(self, name: str) -> Any:
        return super().__getitem__(name) if name == "bias" else self.restore()[name]

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self[name]
        except KeyError:
            return default


def _of_the_restored(name: str) -> Callable[..., Any]:
    def method(self: FileParameters, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.restore(), name)(*args, **kwargs)

    return method


_READING = ("__iter__", "__eq__", "__or__", "__ror__", "keys", "values", "items", "copy")
_WRITING = ("__setitem__", "__delitem__", "__ior__", "pop", "popitem", "setdefault", "update", "clear")
for _name in (*_READING, *_WRITING):
    setattr(FileParameters, _name, _of_the_restored(_name))


def held_elsewhere(parameters: Mapping[str, Any], suffixes: Sequence[str], known: Sequence[Tensor]) -> bool:
    """Whether anyone but `parameters`, and the tensors `known`, could change one of these tensors in place."""
    for suffix in suffixes:
        own = 1 + sum(tensor.data_ptr() == parameters[suffix].data_ptr() for tensor in known)
        if sys.getrefcount(parameters[suffix]) > 2:  # the dictionary and the argument
            return True
        if parameters[suffix].is_shared() or _holders(parameters[suffix]) > own:
            return True
    return False


def _holders(tensor: Tensor) -> int:
    """The number of tensors that share the storage of this one, itself included."""
    storage = tensor.untyped_storage()  # holds it once more
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1
