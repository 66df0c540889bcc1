"""One decoder block in hand: its matrices, the inputs that reach it, statistics of them, its outputs."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from budwood.calibration.activations import Activations
from budwood.calibration.listening import Heard, Listener
from budwood.errors import RunError
from budwood.models.linears import read, write

if TYPE_CHECKING:
    from budwood.calibration.stream import Model

S = TypeVar("S")


class Linear:
    """One prunable matrix: stored in its storage type, multiplied in the compute type, judged in float32."""

    def __init__(self, name: str, module: nn.Module, stored: Tensor):
        self.name, self.module = name, module
        self.stored = stored  # [out, in]
        self.recovered: int | None = None  # positions taken back, where a method counts them
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
        with Listener(modules, widths, statistic) as listener, torch.no_grad():
            for batch in self.activations.indices():
                listener.next_batch()
                try:
                    outputs = self.run(batch)
                    if batch == 0 and self._dense is None:
                        self._dense = outputs
                except Heard:
                    continue
        return listener.statistics()

    def run(self, batch: int) -> Tensor:
        """Outputs [batch, tokens, hidden] of the block as it is now, for one batch of the inputs that reach it."""
        assert self.activations is not None
        return self.forward(self.activations.read(batch, self.model.device))

    def forward(self, hidden: Tensor) -> Tensor:
        """The same for any hidden states [batch, tokens, hidden] of a shape that the batches have."""
        return self.model.rehearsal(hidden.shape[0], hidden.shape[1]).run(self.index, self.module, hidden)

    def propagate(self, first_batch_only: bool = False) -> None:
        """Makes the next block's inputs; measures the change of the first batch where its dense outputs are known."""
        if self.activations is None:
            return
        with torch.no_grad():
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


def all_finite(tensor: Tensor) -> bool:
    """No NaN and no infinity; both ends of the range tell, in one pass and without a mask as large as the tensor."""
    return bool(torch.stack(tensor.aminmax()).isfinite().all()) if tensor.numel() else True


def relative_error(outputs: Tensor, dense: Tensor) -> float:
    """Norm of the difference over the norm of the dense outputs."""
    return ((outputs.float() - dense.float()).norm() / dense.float().norm()).item()


def describe(linear: Linear) -> dict[str, Any]:
    """What became of one matrix, JSON-plain."""
    nonzeros = int(torch.count_nonzero(linear.stored))
    return {"shape": list(linear.shape), "nonzeros": nonzeros, "recovered": linear.recovered}
