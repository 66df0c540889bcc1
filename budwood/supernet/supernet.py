"""Several pruned copies of the linears that read units, one per level, kept on disk: a supernet.

Týr-the-Pruner (arXiv 2503.09657), sections 3 and 4.1. Blocks are pruned in order; what reaches the next block is the
expected output over the copies of this one. Only kept columns are stored, and nothing for a level that removes none.
"""

import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from budwood.checkpoints.reader import Shards
from budwood.checkpoints.work import Work
from budwood.errors import RunError
from budwood.sparsity.unit_removal import expectation
from budwood.supernet.pruned_copies import Copy, HeldOut, Pruner
from budwood.supernet.sites import Site

if TYPE_CHECKING:
    from budwood.stream.block import Block
    from budwood.stream.model import Model

log = logging.getLogger(__name__)

Accumulate = Literal["expectation", "centre", "uniform", "none"]
DENSE = "tyr-dense"  # name of the dense model's stored hidden states, to which candidates are compared
PERIOD = 8  # of as many windows one is held out
CACHE = 2**30  # bytes of copies kept in memory
HEADER = 360  # bytes that the names, shapes and errors of a copy take in a file, about


class Supernet:
    """The copies of one round. sites: all of the model. levels: units removed, by level, for each site."""

    def __init__(self, work: Work, name: str, sites: Sequence[Site], levels: Sequence[Mapping[int, int]]):
        self.work, self.name, self.sites, self.levels = work, name, sites, levels
        self._cache: OrderedDict[tuple[int, str, int], tuple[Tensor, Tensor]] = OrderedDict()
        self._bytes = 0

    def at(self, block: int) -> Iterator[tuple[int, Site]]:
        """The sites of a block and their places in the list."""
        return ((place, site) for place, site in enumerate(self.sites) if site.block == block)

    def file(self, block: int) -> str:
        return f"{self.name}-{block:04d}"

    def has(self, block: int) -> bool:
        return self.work.file(f"{self.file(block)}.safetensors").is_file()

    def save(self, block: int, copies: Mapping[str, Mapping[int, Copy]], dtype: torch.dtype) -> None:
        """Keeps the copies of a block, by consumer and level, in the storage dtype."""
        tensors = {}
        for consumer, levels in copies.items():
            for level, copy in levels.items():
                key = f"{consumer}|{level}"
                tensors[f"{key}|errors"] = torch.tensor([copy.error, copy.held_out, copy.damp], dtype=torch.float64)
                tensors[f"{key}|kept"] = copy.kept
                tensors[f"{key}|columns"] = copy.columns
                tensors[f"{key}|weight"] = copy.weight.to(dtype)
        self.work.save(self.file(block), tensors)

    def read(self, block: int, consumer: str, level: int) -> tuple[Tensor, Tensor]:
        """Columns and weight of a copy; copies that were read lately stay in memory."""
        key = (block, consumer, level)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        shards = self._shards(block)
        copy = tuple(shards.read(f"{consumer}|{level}|{part}") for part in ("columns", "weight"))
        self._cache[key] = copy[0], copy[1]
        self._bytes += sum(tensor.nbytes for tensor in copy)
        while self._bytes > CACHE and len(self._cache) > 1:
            self._bytes -= sum(tensor.nbytes for tensor in self._cache.popitem(last=False)[1])
        return copy[0], copy[1]

    def kept(self, block: int, consumer: str, level: int) -> Tensor:
        """The units kept by a copy, int64."""
        return self._shards(block).read(f"{consumer}|{level}|kept")

    def errors(self, block: int, consumer: str, level: int) -> list[float]:
        """Relative squared output error of a copy on calibration and on held-out inputs, and its damping."""
        return [float(value) for value in self._shards(block).read(f"{consumer}|{level}|errors")]

    def weights(self, block: "Block", state: Sequence[int]) -> dict[str, Tensor]:
        """Weights [out, in] by consumer, zero in removed columns, for the level of every site; none for dense ones."""
        found = {}
        for place, site in self.at(block.index):
            if self.levels[place][state[place]] == 0:
                continue
            for consumer in site.consumers:
                columns, weight = self.read(block.index, consumer, state[place])
                whole = torch.zeros(block.linears[consumer].shape, dtype=block.arithmetic.compute)
                whole[:, columns] = weight.to(whole.dtype)
                found[consumer] = whole.to(block.device)
        return found

    def remove(self) -> None:
        """Deletes the files of all blocks, and the state of the search in them."""
        self._cache.clear()
        for file in self.work.folder.glob(f"{self.name}-*"):
            file.unlink()

    def _shards(self, block: int) -> Shards:
        return self.work.shards(self.file(block))


def build(
    model: "Model",
    windows: Tensor,
    supernet: Supernet,
    pruner: Pruner,
    accumulate: Accumulate,
    within_layer: Literal["joint", "sequential"],
) -> dict[str, Any]:
    """Prunes every block to all its levels, from the dense weights; blocks whose file exists are not pruned again.

    windows: token ids [windows, tokens]. Returns, per block and consumer, the levels, units removed and errors.
    """
    period = None if pruner.published or len(windows) < 4 else min(PERIOD, len(windows))
    statistic = partial(HeldOut, period=period)
    manifest: dict[str, Any] = {}
    for block in model.survey(windows, "pruning every block to several widths"):
        sites = list(supernet.at(block.index))
        dense = {name: block.linears[name].weight.clone() for _, site in sites for name in site.consumers}
        if not supernet.has(block.index):
            check_units(block, sites)
            copies: dict[str, dict[int, Copy]] = {}
            for turn in [sites] if within_layer == "joint" else [[site] for site in sites]:
                statistics = block.collect(statistic)
                for place, site in turn:
                    removing = {level: count for level, count in supernet.levels[place].items() if count}
                    for name in site.consumers:
                        found = statistics[name]
                        found.check(f"{block.name}.{name}")
                        if found.count == 0:
                            log.warning(
                                "%s: no calibration token reached it, so it is pruned by magnitude",
                                block.linears[name].name,
                            )
                        columns = block.units[name].columns
                        copies[name] = pruner.copies(dense[name], found, site, columns, removing) if removing else {}
                        if within_layer == "sequential":
                            pairs = {
                                level: (copy.columns, copy.weight.to(model.storage))
                                for level, copy in copies[name].items()
                            }
                            mean = averaged(dense[name], pairs, supernet.levels[place], site.units, accumulate)
                            block.linears[name].weight = mean
            supernet.save(block.index, copies, model.storage)
        if accumulate != "none":
            for place, site in sites:
                for name in site.consumers:
                    counts = supernet.levels[place]
                    pairs = {level: supernet.read(block.index, name, level) for level, n in counts.items() if n}
                    block.linears[name].weight = averaged(dense[name], pairs, counts, site.units, accumulate)
        manifest[block.name] = {
            name: [
                {"level": level, "removed": n, "errors": supernet.errors(block.index, name, level) if n else [0.0] * 3}
                for level, n in supernet.levels[place].items()
            ]
            for place, site in sites
            for name in site.consumers
        }
    return manifest


def averaged(
    dense: Tensor,
    copies: Mapping[int, tuple[Tensor, Tensor]],
    counts: Mapping[int, int],
    units: int,
    accumulate: Accumulate,
) -> Tensor:
    """The weight [out, in] that is propagated in place of all copies (columns, weight) of a linear, by level.

    counts: units removed at every level; a level without a copy is the dense weight. "expectation": copies count by the
    share of units that they keep, "uniform": all alike, "centre": only level 0, "none": the dense weight.
    """
    if accumulate == "none":
        return dense
    every = torch.arange(dense.shape[1])
    pairs = [copies[level] if count else (every, dense) for level, count in counts.items()]
    shares = {
        "expectation": [1 - count / units for count in counts.values()],
        "uniform": [1.0] * len(counts),
        "centre": [float(level == 0) for level in counts],
    }
    return expectation(dense, pairs, shares[accumulate])


def check_units(block: "Block", sites: Sequence[tuple[int, Site]]) -> None:
    """Raises RunError where running the block has shown that its shapes promised units which it does not have."""
    for _, site in sites:
        for name in site.consumers:
            if name not in block.units:
                reason = block.refused.get(name, "its units were not found by running the block")
                raise RunError(
                    f"{block.name}.{name} cannot lose units: {reason}; leave it whole with --skip '{block.name}.{name}'"
                )


def predicted_bytes(
    sites: Sequence[Site], levels: Sequence[Mapping[int, int]], rows: Sequence[int], itemsize: int
) -> int:
    """Bytes of a supernet on disk. rows: of the consumers of each site. itemsize: of a stored weight."""
    total = 0
    for site, counts, out in zip(sites, levels, rows, strict=True):
        for removed in filter(None, counts.values()):
            columns = (site.units - removed) * site.width
            copy = columns * out * itemsize + 8 * (site.units - removed + columns) + HEADER
            total += copy * len(site.consumers)
    return total
