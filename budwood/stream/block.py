"""One decoder block in hand: its matrices, the inputs that reach it, statistics of them, its outputs."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from budwood.checkpoints.packing import Stored, store_named
from budwood.errors import RunError
from budwood.formats import FORMATS, pack_as, rounds
from budwood.kernels.native import AS_SPARSE
from budwood.kernels.native_matrix import prepare
from budwood.models.linears import read, write
from budwood.stream.activations import Activations
from budwood.stream.collector import Collector, StopForward

if TYPE_CHECKING:
    from budwood.stream.model import Model

S = TypeVar("S")


class Linear:
    """One prunable matrix: stored in its storage type, multiplied in the compute type, judged in float32."""

    def __init__(self, name: str, module: nn.Module, stored: Tensor):
        self.name, self.module = name, module
        self.stored = stored  # [out, in]
        self.recovered: int | None = None  # positions taken back, where a method counts them
        self.rounded: Stored | None = None  # the tensors of the folder, once `round` has made them
        self.rounding_error: float | None = None  # of the pruned weight, relative in the norm
        if not all_finite(stored):
            raise RunError(
                f"{name} holds NaN or infinite weights; mend the checkpoint, or skip it with --skip '{name}'"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.stored.shape[0], self.stored.shape[1]

    @property
    def weight(self) -> Tensor:
        """[out, in] float32."""
        return self.stored.float()

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self.stored = value.to(self.stored.dtype)
        if not all_finite(self.stored):
            raise RunError(f"{self.name}: the new weights do not fit {self.stored.dtype}; choose another --dtype")
        write(self.module, self.stored)

    def round(self, layout: str) -> None:
        """The weight becomes the one that a layout with rounded values will give back."""
        format, tensors = store_named(self.name, self.stored, layout)
        rounded = FORMATS[format].unpack(tensors, self.shape)
        self.rounded, self.rounding_error = (format, tensors), relative_error(rounded, self.stored)
        self.weight = rounded  # last: the linear may share the memory of what is stored


class Block:
    """One decoder block, filled, with the calibration inputs that reach it."""

    def __init__(self, model: "Model", index: int, stored: dict[str, Tensor], activations: Activations | None):
        self.model, self.index, self.activations = model, index, activations
        self.name = f"{model.path}.{index}"
        self.module = model.modules[index]
        self.stored = stored  # all tensors in storage type, by full name
        self.linears: dict[str, Linear] = {}
        for full_name, module in model.linears.items():
            if full_name.startswith(f"{self.name}."):
                linear = Linear(full_name, module, read(module, stored[f"{full_name}.weight"]))
                self.linears[full_name.removeprefix(f"{self.name}.")] = linear
        self.relative_error: float | None = None
        self._dense: Tensor | None = None  # outputs of the first batch before anything was changed

    def collect(self, statistic: Callable[[int], S]) -> dict[str, S]:
        """One pass over the calibration batches with the block as it is: a statistic of each linear's inputs.

        Linears that share an input share one statistic object. Raises RunError where there are no batches.
        """
        if self.activations is None:
            raise RunError(f"{self.name}: statistics were asked for, but there are no calibration windows")
        modules = {name: linear.module for name, linear in self.linears.items()}
        widths = {name: linear.shape[1] for name, linear in self.linears.items()}
        with Collector(modules, widths, statistic) as collector, torch.no_grad():
            for batch in self.activations.indices():
                collector.next_batch()
                try:
                    outputs = self.run(batch)
                    if batch == 0 and self._dense is None:
                        self._dense = outputs
                except StopForward:
                    continue
        return collector.statistics()

    def run(self, batch: int) -> Tensor:
        """Outputs [batch, tokens, hidden] of the block as it is now, for one batch of the inputs that reach it."""
        assert self.activations is not None
        return self.forward(self.activations.read(batch, self.model.device))

    def forward(self, hidden: Tensor) -> Tensor:
        """The same for any hidden states [batch, tokens, hidden] of a shape that the batches have."""
        return self.model.calls(hidden.shape[0], hidden.shape[1]).run(self.index, self.module, hidden)

    def round(self, layout: str) -> None:
        """Before anything runs on: the matrices as the folder will hold them, where its layout rounds values."""
        if rounds(layout):
            for linear in self.linears.values():
                linear.round(layout)

    def propagate(self, first_batch_only: bool = False) -> None:
        """Makes the next block's inputs; measures the change of the first batch where its dense outputs are known."""
        if self.activations is None:
            return
        with torch.no_grad(), multiplied(self.linears.values() if self.model.arithmetic.sparse_products else ()):
            for batch in [0] if first_batch_only else self.activations.indices():
                outputs = self.run(batch)
                if batch == 0 and self._dense is not None:
                    self.relative_error = relative_error(outputs, self._dense)
                    self._dense = None
                if not all_finite(outputs):
                    raise RunError(
                        f"the outputs of {self.name} hold NaN or infinite values; try --compute-dtype float32"
                    )
                self.activations.write(batch, outputs)

    def state(self) -> dict[str, Tensor]:
        """All tensors of the block in storage type and module orientation, by full name."""
        changed = {f"{linear.name}.weight": read(linear.module, linear.stored) for linear in self.linears.values()}
        return self.stored | changed


@contextmanager
def multiplied(linears: Iterable[Linear]) -> Iterator[None]:
    """Inside, pruned matrices are multiplied without what is zero in them, where a native kernel can."""
    replaced: list[nn.Module] = []
    try:
        for linear in linears:
            weight = getattr(linear.module, "weight", None)
            if type(linear.module) is nn.Linear and isinstance(weight, Tensor):
                kernel = prepare("bitmask", linear.shape, pack_as("bitmask", weight.detach()))
                if kernel is not None:
                    product = partial(kernel.linear, bias=linear.module.bias, way=AS_SPARSE)
                    linear.module.forward = product  # type: ignore[method-assign, assignment]
                    replaced.append(linear.module)
        yield
    finally:
        for module in replaced:
            del module.forward  # the class has its own


def all_finite(tensor: Tensor) -> bool:
    """No NaN and no infinity; both ends of the range tell, in one pass and without a mask as large as the tensor."""
    return bool(torch.stack(tensor.aminmax()).isfinite().all()) if tensor.numel() else True


def relative_error(changed: Tensor, before: Tensor) -> float:
    """Norm of the difference over the norm before; 0 where nothing changed."""
    difference = (changed.float() - before.float()).norm()
    return (difference / before.float().norm()).item() if difference else 0.0


def describe(linear: Linear) -> dict[str, Any]:
    """What became of one matrix, JSON-plain."""
    nonzeros = int(torch.count_nonzero(linear.stored))
    return {
        "shape": list(linear.shape),
        "nonzeros": nonzeros,
        "recovered": linear.recovered,
        "rounding_error": linear.rounding_error,
    }
