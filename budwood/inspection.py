"""What a folder of weights really holds: read from the files, one stored tensor in memory at a time."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from budwood.checkpoints.checksums import read_index, verify
from budwood.checkpoints.source import Source, open_source
from budwood.checkpoints.structure import ModelStructure
from budwood.checkpoints.weights import Weights
from budwood.formats import count
from budwood.humanize import share
from budwood.methods.expression import parse_method
from budwood.methods.method import Method
from budwood.sparsity.histogram import x4_histogram
from budwood.sparsity.patterns import NM, LowPrunes, Pattern, Share

HALF = Share(drop=0.5, per="row")  # the choice whose crowding the X:4 histogram shows


@dataclass(frozen=True)
class Stored:
    """One matrix as it lies in the folder."""

    name: str
    weight: Tensor  # [out, in]
    format: str
    bytes: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]


def inspect(folder: str | Path, x4: bool = False) -> dict[str, Any]:
    """Per matrix: shape, format, density, recovered share, bytes, pattern; and totals.

    folder: dense or pruned, or a name on the hub. x4: also the shares of groups of four of which a row-wise
    50 % choice by magnitude keeps 0, 1, 2, 3, 4. `recovered` is None where there is no 2:4 part.
    Raises UsageError when there is no such model, RunError when a file is damaged or altered.
    """
    source = open_source(folder)
    checksums = compared(source.folder)
    recipe = recipe_of(source.folder)
    method = parse_method(recipe["method"]) if recipe else None
    linears: dict[str, dict[str, Any]] = {}
    for matrix in matrices(source, tuple(recipe["skip"]) if recipe else ()):
        linears[matrix.name] = described(matrix, method)
        if x4:
            linears[matrix.name]["x4"] = crowding(matrix.weight)
    return {
        "source": str(folder),
        "method": recipe["method"] if recipe else None,
        "checksums": checksums,
        "totals": totals(linears, source),
        "linears": linears,
    }


def compared(folder: Path) -> str:
    """Compares every shard with the index's checksums and says so in words; RunError when one differs."""
    for index in sorted(folder.glob("*.safetensors.index.json")):
        if read_index(index)["metadata"].get("sha256"):
            verify(index)
            return "checksums match"
    return "no checksums to compare with"


def recipe_of(folder: Path) -> dict[str, Any] | None:
    """The recipe of a pruned folder, None for others."""
    file = folder / "recipe.json"
    if not file.is_file():
        return None
    recipe = json.loads(file.read_text("utf-8"))
    return {"method": recipe["method"], "skip": recipe.get("skip", [])}


def matrices(source: Source, skip: tuple[str, ...]) -> Iterator[Stored]:
    """The matrices in scope, [out, in] whatever their module, in the order of the blocks."""
    structure = ModelStructure(source.config, skip=skip, trust_remote_code=source.trust_remote_code)
    weights = source.weights(structure)
    for index in range(len(structure.modules)):
        for linear, names in units(weights, f"{structure.path}.{index}.").items():
            packed = source.packed.get(linear)
            stored = bytes_of(weights, names)
            tensors = weights.read(names)
            for name, weight in tensors.items():
                module = structure.linears.get(name.removesuffix(".weight"))
                if module is None or not name.endswith(".weight"):
                    continue
                # A module that is no nn.Linear (transformers' Conv1D) keeps its weight the other way round.
                turned = weight if isinstance(module, nn.Linear) else weight.T.contiguous()
                yield Stored(
                    name.removesuffix(".weight"),
                    turned,
                    packed["format"] if packed else "dense",
                    stored if len(tensors) == 1 else weight.nbytes,  # fused experts share their stored tensor
                )


def units(weights: Weights, prefix: str) -> dict[str, list[str]]:
    """Stored names that are read together, by linear (packed: all its parts) or by their own name."""
    together: dict[str, list[str]] = {}
    for name in weights.names(prefix):
        linear = name.rpartition(".")[0]
        part_of_packed = linear in weights.packed and not name.endswith(".bias")
        together.setdefault(linear if part_of_packed else name, []).append(name)
    return together


def bytes_of(weights: Weights, names: list[str]) -> int:
    """Bytes in the files behind `names`."""
    places = weights.shards.places
    return sum(places[source].nbytes for name in names for source, _ in weights.origins[name].sources)


def described(matrix: Stored, method: Method | None) -> dict[str, Any]:
    size = matrix.weight.numel()
    held = count(matrix.weight)
    promised = method.pattern_of(matrix.shape, matrix.name) if method else None
    promised = promised.base if isinstance(promised, LowPrunes) else promised
    layered = hasattr(promised, "base") if method else matrix.format.startswith("two_four_")
    recovered = held.recovered / size if layered and held.recovered is not None else None
    pattern, holds = pattern_of(matrix.weight, recovered, promised)
    return {
        "shape": list(matrix.weight.shape),
        "format": matrix.format,
        "nonzeros": int(held.nonzeros),
        "density": held.nonzeros / size,
        "recovered": recovered,
        "bytes": matrix.bytes,
        "bits_per_weight": 8 * matrix.bytes / size,
        "itemsize": matrix.weight.element_size(),
        "pattern": pattern,
        "holds": holds,
    }


def pattern_of(weight: Tensor, recovered: float | None, promised: Pattern | None) -> tuple[str, bool]:
    """The pattern in words, and whether the matrix [out, in] keeps to what its method promises.

    Without a promise the words say what is found, and that always holds.
    """
    kept = weight != 0
    if isinstance(promised, NM):
        return str(promised), fits(kept, promised)
    if isinstance(promised, Share):
        room = promised.forecast((weight.shape[0], weight.shape[1])).nonzeros
        most = int(kept.sum(dim=1).max()) * weight.shape[0] if promised.per == "row" else int(kept.sum())
        return f"{promised} per {promised.per}", most <= room
    if weight.shape[1] % 4 == 0 and fits(kept, NM(2, 4)):
        return "2:4", True
    if recovered is not None:
        return f"2:4 + {share(recovered)}", True
    return ("dense" if bool(kept.all()) else "free"), True


def fits(kept: Tensor, pattern: NM) -> bool:
    """Whether no group of the mask [out, in] keeps more than the pattern allows."""
    if kept.shape[1] % pattern.group:
        return False
    return int(kept.unflatten(1, (-1, pattern.group)).sum(dim=-1).max()) <= pattern.kept


def crowding(weight: Tensor) -> list[float] | None:
    """Shares of the groups of which the 50 % choice keeps 0 to 4; None where the width has no such groups."""
    if weight.shape[1] % 4:
        return None
    counted = x4_histogram(HALF.keep(weight.float().abs()))
    return (counted / counted.sum()).tolist()


def totals(linears: dict[str, dict[str, Any]], source: Source) -> dict[str, Any]:
    """Sums over the matrices; bytes of all weights of the folder, and what they would take dense."""
    sizes = {name: matrix["shape"][0] * matrix["shape"][1] for name, matrix in linears.items()}
    scope = sum(sizes.values())
    known = [name for name, matrix in linears.items() if matrix["recovered"] is not None]
    stored = sum(place.nbytes for place in source.shards.places.values())
    packed = sum(matrix["bytes"] for matrix in linears.values())
    return {
        "matrices": len(linears),
        "in_scope": scope,
        "density": sum(matrix["nonzeros"] for matrix in linears.values()) / max(1, scope),
        "recovered": sum(linears[name]["recovered"] * sizes[name] for name in known) / scope if known else None,
        "bits_per_weight": 8 * packed / max(1, scope),
        "bytes": stored,
        "bytes_dense": stored - packed + sum(sizes[name] * linears[name]["itemsize"] for name in linears),
        "broken": [name for name, matrix in linears.items() if not matrix["holds"]],
    }
