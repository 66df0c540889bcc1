"""How fast a pruned model is: each shape of matrix against torch's dense product, the whole model against a dense one.

Everything that is compared is timed in turns, in one process, with weights that have left the cache: the layers of one
shape take turns, packed and dense alike. Medians are given with what lies between a tenth and nine tenths.
"""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from budwood.checkpoints.loading import load
from budwood.environment import machine, peak_memory
from budwood.errors import UsageError
from budwood.evaluation.report import with_speed
from budwood.kernels import dispatch, native
from budwood.kernels.linear import SparseLinear
from budwood.progress import Progress, Silent
from budwood.timing import interleaved, ratio, spread

ROWS = (1, 8, 64, 512)
ROUNDS = {1: 60, 8: 40, 64: 20}  # by the largest number of rows; more of them take fewer rounds
FEWEST = 8
COLD = 160 << 20  # bytes of weights that take turns: more than caches hold
PROMPT, NEW, REPEATS = 128, 32, 5  # tokens, and how often a model generates


def bench(
    model: str | Path,
    against: str | Path | None = None,
    *,
    rows: Sequence[int] = ROWS,
    threads: int | None = None,
    dtype: str | torch.dtype = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Times `model`, a pruned folder, and returns what is also kept in its `report.json` and model card.

    against: the dense model. rows: numbers of activations (tokens at once) to time each matrix with. threads: torch's.
    Raises UsageError where the model has no packed matrix, or a number of rows is no positive number.
    """
    if not rows or min(rows) < 1:
        raise UsageError(f"rows must be positive numbers such as 1,8,64,512; got {','.join(map(str, rows))}")
    progress = progress or Silent()
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            return _bench(model, against, rows, dtype, progress)
    finally:
        torch.set_num_threads(before)


def _bench(
    model: str | Path, against: str | Path | None, rows: Sequence[int], dtype: str | torch.dtype, progress: Progress
) -> dict[str, Any]:
    start = time.perf_counter()
    pruned = load(model, dtype=dtype)
    seconds = time.perf_counter() - start
    layers = by_shape(pruned)
    if not layers:
        raise UsageError(f"{model} holds no packed matrix; give a folder that budwood prune wrote")
    report: dict[str, Any] = {
        "machine": machine(),
        "kernels": native.why(),
        "dispatch": described_dispatch(),
        "dtype": str(pruned.dtype).removeprefix("torch."),
        "seconds_to_load": seconds,
        "matrices": [],
        "model": {},
    }
    progress.start(len(layers), "timing matrices")
    for index, (shape, same) in enumerate(sorted(layers.items())):
        start = time.perf_counter()
        report["matrices"] += [matrix(shape, same, count) for count in rows]
        progress.block(index, f"{shape[0]} x {shape[1]}", time.perf_counter() - start)
    progress.finish()
    models = {"pruned": pruned}
    if against is not None:
        models["dense"] = load(against, dtype=pruned.dtype)
    report["model"] = whole(models, progress)
    report["peak_memory"] = peak_memory()
    report["warnings"] = warnings(report)
    keep(Path(model), report)
    return report


def by_shape(model: PreTrainedModel) -> dict[tuple[int, int], list[SparseLinear]]:
    """The packed layers of a model, those of one shape together."""
    found: dict[tuple[int, int], list[SparseLinear]] = {}
    for module in model.modules():
        if isinstance(module, SparseLinear):
            found.setdefault(module.shape, []).append(module)
    return found


def matrix(shape: tuple[int, int], layers: Sequence[SparseLinear], rows: int) -> dict[str, Any]:
    """One shape of matrix with so many rows of activations: packed, dense in the same type, and reading alone."""
    dtype = layers[0].unpack().dtype
    for layer in layers:
        layer.shared_input = None  # each on its own here
        layer.kernel()
    packed = [bytes_of(layer) for layer in layers]
    copies = max(1, min(len(layers), -(-COLD // (2 * shape[0] * shape[1]))))
    dense = [layer.unpack() for layer in layers[:copies]]
    x = torch.randn(rows, shape[1]).to(dtype)
    variants: dict[str, Callable[[int], object]] = {
        "pruned": lambda turn: layers[turn % len(layers)].product(x),
        "dense": lambda turn: F.linear(x, dense[turn % copies]),
    }
    library = native.library()
    if library is not None and rows == 1:
        memory = torch.zeros(COLD, dtype=torch.uint8)
        size, threads = int(statistics.mean(packed)), torch.get_num_threads()
        places = max(1, COLD // max(size, 1) - 1)
        variants["read"] = lambda turn: library.budwood_read(memory.data_ptr() + turn % places * size, size, threads)
    times = interleaved(variants, next((n for limit, n in ROUNDS.items() if rows <= limit), FEWEST))
    kernel = layers[0].kernel()
    way = "reference" if kernel is None else dispatch.NAMES[dispatch.way(kernel, rows, dtype)]
    result: dict[str, Any] = {
        "shape": list(shape),
        "rows": rows,
        "layers": len(layers),
        "kernel": f"{native.active()}, {way}",
        "seconds": {name: spread(found) for name, found in times.items()},
        "times_dense": ratio(times["dense"], times["pruned"]),
    }
    if "read" in times:
        result["share_of_read"] = ratio(times["read"], times["pruned"])
    return result


def whole(models: Mapping[str, PreTrainedModel], progress: Progress) -> dict[str, Any]:
    """Prefill of a prompt and greedy generation after it, the models in turns."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(int(model.config.vocab_size) for model in models.values())
    prompt = torch.randint(0, vocabulary, (1, PROMPT), generator=generator)
    steps = {"prefill": 1, "both": 1 + NEW}
    variants = {
        (name, step): partial(generate, model, prompt, tokens)
        for name, model in models.items()
        for step, tokens in steps.items()
    }
    times: dict[tuple[str, str], list[float]] = {key: [] for key in variants}
    progress.start(REPEATS + 1, "timing whole models")
    for turn in range(REPEATS + 1):
        begun = time.perf_counter()
        for key, run in variants.items():
            start = time.perf_counter()
            run()
            if turn:  # the first is not counted
                times[key].append(time.perf_counter() - start)
        progress.block(turn, f"turn {turn}", time.perf_counter() - begun)
    progress.finish()
    result: dict[str, Any] = {"prompt": PROMPT, "new_tokens": NEW}
    decode = {
        name: [(both - first) / NEW for both, first in zip(times[name, "both"], times[name, "prefill"], strict=True)]
        for name in models
    }
    for name, model in models.items():
        result[name] = {
            "prefill_tokens_per_second": PROMPT / statistics.median(times[name, "prefill"]),
            "decode_tokens_per_second": 1 / statistics.median(decode[name]),
            "decode_seconds": spread(decode[name]),
            "bytes": sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values()),
        }
    if "dense" in models:
        result["decode_times_dense"] = ratio(decode["dense"], decode["pruned"])
        result["prefill_times_dense"] = ratio(times["dense", "prefill"], times["pruned", "prefill"])
    return result


def generate(model: PreTrainedModel, prompt: Tensor, tokens: int) -> Tensor:
    """Exactly so many tokens, greedily."""
    return model.generate(  # type: ignore[operator, no-any-return]
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )


def bytes_of(layer: SparseLinear) -> int:
    """Bytes of a layer's packed weight."""
    return sum(tensor.nbytes for tensor in layer.packed().values())


def described_dispatch() -> list[dict[str, Any]]:
    """What was measured at load: the way for each number of rows, and the seconds of all."""
    return [
        {
            "dtype": str(kind[0]).removeprefix("torch."),
            "rows": rows,
            "way": dispatch.NAMES[choice.way],
            **choice.seconds,
        }
        for kind, found in dispatch.measured.items()
        for rows, choice in found.items()
    ]


def warnings(report: Mapping[str, Any]) -> list[str]:
    """A sentence wherever pruning brought no gain in time."""
    said = [
        f"{found['shape'][0]} x {found['shape'][1]} with {found['rows']} rows is no faster than dense "
        f"({found['times_dense']:.2f} times)"
        for found in report["matrices"]
        if found["times_dense"] < 1
    ]
    for what in ("decode", "prefill"):
        gain = report["model"].get(f"{what}_times_dense")
        if gain is not None and gain < 1:
            said.append(f"the whole model is no faster than the dense one at {what} ({gain:.2f} times)")
    return said


def keep(folder: Path, report: dict[str, Any]) -> None:
    """Put the figures into the folder's `report.json` and model card, where it has them."""
    written = folder / "report.json"
    if written.is_file():
        known = json.loads(written.read_text("utf-8"))
        written.write_text(json.dumps({**known, "speed": report}, indent=2) + "\n", "utf-8")
    card = folder / "README.md"
    if card.is_file():
        card.write_text(with_speed(card.read_text("utf-8"), report), "utf-8")
