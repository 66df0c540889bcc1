"""What a run did, counted from what it wrote: the numbers of `report.json`. Sizes in bytes, times in seconds."""

from datetime import UTC, datetime
from typing import Any

from budwood.checkpoints.writer import Writer
from budwood.environment import installed, machine, peak_memory
from budwood.stream.arithmetic import name_of
from budwood.stream.model import Model


def account(
    model: Model, writer: Writer, seconds: dict[int, float], notes: list[str], source: str, method: str
) -> dict[str, Any]:
    """Everything that was measured, JSON-plain. seconds: by block, of those that this run did itself."""
    matrices = matrices_of(model, writer)
    return {
        "budwood": installed("budwood"),
        "source": source,
        "method": method,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "data": writer.recipe["data"],
        "dtype": name_of(model.storage),
        "compute_dtype": name_of(model.compute),
        "format": writer.layout,
        "totals": totals(model, writer, matrices),
        "blocks": [
            {
                "name": f"{model.path}.{index}",
                "seconds": seconds.get(index),
                "relative_error": writer.about(index)[1]["relative_error"],
            }
            for index in range(len(model))
        ],
        "linears": matrices,
        "seconds": {"blocks": sum(seconds.values())},
        "peak_memory": peak_memory(),
        "notes": notes,
    }


def matrices_of(model: Model, writer: Writer) -> dict[str, Any]:
    """Every pruned matrix by full name: shape, format, counts, rounding error where values are rounded, bytes."""
    sizes = writer.sizes()
    matrices: dict[str, Any] = {}
    for index in range(len(model)):
        packed, notes = writer.about(index)
        for name, found in notes["linears"].items():
            count = found["shape"][0] * found["shape"][1]
            matrices[name] = {
                "shape": found["shape"],
                "format": packed.get(name, {"format": "dense"})["format"],
                "nonzeros": found["nonzeros"],
                "density": found["nonzeros"] / count,
                "recovered": None if found["recovered"] is None else found["recovered"] / count,
                "rounding_error": found.get("rounding_error"),
                "bytes": sizes.get(
                    name, count * model.storage.itemsize
                ),  # experts fused again have no size of their own
            }
    return matrices


def totals(model: Model, writer: Writer, matrices: dict[str, Any]) -> dict[str, Any]:
    """Sums and means; `recovered` is weighted by parameters, `recovered_unweighted` the mean over matrices."""
    parameters = model.structure.parameters
    counts = [matrix["shape"][0] * matrix["shape"][1] for matrix in matrices.values()]
    scope = max(1, sum(counts))
    shares = [matrix["recovered"] for matrix in matrices.values()]
    known = bool(shares) and None not in shares
    return {
        "parameters": parameters,
        "in_scope": sum(counts),
        "coverage": sum(counts) / parameters,
        "density": sum(matrix["nonzeros"] for matrix in matrices.values()) / scope,
        "recovered": sum(s * c for s, c in zip(shares, counts, strict=True)) / scope if known else None,
        "recovered_unweighted": sum(shares) / len(shares) if known else None,
        "bytes": writer.total_bytes(),
        "bytes_dense": parameters * model.storage.itemsize,
        "bits_per_weight": 8 * sum(matrix["bytes"] for matrix in matrices.values()) / scope,
    }
