"""A prediction of pruning, from the configuration alone: scope, bytes in every format, memory, time."""

import functools
import time
from collections import Counter
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch

from budwood.checkpoints.meta_model import read_config, stays_float32
from budwood.checkpoints.reader import Shards
from budwood.checkpoints.sidecars import read_config_json
from budwood.checkpoints.source import open_source, quantization_of
from budwood.checkpoints.structure import ModelStructure
from budwood.checkpoints.weights import storage_dtype
from budwood.errors import UsageError
from budwood.formats import FORMATS, known_layout, predict
from budwood.methods.expression import parse_method
from budwood.methods.method import Method, layout_of, values_of
from budwood.models.linears import skipped, unmatched, unsplit
from budwood.stream.arithmetic import TYPES, dtype_named, name_of
from budwood.stream.model import DEFAULT_LIMIT

BASE_MEMORY = 500_000_000  # bytes of Python, torch and transformers before weights are read
PASSES = 1.75  # forward passes over the blocks: statistics without the last linear, then the pruned block
HEAD_SHARE = 0.5  # of the written bytes; above it a note mentions the unpruned weights


def plan(
    source: str | Path,
    method: str | Method,
    *,
    format: str = "auto",
    values: str | None = None,
    dtype: str | None = None,
    skip: Sequence[str] = (),
    num_samples: int = 128,
    seq_length: int = 2048,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Scope, predicted bytes per format (tensors, in storage type), memory and time, JSON-plain.

    source: a folder, a hub name, or a single config.json. The recovered part of `wrp(alpha=...)` is the expectation
    for independent scores; real models are some per cent above it. A fixed `density` is exact.
    Raises UsageError and RunError as `prune` would as far as headers tell, and where a named format cannot hold a
    matrix.
    """
    method = parse_method(method) if isinstance(method, str) else method
    layout = known_layout(format, values_of(method, values))
    structure, config, shards = open_model(source, skip, trust_remote_code)
    storage = storage_of(dtype, config, shards)
    predicted = prediction(structure, config, storage, method, layout, num_samples * seq_length)
    predicted["notes"] = unmatched(structure.module, skip) + predicted["notes"]
    return {"source": str(source), **predicted}


def prediction(
    structure: ModelStructure, config: Any, storage: torch.dtype, method: Method, layout: str, tokens: int
) -> dict[str, Any]:
    """What `plan` gives for a structure that is open already. tokens: of the calibration text.

    Raises UsageError as `plan`.
    """
    structure.check_scope()
    method.check(structure.shapes)
    method.check_structure(structure)
    layout = layout_of(layout, method, structure)
    reduced = method.reduced(structure)
    dense = structure.in_scope * storage.itemsize + _unpruned_bytes(structure, storage)
    unpruned = _unpruned_bytes(reduced, storage)
    formats = {name: _total(name, structure, method, storage.itemsize, unpruned, dense) for name in (*FORMATS, layout)}
    chosen = formats[layout]
    weights = _weights(structure, method)
    fewer_experts = reduced is not structure and len(reduced.modules) == len(structure.modules)  # a token has as many
    if chosen is None:
        fitting = ", ".join(name for name, sizes in formats.items() if sizes)
        raise UsageError(f"{layout} cannot hold the result of {method}; choose one of {fitting}")
    return {
        "method": str(method),
        "dtype": name_of(storage),
        "parameters": structure.parameters,
        "in_scope": structure.in_scope,
        "coverage": structure.in_scope / structure.parameters,
        "parameters_after": reduced.parameters - reduced.in_scope + weights + method.added_parameters(structure),
        "blocks": _blocks(structure, method),
        "speed_up": _speed_up(structure, weights) if weights < structure.in_scope and not fewer_experts else None,
        "linears": _rows(structure),
        "skipped": _group_by_reason(skipped(structure.module, structure.skip)),
        "formats": {name: sizes for name, sizes in formats.items() if name in FORMATS},
        "chosen": layout if layout in FORMATS else _most_common_format(layout, structure, method, storage.itemsize),
        "bytes_dense": dense,
        "bytes_after": chosen["bytes"] + method.added_parameters(structure) * storage.itemsize,
        "work_bytes": method.work_bytes(structure, storage.itemsize),
        "bits_per_weight": chosen["bits_per_weight"],
        "memory_peak": _memory(structure, method, storage.itemsize, tokens, config),
        "seconds": _seconds(structure, method, tokens),
        "notes": _notes(structure, unpruned, chosen["bytes"], method),
    }


def open_model(
    source: str | Path, skip: Sequence[str], trust_remote_code: bool
) -> tuple[ModelStructure, Any, Shards | None]:
    """Structure, configuration and shards of a model; no shards where there is only a configuration."""
    path = Path(source).expanduser()
    if path.suffix == ".json" and path.is_file():
        config = read_config(path, trust_remote_code)
        quantization_of(read_config_json(path), str(source))
        return ModelStructure(config, skip=skip, trust_remote_code=trust_remote_code), config, None
    opened = open_source(source, trust_remote_code)
    has_weights = any(opened.folder.glob("*.safetensors"))
    structure = opened.structure(skip)
    if not has_weights:
        return structure, opened.config, None
    opened.refuse_missing(structure)
    return structure, opened.config, opened.shards


def storage_of(dtype: str | None, config: Any, shards: Shards | None) -> torch.dtype:
    """The dtype of the written weights: as asked for, or that of the source."""
    if dtype not in (None, "auto"):
        return dtype_named(dtype)
    if shards is not None:
        return storage_dtype(shards)
    named = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return TYPES.get(named, torch.float32)


def _unpruned_bytes(structure: ModelStructure, storage: torch.dtype) -> int:
    """Bytes of the tensors not in scope: embeddings, head, norms, biases, skipped linear layers."""
    wide = stays_float32(structure.module, storage)
    tied = set(getattr(structure.module, "all_tied_weights_keys", None) or {})
    scope = {f"{name}.weight" for name in structure.linears}
    return sum(
        tensor.numel() * (storage.itemsize if tensor.is_floating_point() and not wide(name) else tensor.element_size())
        for name, tensor in structure.module.state_dict().items()
        if name not in tied and name not in scope
    )


def _total(
    layout: str, structure: ModelStructure, method: Method, itemsize: int, unpruned: int, dense: int
) -> dict[str, Any] | None:
    """Bytes of the whole model in one layout; None where the layout cannot hold a matrix."""
    try:
        linears = sum(size * count for _, size, count in _packed(layout, structure, method, itemsize))
    except UsageError:
        return None
    return {
        "bytes": linears + unpruned,
        "share_of_dense": (linears + unpruned) / dense,
        "bits_per_weight": 8 * linears / max(1, structure.in_scope),
    }


def _packed(layout: str, structure: ModelStructure, method: Method, itemsize: int) -> list[tuple[str, int, int]]:
    """(format, bytes of one matrix, count) for each kind; UsageError where `layout` cannot hold one."""
    shapes = structure.shapes
    kinds = Counter((forecast, forecast.shape or shapes[name]) for name, forecast in method.forecast(structure).items())
    return [(*predict(shape, forecast, itemsize, layout), count) for (forecast, shape), count in kinds.items()]


def _weights(structure: ModelStructure, method: Method) -> int:
    """Places of all matrices in scope after pruning, zeros among them."""
    return sum(prod(found.shape or structure.shapes[name]) for name, found in method.forecast(structure).items())


def _blocks(structure: ModelStructure, method: Method) -> list[dict[str, Any]]:
    """Per block the units of each kind that are expected to stay, and of how many; empty where none are removed."""
    found = method.forecast(structure)
    rows: list[dict[str, Any]] = []
    removed = False
    for name, sets in structure.units.items():
        counts: dict[str, list[int]] = {}
        for units in sets.values():
            shape = getattr(found.get(f"{name}.{units.consumer}"), "shape", None)
            stay = len(units) if shape is None else shape[1] // units.columns.shape[1]
            removed |= stay < len(units)
            kept, of = counts.get(units.kind, [0, 0])
            counts[units.kind] = [kept + stay, of + len(units)]
        rows.append({"name": name, **counts})
    return rows if removed else []


def _speed_up(structure: ModelStructure, after: int) -> float:
    """How many times fewer weights are read for a token: those of the blocks and of the head."""
    head = structure.module.get_output_embeddings().weight.numel()
    return (structure.in_scope + head) / (after + head)


def _most_common_format(layout: str, structure: ModelStructure, method: Method, itemsize: int) -> str:
    """The format of most matrices in a layout that chooses one for each."""
    counts: Counter[str] = Counter()
    for name, _, count in _packed(layout, structure, method, itemsize):
        counts[name] += count
    return counts.most_common(1)[0][0] if counts else "dense"


def _rows(structure: ModelStructure) -> list[dict[str, Any]]:
    """One row for all matrices whose names differ only in the numbers of block and expert."""
    rows: dict[tuple[str, tuple[int, int]], int] = Counter()
    for name, shape in structure.shapes.items():
        rows[".".join("*" if part.isdigit() else part for part in name.split(".")), shape] += 1
    return [
        {"name": name, "shape": list(shape), "count": count, "pruned": True, "reason": None}
        for (name, shape), count in rows.items()
    ]


def _group_by_reason(reasons: dict[str, str]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        grouped.setdefault(reason, []).append(name)
    return grouped


def _memory(structure: ModelStructure, method: Method, itemsize: int, tokens: int, config: Any) -> int:
    """Estimated peak bytes of `prune`: one block as stored and in float32, the next block, the activations."""
    block = sum(parameter.numel() for parameter in structure.modules[0].parameters())
    hidden = int(getattr(config, "hidden_size", None) or 0)
    largest = max((rows * columns for rows, columns in structure.shapes.values()), default=0)
    outside = (structure.parameters - sum(p.numel() for p in structure.modules.parameters())) * 4
    activations = min(tokens * hidden * 4, DEFAULT_LIMIT) if method.calibrated else 0
    return BASE_MEMORY + max(block * (2 * itemsize + 4) + 12 * largest, outside) + activations


def _seconds(structure: ModelStructure, method: Method, tokens: int) -> float:
    """Estimated seconds of the forward passes, from a float32 matmul timed on this machine."""
    return PASSES * structure.in_scope * tokens * seconds_per_product() if method.calibrated else 0.0


@functools.cache
def seconds_per_product() -> float:
    """Seconds that one weight takes for one token, from a float32 matmul timed on this machine."""
    rows, width = 512, 1024
    left, right = torch.randn(rows, width), torch.randn(width, width)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - start)
    return best / (rows * width * width)


def _notes(structure: ModelStructure, unpruned: int, total: int, method: Method) -> list[str]:
    notes = [note] if (note := unsplit(structure.module)) else []
    if unpruned > HEAD_SHARE * total:
        notes.append(f"embeddings, head and norms are not pruned and are {unpruned / total:.0%} of the written bytes")
    if not method.calibrated:
        notes.append("no calibration data is needed: no forward pass is run")
    return notes
