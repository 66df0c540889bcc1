"""One decoder block with its weights loaded: matrices, calibration inputs, statistics of them, outputs."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from budwood.errors import RunError
from budwood.formats import rounds
from budwood.models.block_calls import BlockCalls
from budwood.models.linears import read
from budwood.models.slicing import same_when_sliced, verify
from budwood.sparsity.units import Units, places
from budwood.stream.activations import Activations
from budwood.stream.arithmetic import Arithmetic, name_of
from budwood.stream.collector import Collector, Several, StopForward
from budwood.stream.linear import Linear, all_finite, relative_error, same
from budwood.stream.sparse_products import sparse_products

S = TypeVar("S")
Kind = Callable[[int], Any]  # of statistic, made for a width


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
        stored: dict[str, Tensor],
        activations: Activations | None,
        calls: Callable[[int, int], BlockCalls],
        options: Callable[[], Mapping[str, list[Units]]],
        probe: Callable[[], tuple[Tensor, BlockCalls]],
        arithmetic: Arithmetic,
        device: torch.device,
    ):
        """linears: the matrices in scope by full name. stored: all tensors of the block in storage dtype by full name.

        calls: how the model calls its blocks for a batch of [windows, tokens]. options: the possible units by consumer.
        probe: hidden states [1, tokens, hidden] of a few tokens, and how the model calls its blocks for them.
        """
        self.index, self.name, self.module = index, name, module
        self.stored, self.activations = stored, activations
        self.arithmetic, self.device = arithmetic, device
        self.linears = {
            full.removeprefix(f"{name}."): Linear(full, linear, read(linear, stored[f"{full}.weight"]))
            for full, linear in linears.items()
        }
        self.kept_units: dict[str, list[int]] = {}  # by kind: how many stayed, of how many
        self.relative_error: float | None = None  # of the outputs, once `propagate` has measured it
        self._calls, self._options, self.probe = calls, options, probe
        self._dense: Tensor | None = None  # outputs of the first batch before anything was changed
        self._propagated = False  # whether a survey has computed the next block's inputs already
        self._shared: dict[Kind, dict[str, Any] | None] = {}  # statistics that are collected together

    def collect(self, statistic: Callable[[int], S], only: Collection[str] | None = None) -> dict[str, S]:
        """A statistic of each linear's inputs, by name inside the block: one pass over the calibration batches.

        only: the linears that are wanted; all by default. Linears that share an input share one statistic object.
        Raises RunError where there are no batches.
        """
        if statistic not in self._shared:
            return self._pass(statistic, only)
        if self._shared[statistic] is None:
            together = [kind for kind, found in self._shared.items() if found is None]
            several = self._pass(partial(Several, kinds=together))
            for kind in together:
                self._shared[kind] = {name: found.parts[kind] for name, found in several.items()}
        return dict(self._shared[statistic] or {})

    @contextmanager
    def limited_to(self, windows: slice) -> Iterator[None]:
        """In this context the block has only these calibration windows: statistics and `run` see no others."""
        whole = self.activations
        assert whole is not None
        self.activations = whole.part(windows)
        try:
            yield
        finally:
            self.activations = whole

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

    def observe(self, statistic: Callable[[int], S], only: Collection[str] | None = None) -> dict[str, S]:
        """As `collect`, and the next block's inputs are computed in the same pass: for surveys that change nothing."""
        self._propagated = True
        return self._pass(statistic, only, propagate=True)

    def advance(self, seen: Callable[[Tensor, Tensor], None] | None = None) -> None:
        """Computes the next block's inputs with the weights as they are, for surveys that change nothing.

        seen: gets the inputs and the outputs [batch, tokens, hidden] of every batch.
        """
        assert self.activations is not None
        self._propagated = True
        with torch.no_grad():
            for batch in self.activations.indices():
                inputs = self.activations.read(batch, self.device)
                outputs = self.forward(inputs.clone())
                if seen is not None:
                    seen(inputs, outputs)
                self._write(batch, outputs)

    def _pass(
        self, statistic: Callable[[int], S], only: Collection[str] | None = None, propagate: bool = False
    ) -> dict[str, S]:
        if self.activations is None:
            raise RunError(f"{self.name}: no statistics can be collected, as there are no calibration windows")
        wanted = {name: linear for name, linear in self.linears.items() if only is None or name in only}
        modules = {name: linear.module for name, linear in wanted.items()}
        widths = {name: linear.shape[1] for name, linear in wanted.items()}
        with Collector(modules, widths, statistic, whole=propagate) as collector, torch.no_grad():
            for batch in self.activations.indices():
                collector.next_batch()
                try:
                    outputs = self.run(batch)
                    if propagate:
                        self._write(batch, outputs)
                    elif batch == 0 and self._dense is None:
                        self._dense = outputs
                except StopForward:
                    continue
        return collector.statistics()

    def run(self, batch: int) -> Tensor:
        """Outputs [batch, tokens, hidden] with the present weights, for one batch of the calibration inputs."""
        return self.forward(self.hidden_states(batch))

    def hidden_states(self, batch: int) -> Tensor:
        """One batch of the calibration inputs, [batch, tokens, hidden]; `forward` may write into them."""
        assert self.activations is not None
        return self.activations.read(batch, self.device)

    def write_outputs(self, into: Activations) -> None:
        """The outputs with the present weights for all calibration windows; the next block's inputs are left alone."""
        assert self.activations is not None
        with torch.no_grad():
            for batch in self.activations.indices():
                outputs = self.run(batch)
                if batch == 0 and self._dense is None:
                    self._dense = outputs
                into.write(batch, outputs)

    def set_parameter(self, name: str, value: Tensor) -> None:
        """Gives a parameter of the module, such as that of a norm, other values; rounded to the storage dtype.

        Raises RunError for NaN and overflow.
        """
        parameter = self.module.get_parameter(name)
        stored = self.stored.get(f"{self.name}.{name}", parameter)
        rounded = value.detach().to(stored.dtype)
        if not all_finite(rounded):
            raise RunError(f"{self.name}.{name}: the new values do not fit {stored.dtype}; choose another --dtype")
        with torch.no_grad():
            parameter.copy_(rounded)

    def forward(
        self,
        hidden: Tensor,
        weights: Mapping[str, Tensor] | None = None,
        calls: BlockCalls | None = None,
        others: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Outputs for hidden states [batch, tokens, hidden].

        weights: matrices [out, in] to compute with in place of the block's own, by name inside the block; gradients
        flow to them. others: the same for other parameters of the module, by their names. calls: how the model calls
        the block, where that is not known for the shape of a batch.
        """
        calls = calls or self._calls(hidden.shape[0], hidden.shape[1])
        if weights is None and others is None:
            return calls.run(self.index, self.module, hidden)
        own = {
            f"{name}.weight": read(self.linears[name].module, weight.to(self.device, self.arithmetic.compute))
            for name, weight in (weights or {}).items()
        }
        own |= {name: value.to(self.module.get_parameter(name).dtype) for name, value in (others or {}).items()}
        return calls.run(
            self.index,
            lambda *args, **kwargs: functional_call(self.module, own, args, kwargs),
            hidden.to(self.device, copy=True),
        )

    @property
    def units(self) -> dict[str, Units]:
        """KV groups and neurons that can be removed, by the linear that reads them; verified by running the block."""
        return self._verified[0]

    @property
    def refused(self) -> dict[str, str]:
        """Linears that seem to read units but do not, and why: for instance because a norm spans all heads."""
        return self._verified[1]

    @cached_property
    def _verified(self) -> tuple[dict[str, Units], dict[str, str]]:
        return verify(self.module, self._options(), self._run_probe)

    def keep(self, kept: Mapping[str, Tensor]) -> None:
        """Cuts out all units but these: by consumer, sorted indices int64.

        Producers lose rows and bias entries, the consumer columns. Raises RunError where the sliced block computes
        something else than the block with the same units masked.
        """
        units = {name: self.units[name] for name in kept if len(kept[name]) < len(self.units[name])}
        self.kept_units = {}
        for name, each in units.items():
            for producer, rows in each.rows.items():
                self._select(self.linears[producer], places(rows, kept[name]))
            consumer = self.linears[name]
            consumer.stored = consumer.stored[:, places(each.columns, kept[name])]
            for entry, indices in each.entries.items():
                full = f"{self.name}.{entry}"
                self.stored[full] = self.stored[full][places(indices, kept[name])]
        for name, units_of in self.units.items():
            count = self.kept_units.setdefault(units_of.kind, [0, 0])
            count[0] += len(kept.get(name, units_of.columns))
            count[1] += len(units_of)
        wrong = same_when_sliced(self.module, units, kept, self._run_probe) if units else []
        if wrong:
            raise RunError(
                f"{self.name}.{wrong[0]}: the block computes something else once the removed units are cut out; "
                f"leave it whole with --skip '{self.name}.{wrong[0]}'"
            )
        self.__dict__.pop("_verified", None)

    def _select(self, linear: Linear, rows: Tensor) -> None:
        linear.stored = linear.stored[rows]
        bias = f"{linear.name}.bias"
        if bias in self.stored:
            self.stored[bias] = self.stored[bias][rows]

    def _run_probe(self) -> Tensor:
        hidden, calls = self.probe()
        return self.forward(hidden, calls=calls)

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
        if self.activations is None or self._propagated:
            return
        linears = self.linears.values() if self.arithmetic.sparse_products else ()
        with torch.no_grad(), sparse_products(linears):
            for batch in [0] if first_batch_only else self.activations.indices():
                outputs = self.run(batch)
                if batch == 0 and self._dense is not None:
                    self.relative_error = relative_error(outputs[: len(self._dense)], self._dense)
                    self._dense = None
                self._write(batch, outputs)

    def _write(self, batch: int, outputs: Tensor) -> None:
        """The outputs of a batch become inputs of the next block. Raises RunError for NaN and infinite values."""
        assert self.activations is not None
        if not all_finite(outputs):
            raise RunError(
                f"the outputs of {self.name} hold NaN or infinite values in {name_of(self.arithmetic.compute)}; "
                "compute in float32 (prune: --compute-dtype, evaluate: --dtype), or check the checkpoint"
            )
        self.activations.write(batch, outputs)

    def state(self, storage: torch.dtype) -> dict[str, Tensor]:
        """All tensors of the block as its modules store them, by full name; new ones in the storage dtype.

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
                dtype = known[full].dtype if full in known else storage
                tensors[full] = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()
        return tensors
