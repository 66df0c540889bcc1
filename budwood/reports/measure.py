"""The report of a run, counted from what it wrote. Sizes in bytes, times in seconds."""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from budwood.checkpoints.description import Description
from budwood.checkpoints.writer import Writer
from budwood.environment import installed, machine, peak_device_memory, peak_memory, versions
from budwood.reports.record import MatrixReport, Report, Totals
from budwood.stream.arithmetic import name_of
from budwood.stream.model import Model


def measure(
    model: Model,
    writer: Writer,
    *,
    dense: Model,
    description: Description,
    source: str,
    method: str,
    data: dict[str, Any] | None,
    seconds: Mapping[int, float],
    notes: list[str],
) -> Report:
    """Everything that was measured.

    dense: the model before pruning. model: the one whose blocks were written; it may have fewer. description: what of
    them the configuration gives. seconds: by block, for the blocks that this process pruned.
    """
    matrices = matrices_of(model, writer)
    return {
        "budwood": installed("budwood"),
        "source": source,
        "method": method,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "data": data,
        "dtype": name_of(model.storage),
        "compute_dtype": name_of(dense.compute),
        "format": writer.layout,
        "needs_budwood": writer.needs_plug_in(description),
        "totals": totals_of(dense, model, writer, description, matrices),
        "blocks": [
            {
                "name": f"{model.path}.{index}",
                "seconds": seconds.get(index),
                "relative_error": writer.notes(index)["relative_error"],
                "units": writer.notes(index).get("units", {}),
            }
            for index in range(len(model))
        ],
        "linears": matrices,
        "seconds": {"blocks": sum(seconds.values())},
        "peak_memory": peak_memory(),
        "peak_device_memory": peak_device_memory(),
        "notes": notes,
    }


def matrices_of(model: Model, writer: Writer) -> dict[str, MatrixReport]:
    """Every pruned matrix by full name."""
    sizes = writer.sizes()
    matrices: dict[str, MatrixReport] = {}
    for index in range(len(model)):
        about = writer.about(index)
        for name, found in writer.notes(index)["linears"].items():
            count = max(1, found["shape"][0] * found["shape"][1])
            matrices[name] = {
                "shape": found["shape"],
                "format": about.packed.get(name, {"format": "dense"})["format"],
                "nonzeros": found["nonzeros"],
                "density": found["nonzeros"] / count,
                "recovered": None if found["recovered"] is None else found["recovered"] / count,
                "rounding_error": found.get("rounding_error"),
                "change": found.get("change"),
                "x4": found.get("x4"),
                # Experts that are fused again have no size of their own.
                "bytes": sizes.get(name, count * model.storage.itemsize),
            }
    return matrices


def parameters_of(model: Model, writer: Writer, description: Description) -> int:
    """Parameters of the written model, of which `model` was streamed."""
    before = {**model.shapes, **model.structure.shapes_in_files}
    grown = sum(math.prod(shape) - math.prod(before.get(name, [0])) for name, shape in writer.shapes().items())
    return model.structure.parameters + grown + sum(map(math.prod, description.zeros.values()))


def totals_of(
    dense: Model, model: Model, writer: Writer, description: Description, matrices: Mapping[str, MatrixReport]
) -> Totals:
    """Sums and means. Density, bits and the recovered share are of the weights in scope before pruning."""
    parameters, scope = dense.structure.parameters, dense.structure.in_scope
    counts = [matrix["shape"][0] * matrix["shape"][1] for matrix in matrices.values()]
    shares = [matrix["recovered"] for matrix in matrices.values() if matrix["recovered"] is not None]
    known = bool(shares) and len(shares) == len(matrices)
    weights = max(1, scope)
    return {
        "parameters": parameters,
        "parameters_after": parameters_of(model, writer, description),
        "in_scope": scope,
        "coverage": scope / parameters,
        "density": sum(matrix["nonzeros"] for matrix in matrices.values()) / weights,
        "recovered": sum(s * c for s, c in zip(shares, counts, strict=True)) / weights if known else None,
        "recovered_unweighted": sum(shares) / len(shares) if known else None,
        "bytes": writer.total_bytes(),
        "bytes_dense": parameters * dense.storage.itemsize,
        "bits_per_weight": 8 * sum(matrix["bytes"] for matrix in matrices.values()) / weights,
    }
