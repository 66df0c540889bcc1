"""The model as a stream of decoder blocks: read one, yield it, run it, write it, free it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from budwood.checkpoints.meta_model import created_float32, stays_float32
from budwood.checkpoints.packing import pack, shapes_fused
from budwood.checkpoints.source import Source, lacking
from budwood.checkpoints.structure import shapes_unfused
from budwood.checkpoints.weights import published, storage_dtype
from budwood.checkpoints.writer import ShardNotes, Writer
from budwood.environment import trim_memory
from budwood.errors import RunError
from budwood.models.block_calls import BlockCalls, record_calls
from budwood.models.linears import read
from budwood.models.slicing import put_back
from budwood.models.units import fit_shapes
from budwood.progress import Progress, Silent, tracked
from budwood.stream.activations import Activations, batch_size
from budwood.stream.arithmetic import FLOAT32, Arithmetic
from budwood.stream.attention import attend_in_blocks
from budwood.stream.block import Block
from budwood.stream.linear import describe, relative_error

BATCH = 4096  # tokens per batch, times the bytes of a value
TRIMMED = 64 * 2**20  # bytes of a block from which its memory is returned to the system; smaller ones are reused soon
PROBE = 16  # tokens on which a block is run to verify its units
DEFAULT_LIMIT = 4 * 2**30  # bytes of hidden states kept in memory


class Model:
    """A decoder whose blocks are read from `source` one at a time.

    storage: dtype of the weights kept and written, but for those that transformers keeps in float32; where None, every
    tensor keeps its own. arithmetic: of the forward passes.
    skip: regular expressions of linears to leave alone. activation_limit: bytes of hidden states held in memory,
    beyond which they are kept in a file in `scratch`.
    """

    def __init__(
        self,
        source: Source,
        *,
        storage: torch.dtype | None = None,
        arithmetic: Arithmetic = FLOAT32,
        device: torch.device | str = "cpu",
        skip: Sequence[str] = (),
        activation_limit: int = DEFAULT_LIMIT,
        scratch: Path | None = None,
    ):
        self.source, self.arithmetic, self.device, self.skip = source, arithmetic, torch.device(device), skip
        self.compute = arithmetic.compute
        self.activation_limit, self.scratch = activation_limit, scratch
        self.structure = source.structure(skip=skip, compute=self.compute)
        self.module, self.path, self.modules = self.structure.module, self.structure.path, self.structure.modules
        self.linears = self.structure.linears
        self.module.requires_grad_(False)
        if arithmetic.blocked_attention:
            attend_in_blocks(self.module)
        self.weights = source.weights(self.structure)
        self.storage = storage or storage_dtype(source.shards, otherwise=torch.float32)
        self.progress: Progress = Silent()  # told of surveys and gradients
        self.activations: Activations | None = None
        self.shapes = {name: list(tensor.shape) for name, tensor in self.module.state_dict().items()}  # by full name
        self._own_shapes = set(shapes_unfused(source.shapes))  # which the source's config.json does not give
        self._casts = storage is not None
        self._float32 = stays_float32(self.module, self.compute, created_float32(self.module, self.compute))
        self._stored_float32 = source.stays_float32(self.storage if self._casts else torch.float32, self.module)
        self._calls: dict[tuple[int, int], BlockCalls] = {}
        self._random: Tensor | None = None  # hidden states to verify units with where there are no windows

    def __len__(self) -> int:
        return len(self.modules)

    def copy(self, source: Source | None = None, arithmetic: Arithmetic | None = None) -> "Model":
        """Another stream, over the same source and with the same arithmetic unless others are given."""
        return Model(
            source or self.source,
            storage=self.storage if self._casts else None,
            arithmetic=arithmetic or self.arithmetic,
            device=self.device,
            skip=self.skip,
            activation_limit=self.activation_limit,
            scratch=self.scratch,
        )

    def blocks(
        self, windows: Tensor | None = None, writer: Writer | None = None, batch: int | None = None
    ) -> Iterator[Block]:
        """Reads, yields, runs, writes and frees one block after the other.

        windows: token ids [windows, tokens]; None: no forward pass. With a writer, blocks that it has
        finished are replayed (read from there, run, not yielded), the others are written after the loop's body; where
        its layout rounds values, that is done before a block is run, so that the next one sees what is written.
        """
        self.activations = self.embed(windows, batch) if windows is not None else None
        with ThreadPoolExecutor(max_workers=1) as reader:  # reads the next block while this one is worked on
            pending = reader.submit(self._read_block, 0, writer)
            for index in range(len(self)):
                stored, written = pending.result()
                pending = reader.submit(self._read_block, index + 1, writer)
                with self._filled(index, stored, written):
                    block = self._block(index, stored, self.activations)
                    if written is None:
                        yield block
                        block.round(writer.layout if writer is not None else "auto")
                    last = writer is not None and index == len(self) - 1  # nothing reads its outputs
                    block.propagate(first_batch_only=last)
                    if writer is not None and written is None:
                        self._write_block(block, writer)
                large = sum(tensor.nbytes for tensor in stored.values()) >= TRIMMED
                del stored, block
                if large:
                    trim_memory()

    @contextmanager
    def block(self, index: int) -> Iterator[Block]:
        """In this context one block is loaded, without calibration inputs."""
        stored, _ = self._read_block(index, None)
        with self._filled(index, stored, None):
            yield self._block(index, stored, None)

    def rewrite(self, written: Writer, writer: Writer) -> Iterator[Block]:
        """Yields the blocks that `written` holds, to be changed; the changed blocks go to `writer`.

        Blocks that `writer` has finished are not yielded. There are no calibration inputs.
        """
        for index in range(len(self)):
            if writer.finished(index):
                continue
            stored, about = written.read(index, self.structure)
            with self._filled(index, stored, about):
                block = self._block(index, stored, None)
                notes = written.notes(index)
                block.relative_error = notes["relative_error"]
                block.kept_units = notes.get("units", {})
                for linear in block.linears.values():
                    linear.recovered = notes["linears"].get(linear.name, {}).get("recovered")
                yield block
                block.round(writer.layout)
                self._write_block(block, writer)

    def survey(self, windows: Tensor, what: str, batch: int | None = None) -> Iterator[Block]:
        """The blocks one after the other, for a method that examines the model before pruning; nothing is written.

        what: is being done, for `progress`.
        """
        blocks = self.blocks(windows, batch=batch)
        return tracked(self.progress, blocks, len(self), what, lambda block: block.name)

    def embed(self, windows: Tensor, batch: int | None = None) -> Activations:
        """The hidden states [windows, tokens, hidden] that enter the first block."""
        count, tokens = windows.shape
        size = batch or self.batch_for(windows)
        self._calls.clear()
        activations: Activations | None = None
        with self.outside(), torch.no_grad():
            for start in range(0, count, size):
                ids = windows[start : start + size].to(self.device)
                shape = (ids.shape[0], tokens)
                if shape not in self._calls:
                    self._calls[shape] = record_calls(self.module, self.modules, ids)
                hidden = self._calls[shape].embed(ids)
                if activations is None:
                    whole = (count, tokens, hidden.shape[-1])
                    activations = Activations(whole, hidden.dtype, size, self.activation_limit, self.scratch)
                activations.write(start // size, hidden)
        assert activations is not None
        return activations

    def batch_for(self, windows: Tensor) -> int:
        """Windows per batch [windows, tokens]: so few that a block's intermediate results fit the caches."""
        return batch_size(windows.shape[0], windows.shape[1], BATCH // self.compute.itemsize)

    def calls(self, batch: int, tokens: int) -> BlockCalls:
        """How the model calls its blocks for a batch of this shape; recorded once, at the latest here."""
        if (batch, tokens) not in self._calls:
            with self.outside():
                ids = torch.ones(batch, tokens, dtype=torch.long, device=self.device)
                self._calls[batch, tokens] = record_calls(self.module, self.modules, ids)
        return self._calls[batch, tokens]

    def _probe(self, activations: Activations | None) -> tuple[Tensor, BlockCalls]:
        """Hidden states of a few tokens [1, tokens, hidden] and how the model calls its blocks for them.

        They are the first ones of the calibration windows; without windows they are random.
        """
        tokens = PROBE if activations is None else min(PROBE, activations.shape[1])
        calls = self.calls(1, tokens)
        if activations is not None:
            return activations.hidden[:1, :tokens].to(self.device), calls
        if self._random is None:
            with self.outside():
                ids = torch.ones(1, tokens, dtype=torch.long, device=self.device)
                like, random = calls.embed(ids), torch.Generator().manual_seed(0)
                self._random = torch.randn(like.shape, generator=random).to(like)
        return self._random, calls

    def logits(self, hidden: Tensor) -> Tensor:
        """[batch, tokens, hidden] after the last block -> [batch, tokens, vocabulary]; needs `outside`."""
        return self.calls(hidden.shape[0], hidden.shape[1]).logits(hidden)

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
        stored, written = self._read_block(index, writer)
        with self._filled(index, stored, written):
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

    def _block(self, index: int, stored: dict[str, Tensor], activations: Activations | None) -> Block:
        name = f"{self.path}.{index}"
        return Block(
            index=index,
            name=name,
            module=self.modules[index],
            linears={full: module for full, module in self.linears.items() if full.startswith(f"{name}.")},
            stored=stored,
            activations=activations,
            calls=self.calls,
            options=lambda: self.structure.unit_options(index),
            probe=lambda: self._probe(activations),
            arithmetic=self.arithmetic,
            device=self.device,
        )

    def _read_block(self, index: int, writer: Writer | None) -> tuple[dict[str, Tensor], ShardNotes | None]:
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
    def _filled(self, index: int, stored: Mapping[str, Tensor], written: ShardNotes | None) -> Iterator[None]:
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

    def _write_block(self, block: Block, writer: Writer) -> None:
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
            for name, weight in self.weights.read(names).items():
                if (linear := now.get(name)) is not None:
                    before = self.stored(name, read(linear.module, weight)).to(linear.stored.device)
                    if before.shape == linear.stored.shape:
                        found[linear.name] = relative_error(linear.stored, before)
        return found

    def _reshaped(self, name: str, tensor: Tensor) -> bool:
        """Whether config.json gives a tensor another shape, or none."""
        return self.shapes.get(name) != list(tensor.shape) or name in self._own_shapes
