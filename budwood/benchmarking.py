"""Benchmark of a pruned model: each shape of matrix against torch's dense matmul, the model against the dense model.

What is compared is timed interleaved, in one process, with weights that are not in the cache: calls cycle through the
layers of one shape, packed and dense alike. Medians are given with the tenth and the ninetieth percentile.
"""

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

from budwood.checkpoints.decoding import decode_plainly
from budwood.checkpoints.loading import load
from budwood.environment import machine, peak_memory, versions
from budwood.errors import UsageError
from budwood.kernels import dispatch, native
from budwood.kernels.linear import SparseLinear
from budwood.progress import Progress, Silent
from budwood.reports.record import add_speed, read_report
from budwood.timing import interleaved, ratio, spread

ROWS = (1, 8, 64, 512)
ROUNDS = {1: 60, 8: 40, 64: 20}  # up to so many rows of activations
MANY_ROWS_ROUNDS = 8  # for more
COLD = 160 << 20  # bytes of weights to cycle through: more than the caches hold
PROMPT, NEW, REPEATS = 128, 32, 5  # tokens of prompt and answer, and number of runs


def bench(
    model: str | Path,
    against: str | Path | None = None,
    *,
    rows: Sequence[int] = ROWS,
    threads: int | None = None,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time `model`, a pruned folder; returns the figures, which are also added to its `report.json` and model card.

    against: the dense model; needed where no matrix is packed, as after the removal of heads and neurons. rows:
    numbers of activation rows (tokens at once) to time each matrix with. threads: number of torch's threads.
    Raises UsageError where there is nothing to compare, or a number of rows is below 1.
    """
    if not rows or min(rows) < 1:
        raise UsageError(f"rows must be positive numbers such as 1,8,64,512; got {','.join(map(str, rows))}")
    progress = progress or Silent()
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            return _bench(model, against, rows, dtype, trust_remote_code, progress)
    finally:
        torch.set_num_threads(before)


def _bench(
    model: str | Path,
    against: str | Path | None,
    rows: Sequence[int],
    dtype: str | torch.dtype,
    trust_remote_code: bool,
    progress: Progress,
) -> dict[str, Any]:
    read_report(Path(model))  # a damaged one is refused before the minutes of timing
    start = time.perf_counter()
    pruned = load(model, dtype=dtype, trust_remote_code=trust_remote_code)
    seconds = time.perf_counter() - start
    layers = group_by_shape(pruned)
    if not layers and against is None:
        raise UsageError(
            f"{model} holds no packed matrix, so only whole models can be compared; give the dense model with --against"
        )
    report: dict[str, Any] = {
        "machine": machine(),
        "versions": versions(),
        "kernels": native.why(),
        "dispatch": dispatch_choices(),
        "dtype": str(pruned.dtype).removeprefix("torch."),
        "seconds_to_load": seconds,
        "matrices": [],
        "model": {},
    }
    if layers:
        progress.start(len(layers), "timing matrices")
    for index, (shape, same) in enumerate(sorted(layers.items())):
        start = time.perf_counter()
        report["matrices"] += [time_matrix(shape, same, count) for count in rows]
        progress.block(index, f"{shape[0]} x {shape[1]}", time.perf_counter() - start)
    if layers:
        progress.finish()
    models = {"pruned": pruned}
    if against is not None:
        models["dense"] = load(against, dtype=pruned.dtype, trust_remote_code=trust_remote_code)
    for loaded in models.values():
        decode_plainly(loaded, model)
    report["model"] = time_models(models, progress)
    report["peak_memory"] = peak_memory()
    report["warnings"] = slowdowns(report)
    add_speed(Path(model), report)
    return report


def group_by_shape(model: PreTrainedModel) -> dict[tuple[int, int], list[SparseLinear]]:
    """The packed layers of a model by shape [out, in]."""
    groups: dict[tuple[int, int], list[SparseLinear]] = {}
    for module in model.modules():
        if isinstance(module, SparseLinear):
            groups.setdefault(module.shape, []).append(module)
    return groups


def time_matrix(shape: tuple[int, int], layers: Sequence[SparseLinear], rows: int) -> dict[str, Any]:
    """Time one shape of matrix with `rows` rows of activations: packed, dense in the same dtype, and reading alone."""
    dtype = layers[0].unpack().dtype
    for layer in layers:
        layer.shared_input = None  # each on its own here
        layer.native_matrix()
    packed = [packed_bytes(layer) for layer in layers]
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
    times = interleaved(variants, next((n for limit, n in ROUNDS.items() if rows <= limit), MANY_ROWS_ROUNDS))
    kernel = layers[0].native_matrix()
    name = "reference" if kernel is None else dispatch.NAMES[dispatch.kernel_for(kernel, rows, dtype)]
    result: dict[str, Any] = {
        "shape": list(shape),
        "rows": rows,
        "layers": len(layers),
        "kernel": f"{native.active()}, {name}",
        "seconds": {name: spread(found) for name, found in times.items()},
        "times_dense": ratio(times["dense"], times["pruned"]),
    }
    if "read" in times:
        result["share_of_read"] = ratio(times["read"], times["pruned"])
    return result


def time_models(models: Mapping[str, PreTrainedModel], progress: Progress) -> dict[str, Any]:
    """Time prefill of a prompt and greedy decoding after it, the models interleaved."""
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
        round_start = time.perf_counter()
        for key, run in variants.items():
            start = time.perf_counter()
            run()
            if turn:  # the first is a warm-up
                times[key].append(time.perf_counter() - start)
        progress.block(turn, f"round {turn}", time.perf_counter() - round_start)
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
            "read_per_token": bytes_read(model),
        }
    if "dense" in models:
        result["decode_times_dense"] = ratio(decode["dense"], decode["pruned"])
        result["prefill_times_dense"] = ratio(times["dense", "prefill"], times["pruned", "prefill"])
        result["fewer_bytes_read"] = result["dense"]["read_per_token"] / result["pruned"]["read_per_token"]
    return result


def bytes_read(model: PreTrainedModel) -> int:
    """Bytes of the parameters that every token reads: all but input embeddings that are not the head as well."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    unread = {parameter.data_ptr() for parameter in embeddings.parameters()}
    unread -= {parameter.data_ptr() for parameter in head.parameters()}
    return sum({p.data_ptr(): p.nbytes for p in model.parameters() if p.data_ptr() not in unread}.values())


def generate(model: PreTrainedModel, prompt: Tensor, tokens: int) -> Tensor:
    """Decode exactly `tokens` tokens greedily after `prompt` [1, tokens]."""
    return model.generate(  # type: ignore[operator, no-any-return]
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )


def packed_bytes(layer: SparseLinear) -> int:
    """Bytes of a layer's packed weight."""
    return sum(tensor.nbytes for tensor in layer.packed().values())


def dispatch_choices() -> list[dict[str, Any]]:
    """The measurements at load: the kernel chosen for each number of rows, and the seconds of every kernel."""
    return [
        {
            "dtype": str(kind[0]).removeprefix("torch."),
            "rows": rows,
            "kernel": dispatch.NAMES[choice.kernel],
            **choice.seconds,
        }
        for kind, found in dispatch.measured.items()
        for rows, choice in found.items()
    ]


def slowdowns(report: Mapping[str, Any]) -> list[str]:
    """A sentence for everything that is no faster than dense."""
    sentences = [
        f"{found['shape'][0]} x {found['shape'][1]} with {found['rows']} rows is no faster than dense "
        f"({found['times_dense']:.2f} times)"
        for found in report["matrices"]
        if found["times_dense"] < 1
    ]
    for what in ("decode", "prefill"):
        gain = report["model"].get(f"{what}_times_dense")
        if gain is not None and gain < 1:
            sentences.append(f"the whole model is no faster than the dense one at {what} ({gain:.2f} times)")
    return sentences
