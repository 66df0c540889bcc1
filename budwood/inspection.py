"""The contents of a folder of weights, read from the files with one stored tensor in memory at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from budwood.checkpoints.source import Source, open_source
from budwood.checkpoints.weights import Weights
from budwood.errors import UsageError
from budwood.formats import count
from budwood.humanize import share
from budwood.methods.expression import parse_method
from budwood.methods.method import Method
from budwood.runs.recipe import FILE
from budwood.runs.recipe import read_recipe as recipe_file
from budwood.sparsity.histogram import x4_histogram
from budwood.sparsity.patterns import NM, LowPrunes, Pattern, Share

HALF = Share(drop=0.5, per="row")  # the mask that the X:4 histogram is of


@dataclass(frozen=True)
class StoredMatrix:
    """One matrix of the folder."""

    name: str
    weight: Tensor  # [out, in]
    format: str
    bytes: int  # in the files

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]


def inspect(folder: str | Path, x4: bool = False, trust_remote_code: bool = False) -> dict[str, Any]:
    """Per matrix: shape, format, density, recovered share, bytes, pattern; and totals and notes.

    folder: dense or pruned, or a name on the hub. x4: also the shares of groups of four adjacent weights of which
    keeping half of each row by magnitude keeps 0, 1, 2, 3, 4. `recovered` is None where there is no 2:4 part. The
    pattern of the recipe's method is checked; where this version cannot parse the method, a note says so.
    Raises UsageError when there is no such model, RunError when a file is damaged or altered.
    """
    source = open_source(folder, trust_remote_code)
    checksums = "checksums match" if source.check() else "no checksums to compare"
    recipe = read_recipe(source.folder)
    recorded = recipe["method"] if recipe else None
    method, notes = parse_recorded_method(recorded) if recorded is not None else (None, [])
    linears: dict[str, dict[str, Any]] = {}
    for matrix in stored_matrices(source, tuple(recipe["skip"]) if recipe else ()):
        linears[matrix.name] = describe(matrix, method)
        if x4:
            linears[matrix.name]["x4"] = x4_shares(matrix.weight)
    return {
        "source": str(folder),
        "method": recorded,
        "checksums": checksums,
        "totals": sum_up(linears, source),
        "linears": linears,
        "notes": notes,
    }


def read_recipe(folder: Path) -> dict[str, Any] | None:
    """Method and skipped names of a pruned folder, None for other folders."""
    recipe = recipe_file(folder / FILE)
    return None if recipe is None else {"method": recipe.method, "skip": recipe.skip}


def parse_recorded_method(expression: str) -> tuple[Method | None, list[str]]:
    """The method of a recipe and no note; or None and a note where this version cannot parse it."""
    try:
        return parse_method(expression), []
    except UsageError as error:
        return None, [f"the patterns are not checked: the method of the recipe cannot be read ({error})"]


def stored_matrices(source: Source, skip: tuple[str, ...]) -> Iterator[StoredMatrix]:
    """The matrices in scope, [out, in] for every kind of module, in the order of the blocks."""
    structure = source.structure(skip=skip)
    weights = source.weights(structure)
    for index in range(len(structure.modules)):
        for linear, names in weights.groups(f"{structure.path}.{index}.").items():
            packed = source.packed.get(linear)
            stored = stored_bytes(weights, names)
            tensors = weights.read(names)
            for name, weight in tensors.items():
                module = structure.linears.get(name.removesuffix(".weight"))
                if module is None or not name.endswith(".weight"):
                    continue
                # Other modules (transformers' Conv1D) store the transposed weight.
                matrix = weight if isinstance(module, nn.Linear) else weight.T.contiguous()
                yield StoredMatrix(
                    name.removesuffix(".weight"),
                    matrix,
                    packed["format"] if packed else "dense",
                    stored if len(tensors) == 1 else weight.nbytes,  # fused experts share their stored tensor
                )


def stored_bytes(weights: Weights, names: list[str]) -> int:
    """Bytes in the files of the tensors `names`."""
    places = weights.shards.places
    return sum(places[source].nbytes for name in names for source, _ in weights.origins[name].sources)


def describe(matrix: StoredMatrix, method: Method | None) -> dict[str, Any]:
    """The entry of one matrix in the result of `inspect`."""
    size = matrix.weight.numel()
    counted = count(matrix.weight)
    expected = method.pattern_of(matrix.shape, matrix.name) if method else None
    expected = expected.base if isinstance(expected, LowPrunes) else expected
    two_parts = hasattr(expected, "base") if method else matrix.format.startswith("two_four_")
    recovered = counted.recovered / size if two_parts and counted.recovered is not None else None
    pattern, holds = check_pattern(matrix.weight, recovered, expected)
    return {
        "shape": list(matrix.weight.shape),
        "format": matrix.format,
        "nonzeros": int(counted.nonzeros),
        "density": counted.nonzeros / size,
        "recovered": recovered,
        "bytes": matrix.bytes,
        "bits_per_weight": 8 * matrix.bytes / size,
        "itemsize": matrix.weight.element_size(),
        "pattern": pattern,
        "holds": holds,
    }


def check_pattern(weight: Tensor, recovered: float | None, expected: Pattern | None) -> tuple[str, bool]:
    """The pattern as text, and whether the matrix [out, in] satisfies the expected one.

    Without an expected pattern the text is the pattern found, which holds.
    """
    kept = weight != 0
    if isinstance(expected, NM):
        return str(expected), satisfies(kept, expected)
    if isinstance(expected, Share):
        limit = expected.forecast((weight.shape[0], weight.shape[1])).nonzeros
        most = int(kept.sum(dim=1).max()) * weight.shape[0] if expected.per == "row" else int(kept.sum())
        return f"{expected} per {expected.per}", most <= limit
    if weight.shape[1] % 4 == 0 and satisfies(kept, NM(2, 4)):
        return "2:4", True
    if recovered is not None:
        return f"2:4 + {share(recovered)}", True
    return ("dense" if bool(kept.all()) else "free"), True


def satisfies(kept: Tensor, pattern: NM) -> bool:
    """Whether no group of the mask [out, in] keeps more weights than the pattern allows."""
    if kept.shape[1] % pattern.group:
        return False
    return int(kept.unflatten(1, (-1, pattern.group)).sum(dim=-1).max()) <= pattern.kept


def x4_shares(weight: Tensor) -> list[float] | None:
    """Shares of the groups of four that keep 0 to 4 weights under `HALF`; None where 4 does not divide the width."""
    if weight.shape[1] % 4:
        return None
    counted = x4_histogram(HALF.keep(weight.float().abs()))
    return (counted / counted.sum()).tolist()


def sum_up(linears: dict[str, dict[str, Any]], source: Source) -> dict[str, Any]:
    """Sums over the matrices; bytes of all weights of the folder as stored, and if they were dense."""
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
