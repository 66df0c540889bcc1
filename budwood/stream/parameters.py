"""The parameters of a model on meta: filled from its files part by part, freed again, written block by block."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from budwood.checkpoints.meta_model import created_float32, stays_float32
from budwood.checkpoints.packing import pack, shapes_fused
from budwood.checkpoints.source import Source, lacking
from budwood.checkpoints.structure import shapes_unfused
from budwood.checkpoints.weights import published, storage_dtype
from budwood.checkpoints.writer import ShardNotes, Writer
from budwood.errors import RunError
from budwood.models.linears import read
from budwood.models.slicing import put_back
from budwood.models.units import fit_shapes
from budwood.stream.block import Block
from budwood.stream.linear import describe, relative_error


class Parameters:
    """The model of `source`, all of its parameters on meta until a context fills some of them.

    storage: dtype of the weights kept and written, but for those that transformers keeps in float32; where None, every
    tensor keeps its own. compute: dtype of the forward passes. skip: regular expressions of linears to leave alone.
    """

    def __init__(
        self,
        source: Source,
        *,
        storage: torch.dtype | None,
        compute: torch.dtype,
        device: torch.device | str,
        skip: Sequence[str],
    ):
        self.source, self.compute, self.device, self.skip = source, compute, torch.device(device), skip
        self.structure = source.structure(skip=skip, compute=compute)
        self.module, self.path, self.modules = self.structure.module, self.structure.path, self.structure.modules
        self.linears = self.structure.linears
        self.module.requires_grad_(False)
        self.weights = source.weights(self.structure)
        self.storage = storage or storage_dtype(source.shards, otherwise=torch.float32)
        self.shapes = {name: list(tensor.shape) for name, tensor in self.module.state_dict().items()}  # by full name
        self._own_shapes = set(shapes_unfused(source.shapes))  # which the source's config.json does not give
        self._casts = storage is not None
        self._float32 = stays_float32(self.module, compute, created_float32(self.module, compute))
        self._stored_float32 = source.stays_float32(self.storage if self._casts else torch.float32, self.module)

    def __len__(self) -> int:
        return len(self.modules)

    @contextmanager
    def outside(self) -> Iterator[None]:
        """In this context embeddings, final norm and head are loaded; after it they are on meta again."""
        meta = self._parameters_outside()
        try:
            for name in self.names_outside():
                self._assign(self.module, self.weights.read([name]), "")
            self.module.tie_weights()
            missing = [name for name, _, _, parameter in self._parameters_outside() if parameter.is_meta]
            if missing:
                raise RunError(f"{self.source.name} lacks {', '.join(missing[:4])}; fetch the checkpoint again")
            yield
        finally:
            for _, owner, attribute, parameter in meta:
                owner._parameters[attribute] = parameter

    @contextmanager
    def resident(self, writer: Writer | None = None) -> Iterator[None]:
        """In this context `module` holds all parameters in the compute dtype; after it they are on meta again.

        writer: blocks that it has finished are read from there.
        """
        with ExitStack() as stack:
            stack.enter_context(self.outside())
            for index in range(len(self)):
                stack.enter_context(self.loaded(index, writer))
            yield

    @contextmanager
    def loaded(self, index: int, writer: Writer | None = None) -> Iterator[None]:
        """In this context one block holds its parameters in the compute dtype, as in `resident`."""
        stored, written = self.read_block(index, writer)
        with self.filled(index, stored, written):
            del stored  # the block has its own where the dtypes differ
            yield

    def names_outside(self) -> list[str]:
        """Names of the stored tensors that belong to no block, without those that are tied to another."""
        known = set(self.module.state_dict())
        tied = set(getattr(self.module, "all_tied_weights_keys", None) or {})
        inside = f"{self.path}."
        return [name for name in self.weights.names() if name in known - tied and not name.startswith(inside)]

    def outside_in_files(
        self,
        layout: str,
        zeros: Mapping[str, Sequence[int]],
        changes: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """The stored tensors that belong to no block, and new ones of zeros (shapes by full name), in storage dtype.

        changes: what to make of some of them, by full name.
        """
        tensors = {name: torch.zeros(tuple(shape), dtype=self.storage) for name, shape in zeros.items()}
        read = self.weights.read(self.names_outside())
        tensors |= {full: self.stored(full, tensor) for full, tensor in read.items()}
        for name, change in (changes or {}).items():
            tensors[name] = change(tensors[name])
        return published(tensors, self.module) if layout == "dense" else tensors

    def stored(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor of that full name in the dtype that is kept and written."""
        if not (self._casts and tensor.is_floating_point()):
            return tensor
        return tensor.to(torch.float32 if self._stored_float32(name) else self.storage)

    def _parameters_outside(self) -> list[tuple[str, nn.Module, str, nn.Parameter]]:
        return [
            (f"{path}.{attribute}".lstrip("."), owner, attribute, parameter)
            for path, owner in self.module.named_modules()
            for attribute, parameter in owner._parameters.items()
            if parameter is not None and not f"{path}.".startswith(f"{self.path}.")
        ]

    def read_block(self, index: int, writer: Writer | None) -> tuple[dict[str, Tensor], ShardNotes | None]:
        """All tensors of a block in storage dtype by full name; the notes of its shard where the writer finished it."""
        if index == len(self):
            return {}, None
        prefix = f"{self.path}.{index}."
        if writer is not None and writer.finished(index):
            return writer.read(index, self.structure)
        tensors = self.weights.read(self.weights.names(prefix))
        known = {prefix + name for name in self.modules[index].state_dict()}
        if missing := sorted(known - set(tensors)):
            raise lacking(self.source.name, missing, prefix[:-1])
        return {name: self.stored(name, tensor) for name, tensor in tensors.items() if name in known}, None

    @contextmanager
    def filled(self, index: int, stored: Mapping[str, Tensor], written: ShardNotes | None) -> Iterator[None]:
        """In this context the block holds its tensors in the compute dtype; after it its former parameters.

        written: the notes of the shard that the tensors are from, whose shapes the block takes.
        """
        module = self.modules[index]
        before = [(owner, dict(owner._parameters)) for owner in module.modules()]
        prefix = f"{self.path}.{index}."
        try:
            if written is not None:
                fit_shapes(
                    module, {name.removeprefix(prefix): shape for name, shape in shapes_unfused(written.shapes).items()}
                )
            self._assign(module, stored, prefix)
            yield
        finally:
            put_back(before)

    def _assign(self, module: nn.Module, stored: Mapping[str, Tensor], prefix: str) -> None:
        state = {}
        for name, tensor in stored.items():
            tensor = self.stored(name, tensor)
            if tensor.is_floating_point():
                tensor = tensor.to(torch.float32 if self._float32(name) else self.compute)
            state[name.removeprefix(prefix)] = tensor.to(self.device)
        try:
            module.load_state_dict(state, strict=False, assign=True)
        except RuntimeError as error:
            raise RunError(
                f"{self.source.name} does not fit its config.json: {str(error).splitlines()[-1].strip()}"
            ) from error

    def write_block(self, block: Block, writer: Writer) -> None:
        """Writes a finished block, in the layout of the writer, with what there is to say of it."""
        state = block.state(self.storage)
        shapes = {name: list(tensor.shape) for name, tensor in state.items() if self._reshaped(name, tensor)}
        weights = {linear.name: linear.stored for linear in block.linears.values()}
        rounded = {linear.name: linear.rounded for linear in block.linears.values() if linear.rounded}
        tensors, packed = pack(block.name, block.module, state, weights, writer.layout, rounded, shapes)
        shapes = shapes_fused(shapes, tensors)
        if writer.layout == "dense" and not shapes:
            tensors = published(tensors, self.module)
        notes: dict[str, Any] = {
            "relative_error": block.relative_error,
            "linears": {linear.name: describe(linear) for linear in block.linears.values()},
            "units": block.kept_units,
        }
        for name, change in self._changes(block).items():
            notes["linears"][name]["change"] = change
        writer.write(block.index, tensors, packed, shapes, notes)

    def _changes(self, block: Block) -> dict[str, float]:
        """By full name: the norm of what changed in each matrix that kept its shape, over the norm it was read with.

        They are read again: methods may compute in the memory of what was read, and keeping a copy would cost a block.
        """
        found: dict[str, float] = {}
        now = {f"{linear.name}.weight": linear for linear in block.linears.values()}
        for names in self.weights.groups(f"{block.name}.").values():
            if all(len(self.shapes.get(name, ())) == 1 for name in names):  # of norms, and biases
                continue
            for name, weight in self.weights.read(names).items():
                if (linear := now.get(name)) is not None:
                    before = self.stored(name, read(linear.module, weight)).to(linear.stored.device)
                    if before.shape == linear.stored.shape:
                        found[linear.name] = relative_error(linear.stored, before)
        return found

    def _reshaped(self, name: str, tensor: Tensor) -> bool:
        """Whether config.json gives a tensor another shape, or none."""
        return self.shapes.get(name) != list(tensor.shape) or name in self._own_shapes
