"""One decoder block with its weights loaded: matrices, calibration inputs, statistics of them, outputs."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from budwood.checkpoints.packing import PackedTensors, pack_named
from budwood.errors import RunError
from budwood.formats import FORMATS, pack_as, rounds
from budwood.kernels.native import SPARSE
from budwood.kernels.native_matrix import native_matrix
from budwood.models.block_calls import BlockCalls
from budwood.models.linears import read, resize, write
from budwood.stream.activations import Activations
from budwood.stream.arithmetic import Arithmetic, name_of
from budwood.stream.collector import Collector, Several, StopForward

S = TypeVar("S")
Kind = Callable[[int], Any]  # of statistic, made for a width


class Linear:
    """One prunable matrix: stored in the storage dtype, multiplied in the compute dtype, scored in float32."""

    def __init__(self, name: str, module: nn.Module, stored: Tensor):
        self.name, self.module = name, module  # in full, "model.layers.7.self_attn.q_proj"
        self.stored = stored  # [out, in], storage dtype
        self.recovered: int | None = None  # positions beyond the base pattern, set by methods that recover
        self.rounded: PackedTensors | None = None  # the packed tensors, where `round` has made them
        self.rounding_error: float | None = None  # of the pruned weight, relative in the norm
        if not all_finite(stored):
            raise RunError(
                f"{name} holds NaN or infinite weights; repair the checkpoint, or skip it with --skip '{name}'"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.stored.shape[0], self.stored.shape[1]

    @property
    def weight(self) -> Tensor:
        """[out, in] float32. In float32 storage it shares its memory with the linear: clone it to keep it."""
        return self.stored.float()

    @weight.setter
    def weight(self, value: Tensor) -> None:
        """Rounded to the storage dtype. A new shape resizes the module. Raises RunError for NaN and overflow."""
        self.stored = value.to(self.stored.dtype)
        if not all_finite(self.stored):
            raise RunError(f"{self.name}: the new weights do not fit {self.stored.dtype}; choose another --dtype")
        if read(self.module).shape == self.stored.shape:
            write(self.module, self.stored)
        else:
            resize(self.module, self.stored)

    @property
    def bias(self) -> Tensor | None:
        """[out] float32."""
        bias = getattr(self.module, "bias", None)
        return None if bias is None else bias.detach().float()

    @bias.setter
    def bias(self, value: Tensor) -> None:
        """Rounded to the storage dtype; added where the linear has none."""
        held = read(self.module)
        bias = value.to(self.stored.dtype).to(held.device, held.dtype)
        if bias.shape != (held.shape[0],):
            raise ValueError(f"{self.name}: a bias of {tuple(bias.shape)} does not fit {held.shape[0]} outputs")
        if not all_finite(bias):
            raise RunError(f"{self.name}: the new bias does not fit {self.stored.dtype}; choose another --dtype")
        self.module.register_parameter("bias", nn.Parameter(bias, requires_grad=held.requires_grad))

    def round(self, layout: str) -> None:
        """Replaces the weight by the one that a layout with rounded values unpacks to."""
        format, tensors = pack_named(self.name, self.stored, layout)
        rounded = FORMATS[format].unpack(tensors, self.shape)
        self.rounded, self.rounding_error = (format, tensors), relative_error(rounded, self.stored)
        self.weight = rounded  # last: the linear may share the memory of what is stored


class Block:
    """One decoder block with the calibration inputs that reach it.

    A method may set weights and biases of `linears`, and change, resize or add any parameter of `module`: all of it is
    written. Statistics come from `collect`; several of them in one pass inside `sharing`.
    """

    def __init__(
        self,
        *,
        index: int,
        name: str,
        module: nn.Module,
        linears: Mapping[str, nn.Module],
        stored: Mapping[str, Tensor],
        activations: Activations | None,
        calls: Callable[[int, int], BlockCalls],
        arithmetic: Arithmetic,
        device: torch.device,
    ):
        """linears: the matrices in scope by full name. stored: all tensors of the block in storage dtype by full name.

        calls: how the model calls its blocks for a batch of [windows, tokens].
        """
        self.index, self.name, self.module = index, name, module
        self.stored, self.activations = stored, activations
        self.arithmetic, self.device = arithmetic, device
        self.linears = {
            full.removeprefix(f"{name}."): Linear(full, linear, read(linear, stored[f"{full}.weight"]))
            for full, linear in linears.items()
        }
        self.relative_error: float | None = None  # of the outputs, once `propagate` has measured it
        self._calls = calls
        self._dense: Tensor | None = None  # outputs of the first batch before anything was changed
        self._shared: dict[Kind, dict[str, Any] | None] = {}  # statistics that are collected together

    def collect(self, statistic: Callable[[int], S]) -> dict[str, S]:
        """A statistic of each linear's inputs, by name inside the block: one pass over the calibration batches.

        Linears that share an input share one statistic object. Raises RunError where there are no batches.
        """
        if statistic not in self._shared:
            return self._pass(statistic)
        if self._shared[statistic] is None:
            together = [kind for kind, found in self._shared.items() if found is None]
            several = self._pass(partial(Several, kinds=together))
            for kind in together:
                self._shared[kind] = {name: found.parts[kind] for name, found in several.items()}
        return dict(self._shared[statistic] or {})

    @contextmanager
    def sharing(self, *statistics: Kind) -> Iterator[None]:
        """In this context the first `collect` of one of these collects all of them, with the weights at that moment.

        For a method that changes the result of another one and needs statistics from before it.
        """
        new = [kind for kind in statistics if kind not in self._shared]
        self._shared |= dict.fromkeys(new)
        try:
            yield
        finally:
            for kind in new:
                del self._shared[kind]

    def _pass(self, statistic: Callable[[int], S]) -> dict[str, S]:
        if self.activations is None:
            raise RunError(f"{self.name}: no statistics can be collected, as there are no calibration windows")
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
        """Outputs [batch, tokens, hidden] with the present weights, for one batch of the calibration inputs."""
        assert self.activations is not None
        return self.forward(self.activations.read(batch, self.device))

    def forward(
        self, hidden: Tensor, weights: Mapping[str, Tensor] | None = None, calls: BlockCalls | None = None
    ) -> Tensor:
        """Outputs for hidden states [batch, tokens, hidden] of a shape that the batches have.

        weights: matrices [out, in] to compute with in place of the block's own, by name inside the block; gradients
        flow to them. calls: how the model calls the block for another shape of batch.
        """
        calls = calls or self._calls(hidden.shape[0], hidden.shape[1])
        if weights is None:
            return calls.run(self.index, self.module, hidden)
        own = {
            f"{name}.weight": read(self.linears[name].module, weight.to(self.arithmetic.compute))
            for name, weight in weights.items()
        }
        return calls.run(
            self.index,
            lambda *args, **kwargs: functional_call(self.module, own, args, kwargs),
            hidden.to(self.device, copy=True),
        )

    def round(self, layout: str) -> None:
        """Rounds the matrices to what will be stored, where the layout rounds values; before the block runs again."""
        self.take_in_changes()
        if rounds(layout):
            for linear in self.linears.values():
                linear.round(layout)

    def take_in_changes(self) -> None:
        """Takes weights that a method changed in the modules themselves as the weights of the linears."""
        for linear in self.linears.values():
            held = read(linear.module).detach()
            if not same(linear.stored, held):
                linear.weight = held

    def propagate(self, first_batch_only: bool = False) -> None:
        """Computes the next block's inputs; measures the error of the first batch where its dense outputs are known."""
        if self.activations is None:
            return
        linears = self.linears.values() if self.arithmetic.sparse_products else ()
        with torch.no_grad(), sparse_products(linears):
            for batch in [0] if first_batch_only else self.activations.indices():
                outputs = self.run(batch)
                if batch == 0 and self._dense is not None:
                    self.relative_error = relative_error(outputs, self._dense)
                    self._dense = None
                if not all_finite(outputs):
                    raise RunError(
                        f"the outputs of {self.name} hold NaN or infinite values in "
                        f"{name_of(self.arithmetic.compute)}; compute in float32 (prune: --compute-dtype, evaluate: "
                        "--dtype), or check the checkpoint"
                    )
                self.activations.write(batch, outputs)

    def state(self, storage: torch.dtype) -> dict[str, Tensor]:
        """All tensors of the block in the storage dtype, as its modules store them, by full name.

        Unchanged tensors are the ones that were read.
        """
        kept = {f"{linear.name}.weight": read(linear.module, linear.stored) for linear in self.linears.values()}
        known = {**self.stored, **kept}
        tensors = {}
        for name, tensor in self.module.state_dict().items():
            full = f"{self.name}.{name}"
            if full in known and same(known[full], tensor):
                tensors[full] = known[full]
            else:
                tensors[full] = tensor.detach().to(storage) if tensor.is_floating_point() else tensor.detach()
        return tensors


@contextmanager
def sparse_products(linears: Iterable[Linear]) -> Iterator[None]:
    """In this context the native sparse kernels multiply the pruned matrices, where they can."""
    replaced: list[nn.Module] = []
    try:
        for linear in linears:
            weight = getattr(linear.module, "weight", None)
            if type(linear.module) is nn.Linear and isinstance(weight, Tensor):
                kernel = native_matrix("bitmask", linear.shape, pack_as("bitmask", weight.detach()))
                if kernel is not None:
                    product = partial(kernel.linear, bias=linear.module.bias, kernel=SPARSE)
                    linear.module.forward = product  # type: ignore[method-assign, assignment]
                    replaced.append(linear.module)
        yield
    finally:
        for module in replaced:
            del module.forward  # the class has its own


def same(stored: Tensor, held: Tensor) -> bool:
    """Whether a tensor in the compute dtype is the stored one."""
    return stored.shape == held.shape and torch.equal(stored.to(held.device, held.dtype), held)


def all_finite(tensor: Tensor) -> bool:
    """No NaN and no infinity. Minimum and maximum show it, in one pass and without a mask as large as the tensor."""
    return bool(torch.stack(tensor.aminmax()).isfinite().all()) if tensor.numel() else True


def relative_error(changed: Tensor, before: Tensor) -> float:
    """Norm of the difference over the norm before; 0 where nothing changed."""
    difference = (changed.float() - before.float()).norm()
    return (difference / before.float().norm()).item() if difference else 0.0


def describe(linear: Linear) -> dict[str, Any]:
    """The figures of one pruned matrix, JSON-plain."""
    nonzeros = int(torch.count_nonzero(linear.stored))
    return {
        "shape": list(linear.shape),
        "nonzeros": nonzeros,
        "recovered": linear.recovered,
        "rounding_error": linear.rounding_error,
    }
