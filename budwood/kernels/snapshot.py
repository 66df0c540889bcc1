"""Whether tensors are still those, unchanged, that something was prepared from."""

from collections.abc import Iterable

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class Snapshot:
    """The addresses and versions of some tensors, which grow with every change in place, and their memory.

    An address alone says little, since memory is reused. A change through `.data` or through NumPy has no version, for
    autograd neither, and is not seen; one of an inference tensor neither, so for those no snapshot is valid.
    """

    def __init__(self, tensors: Iterable[Tensor]):
        tensors = list(tensors)
        self.key = key_of(tensors)
        self._storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]

    def of(self, tensors: Iterable[Tensor]) -> bool:
        """Whether these are the tensors of the snapshot, and unchanged."""
        return self.key is not None and key_of(tensors) == self.key and self.alive()

    def alive(self) -> bool:
        """Whether the memory of all of them still exists."""
        return not any(storage.expired() for storage in self._storages)


def key_of(tensors: Iterable[Tensor]) -> list[int] | None:
    """The address and version of each; None where one is an inference tensor."""
    try:
        return [number for tensor in tensors for number in (tensor.data_ptr(), tensor._version)]
    except RuntimeError:  # inference tensors have no version
        return None
