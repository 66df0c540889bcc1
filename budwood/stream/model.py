"""The model as a stream of decoder blocks: read one, yield it, run it, write it, free it."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from budwood.checkpoints.source import Source
from budwood.checkpoints.writer import Writer
from budwood.environment import trim_memory
from budwood.models.block_calls import BlockCalls, record_calls
from budwood.progress import Progress, Silent, tracked
from budwood.stream.activations import Activations, batch_size
from budwood.stream.arithmetic import FLOAT32, Arithmetic
from budwood.stream.attention import attend_in_blocks
from budwood.stream.block import Block
from budwood.stream.parameters import Parameters

BATCH = 4096  # tokens per batch, times the bytes of a value
TRIMMED = 64 * 2**20  # bytes of a block from which its memory is returned to the system; smaller ones are reused soon
PROBE = 16  # tokens on which a block is run to verify its units
DEFAULT_LIMIT = 4 * 2**30  # bytes of hidden states kept in memory


class Model(Parameters):
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
        super().__init__(source, storage=storage, compute=arithmetic.compute, device=device, skip=skip)
        self.arithmetic = arithmetic
        self.activation_limit, self.scratch = activation_limit, scratch
        if arithmetic.blocked_attention:
            attend_in_blocks(self.module)
        self.progress: Progress = Silent()  # told of surveys and gradients
        self.activations: Activations | None = None
        self._calls: dict[tuple[int, int], BlockCalls] = {}
        self._random: Tensor | None = None  # hidden states to verify units with where there are no windows

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
            pending = reader.submit(self.read_block, 0, writer)
            for index in range(len(self)):
                stored, written = pending.result()
                pending = reader.submit(self.read_block, index + 1, writer)
                with self.filled(index, stored, written):
                    block = self._block(index, stored, self.activations)
                    if written is None:
                        yield block
                        block.round(writer.layout if writer is not None else "auto")
                    last = writer is not None and index == len(self) - 1  # nothing reads its outputs
                    block.propagate(first_batch_only=last)
                    if writer is not None and written is None:
                        self.write_block(block, writer)
                large = sum(tensor.nbytes for tensor in stored.values()) >= TRIMMED
                del stored, block
                if large:
                    trim_memory()

    @contextmanager
    def block(self, index: int) -> Iterator[Block]:
        """In this context one block is loaded, without calibration inputs."""
        stored, _ = self.read_block(index, None)
        with self.filled(index, stored, None):
            yield self._block(index, stored, None)

    def rewrite(self, written: Writer, writer: Writer) -> Iterator[Block]:
        """Yields the blocks that `written` holds, to be changed; the changed blocks go to `writer`.

        Blocks that `writer` has finished are not yielded. There are no calibration inputs.
        """
        for index in range(len(self)):
            if writer.finished(index):
                continue
            stored, about = written.read(index, self.structure)
            with self.filled(index, stored, about):
                block = self._block(index, stored, None)
                notes = written.notes(index)
                block.relative_error = notes["relative_error"]
                block.kept_units = notes.get("units", {})
                for linear in block.linears.values():
                    linear.recovered = notes["linears"].get(linear.name, {}).get("recovered")
                yield block
                block.round(writer.layout)
                self.write_block(block, writer)

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
