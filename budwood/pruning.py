"""The main job: text in, blocks through a method, a folder that is really smaller out."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from budwood.bookkeeping import account
from budwood.checkpoints.source import open_source
from budwood.checkpoints.structure import ModelStructure
from budwood.checkpoints.weights import storage_dtype
from budwood.checkpoints.writer import Writer, claim
from budwood.data.sources import Data
from budwood.data.tokens import Bos, tokenizer_for
from budwood.data.windows import Sampling, calibration_windows
from budwood.environment import installed
from budwood.errors import RunError, UsageError
from budwood.evaluation.perplexity import BOS_TOKENS, bos_note, context, streamed_losses, with_bos
from budwood.evaluation.report import render_card, render_report
from budwood.formats import known_layout
from budwood.humanize import parse_bytes
from budwood.methods.expression import parse_method
from budwood.methods.method import Method
from budwood.models.linears import unmatched
from budwood.progress import Progress, Silent
from budwood.stream.arithmetic import Arithmetic, choose_arithmetic, dtype_named, known_device, name_of
from budwood.stream.block import Block
from budwood.stream.model import DEFAULT_LIMIT, Model


def prune(
    source: str | Path,
    target: str | Path,
    method: str | Method,
    data: Data | None = None,
    *,
    num_samples: int = 128,
    seq_length: int = 2048,
    sampling: Sampling = "random",
    seed: int = 0,
    bos: Bos = "auto",
    format: str = "auto",
    values: str | None = None,
    dtype: str | None = None,
    compute_dtype: str = "auto",
    device: str | None = None,
    skip: Sequence[str] = (),
    overwrite: bool = False,
    activation_memory: int | str = DEFAULT_LIMIT,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Prunes `source` with `method` into the folder `target`, and returns the report that is also written there.

    The same call goes on where an earlier one was cut off. source: folder or hub name. method: an expression such as
    'wrp(alpha=0.25)', or the method itself. data: calibration text (see `calibration_windows`); methods that need
    none run none. values: "int8" rounds the kept weights, which later blocks see. dtype: type of the written weights.
    compute_dtype: "auto" times one product and takes the faster. activation_memory: bytes, or text such as "4GB".

    Raises UsageError for what cannot be (nothing is written), RunError when the run fails (finished blocks stay).
    """
    started = time.perf_counter()
    notes = Notes(progress or Silent())
    method = parse_method(method) if isinstance(method, str) else method
    layout, place = known_layout(format, values), known_device(device)
    opened, folder = open_source(source, trust_remote_code), Path(target).expanduser()
    if folder.resolve() == opened.folder.resolve():
        raise UsageError(f"{target} is the model to prune itself; give another folder")
    structure = ModelStructure(opened.config, skip=skip, trust_remote_code=trust_remote_code)
    for sentence in unmatched(structure.module, skip):
        notes.say(sentence)
    method.check(structure.shapes)
    storage = storage_dtype(opened.shards) if dtype in (None, "auto") else dtype_named(str(dtype))

    windows = tokenizer = None
    if method.calibrated:
        if data is None:
            raise UsageError(
                f"{method} chooses by activations and needs text: give --data FILE, or a name such as sotu"
            )
        tokenizer = tokenizer_for(opened.folder, data)
        length = min(seq_length, context(opened.config))
        windows = calibration_windows(
            data, tokenizer, num_samples=num_samples, seq_length=length, sampling=sampling, seed=seed, bos=bos
        )
    recipe = {
        "budwood": installed("budwood"),
        "method": str(method),
        "source": {"name": str(source), "sha256": opened.fingerprint},
        "data": windows.record if windows else None,
        "dtype": name_of(storage),
        "compute_dtype": compute_dtype,
        "format": layout,
        "skip": list(skip),
    }
    found = claim(folder, recipe, overwrite)
    if found and (folder / "config.json").is_file() and (folder / "report.json").is_file():
        notes.say(f"{target} is finished already; nothing is left to do")
        return dict(json.loads((folder / "report.json").read_text("utf-8")))

    if found:
        arithmetic = Arithmetic.recorded(found)  # a resumed run goes on as it began
    else:
        widest = max(columns for _, columns in structure.shapes.values())
        wanted = compute_dtype if windows or compute_dtype != "auto" else "float32"
        ways = ("auto", "auto") if windows else ("off", "fused")
        arithmetic, sentences = choose_arithmetic(wanted, *ways, place, widest, method.published)
        for sentence in sentences:
            notes.say(sentence)
    limit = parse_bytes(activation_memory)
    model = Model(
        opened,
        storage=storage,
        arithmetic=arithmetic,
        device=place,
        skip=skip,
        activation_limit=limit,
    )
    if windows and not found:
        notes.say(first_look(model, windows.ids, tokenizer))

    writer = Writer(folder, {**recipe, **arithmetic.record()}, len(model), layout)
    model.scratch = folder  # hidden states beyond the limit lie on the disk that is written to anyway
    seconds = through_blocks(model, method, windows.ids if windows else None, writer, notes.progress)
    writer.write_outside(model.names_outside(), model.read_outside)
    report = account(model, writer, seconds, notes.said, str(source), str(method))
    report["seconds"]["total"] = time.perf_counter() - started
    base = None if opened.is_local else str(source)
    documents = {
        "report.json": json.dumps(report, indent=2) + "\n",
        "report.md": render_report(report),
        "README.md": render_card(report, base, opened.license, type(model.module).__name__),
    }
    writer.finish(opened.folder, str(method), documents)
    return report


class Notes:
    """What the user should know, said at once and kept for the report."""

    def __init__(self, progress: Progress):
        self.progress = progress
        self.said: list[str] = []

    def say(self, sentence: str | None) -> None:
        if sentence:
            self.said.append(sentence)
            self.progress.note(sentence)


def through_blocks(
    model: Model, method: Method, ids: Tensor | None, writer: Writer, progress: Progress
) -> dict[int, float]:
    """The loop itself; what an earlier run finished is replayed. Returns the seconds of every block done here.

    A block's time runs until the next one is handed over: reading, statistics, choice, propagation, writing.
    """
    done = sum(writer.finished(index) for index in range(len(model)))
    if done:
        progress.note(f"{done} of {len(model)} blocks are finished already; going on from there")
    seconds: dict[int, float] = {}
    step = method.prepare(model, ids)
    last: Block | None = None
    before = time.perf_counter()

    def tell(block: Block | None) -> None:
        nonlocal before
        now = time.perf_counter()
        if block is not None:
            seconds[block.index] = now - before
            progress.block(block.index, block.name, now - before, block.relative_error)
        before = now

    progress.start(len(model), f"pruning with {method}")
    try:
        for block in model.blocks(ids, writer):
            tell(last)
            step(block)
            last = block
        tell(last)
    finally:
        progress.finish()
    return seconds


def first_look(model: Model, ids: Tensor, tokenizer: Any) -> str | None:
    """Runs the start of the first window through the dense model, with a start token and without.

    Returns the advice to use one where it helps; RunError when the dense model is broken already.
    """
    pair = with_bos(ids[:1], tokenizer)
    losses = streamed_losses(model, ids[:1, :BOS_TOKENS] if pair is None else pair)
    if not all(map(math.isfinite, losses)):
        raise RunError(
            f"the loss of the dense model {model.source.name} is no number in {name_of(model.compute)}; "
            "its checkpoint is broken, or it needs --compute-dtype float32"
        )
    return bos_note(*losses) if pair is not None else None
