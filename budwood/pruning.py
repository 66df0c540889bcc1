"""The main job: text in, blocks through a method, a folder that is really smaller out."""

import json
import re
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from budwood.calibration.arithmetic import dtype_named, faster_dtype, name_of
from budwood.calibration.stream import DEFAULT_LIMIT, Block, Model
from budwood.checkpoints.anatomy import Anatomy
from budwood.checkpoints.source import Source, open_source
from budwood.checkpoints.weights import storage_dtype
from budwood.checkpoints.writer import Writer, claim
from budwood.data.sources import Data
from budwood.data.tokens import Bos, tokenizer_for
from budwood.data.windows import Sampling, Windows, calibration_windows
from budwood.environment import installed, machine
from budwood.errors import RunError, UsageError
from budwood.evaluation.perplexity import bos_note, context, streamed_losses, with_bos
from budwood.evaluation.report import render_card, render_report
from budwood.formats import known_layout
from budwood.methods.expression import parse_method
from budwood.methods.method import Method
from budwood.progress import Progress, Silent


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
    none run none. dtype: type of the written weights. compute_dtype: "auto" times one product and takes the faster.
    activation_memory: bytes, or text such as "4GB".

    Raises UsageError for what cannot be (nothing is written), RunError when the run fails (finished blocks stay).
    """
    started = time.perf_counter()
    progress = progress or Silent()
    method = parse_method(method) if isinstance(method, str) else method
    layout, limit, place = known_layout(format), parse_bytes(activation_memory), known_device(device)
    opened, folder = open_source(source, trust_remote_code), Path(target).expanduser()
    if folder.resolve() == opened.folder.resolve():
        raise UsageError(f"{target} is the model to prune itself; give another folder")
    anatomy = Anatomy(opened.config, skip=skip, trust_remote_code=trust_remote_code)
    method.check(anatomy.shapes)
    storage = dtype_named(dtype) if dtype not in (None, "auto") else storage_dtype(opened.shards, opened.shards.names())
    windows = _windows(method, opened, data, num_samples, seq_length, sampling, seed, bos)

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
    report_file = folder / "report.json"
    if found and (folder / "config.json").is_file() and report_file.is_file():
        progress.note(f"{target} is finished already; nothing is left to do")
        return dict(json.loads(report_file.read_text("utf-8")))
    notes: list[str] = []

    def say(sentence: str | None) -> None:
        if sentence:
            notes.append(sentence)
            progress.note(sentence)

    compute, sentence = _compute(compute_dtype, found, anatomy, place, windows)
    say(sentence)
    recipe["computed_in"] = name_of(compute)
    model = Model(opened, storage=storage, compute=compute, device=place, skip=tuple(skip), activation_limit=limit)
    if windows and data is not None and not found:
        say(_first_look(model, windows, tokenizer_for(opened.folder, data)))

    writer = Writer(folder, recipe, len(model), layout)
    run = Run(model, method, windows, writer, progress)
    run.blocks()
    run.outside()
    report = run.report(str(source), notes)
    report["seconds"]["total"] = time.perf_counter() - started
    license_name = _license(opened)
    documents = {
        "report.json": json.dumps(report, indent=2) + "\n",
        "report.md": render_report(report),
        "README.md": render_card(report, str(source), license_name, type(model.module).__name__),
    }
    writer.finish(run.config(), opened.folder, documents)
    return report


@dataclass
class Run:
    """One pruning under way: what it works on, and what it found."""

    model: Model
    method: Method
    windows: Windows | None
    writer: Writer
    progress: Progress

    def blocks(self) -> None:
        """The loop itself; replays what an earlier run finished."""
        ids = self.windows.ids if self.windows else None
        self.seconds: dict[int, float] = {}
        done = sum(self.writer.finished(index) for index in range(len(self.model)))
        if done:
            self.progress.note(f"{done} of {len(self.model)} blocks are finished already; going on from there")
        step = self.method.prepare(self.model, ids)
        self.progress.start(len(self.model), f"pruning with {self.method}")
        try:
            before, last = time.perf_counter(), None
            for block in self.model.blocks(ids, self.writer):
                before = self._tell(last, before)
                step(block)
                last = block
            self._tell(last, before)
        finally:
            self.progress.finish()

    def _tell(self, block: Block | None, before: float) -> float:
        now = time.perf_counter()
        if block is not None:
            self.seconds[block.index] = now - before
            self.progress.block(block.index, block.name, now - before, block.relative_error)
        return now

    def outside(self) -> None:
        """The shard of everything that is in no block, copied in storage type."""
        if self.writer.finished(-1):
            return
        tensors: dict[str, Tensor] = {}
        for name in self.model.names_outside():
            tensors |= {full: self.model.stored(part) for full, part in self.model.weights.read([name]).items()}
        self.writer.write(-1, tensors, {}, {})

    def config(self) -> dict[str, Any]:
        """The source's config.json, with the type and the packing of what was written."""
        config = json.loads((self.model.source.folder / "config.json").read_text("utf-8"))
        config.pop("quantization_config", None)
        config.pop("torch_dtype", None)
        config["dtype"] = name_of(self.model.storage)
        if self.writer.layout != "dense":
            config["quantization_config"] = {
                "quant_method": "budwood",
                "format_version": 1,
                "recipe": str(self.method),
                "linears": {name: entry for packed, _ in self._said() for name, entry in packed.items()},
            }
        return config

    def _said(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        return [self.writer.about(index) for index in range(len(self.model))]

    def report(self, source: str, notes: list[str]) -> dict[str, Any]:
        """Everything that was measured, JSON-plain; sizes in bytes, times in seconds."""
        sizes = self.writer.sizes()
        linears: dict[str, Any] = {}
        blocks = []
        for index, (packed, said) in enumerate(self._said()):
            name = f"{self.model.path}.{index}"
            blocks.append({"name": name, "seconds": self.seconds.get(index), "relative_error": said["relative_error"]})
            for linear, entry in said["linears"].items():
                rows, columns = entry["shape"]
                linears[linear] = {
                    "shape": entry["shape"],
                    "format": packed.get(linear, {"format": "dense"})["format"],
                    "nonzeros": entry["nonzeros"],
                    "density": entry["nonzeros"] / (rows * columns),
                    "recovered": None if entry["recovered"] is None else entry["recovered"] / (rows * columns),
                    "bytes": sizes.get(linear, rows * columns * self.model.storage.itemsize),
                }
        return {
            "budwood": installed("budwood"),
            "source": source,
            "method": str(self.method),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "data": self.windows.record if self.windows else None,
            "dtype": name_of(self.model.storage),
            "compute_dtype": name_of(self.model.compute),
            "format": self.writer.layout,
            "totals": self._totals(linears),
            "blocks": blocks,
            "linears": linears,
            "seconds": {"blocks": sum(self.seconds.values())},
            "peak_memory": peak_memory(),
            "notes": notes,
        }

    def _totals(self, linears: dict[str, Any]) -> dict[str, Any]:
        counts = [rows * columns for rows, columns in (entry["shape"] for entry in linears.values())]
        scope = sum(counts)
        parameters = sum(parameter.numel() for parameter in self.model.module.parameters())
        shares = [entry["recovered"] for entry in linears.values()]
        known = bool(shares) and None not in shares
        return {
            "parameters": parameters,
            "in_scope": scope,
            "coverage": scope / parameters,
            "density": sum(entry["nonzeros"] for entry in linears.values()) / max(1, scope),
            "recovered": sum(s * c for s, c in zip(shares, counts, strict=True)) / scope if known else None,
            "recovered_unweighted": sum(shares) / len(shares) if known else None,
            "bytes": self.writer.total_bytes(),
            "bytes_dense": parameters * self.model.storage.itemsize,
            "bits_per_weight": 8 * sum(entry["bytes"] for entry in linears.values()) / max(1, scope),
        }


def _windows(
    method: Method,
    source: Source,
    data: Data | None,
    num_samples: int,
    seq_length: int,
    sampling: Sampling,
    seed: int,
    bos: Bos,
) -> Windows | None:
    if not method.calibrated:
        return None
    if data is None:
        raise UsageError(f"{method} chooses by activations and needs text: give --data FILE, or a name such as sotu")
    return calibration_windows(
        data,
        tokenizer_for(source.folder, data),
        num_samples=num_samples,
        seq_length=min(seq_length, context(source.config)),
        sampling=sampling,
        seed=seed,
        bos=bos,
    )


def _compute(
    asked: str, found: dict[str, Any] | None, anatomy: Anatomy, device: torch.device, windows: Windows | None
) -> tuple[torch.dtype, str | None]:
    """The type of the forward passes: what was asked, what the interrupted run had chosen, or the faster one."""
    if asked != "auto":
        return dtype_named(asked), None
    if found and "computed_in" in found:
        return dtype_named(found["computed_in"]), None
    if windows is None:
        return torch.float32, None
    width = max(columns for _, columns in anatomy.shapes.values())
    return faster_dtype(device, min(width, 2048))


def _first_look(model: Model, windows: Windows, tokenizer: Any) -> str | None:
    """Runs the start of the first window through the dense model; RunError when that is broken before pruning."""
    pair = with_bos(windows.ids[:1], tokenizer)
    losses = streamed_losses(model, windows.ids[:1, :512] if pair is None else pair)
    if not all(map(torch.isfinite, torch.tensor(losses))):
        raise RunError(
            f"the loss of the dense model {model.source.name} is no number in {name_of(model.compute)}; its checkpoint is "
            "broken, or it needs --compute-dtype float32"
        )
    return bos_note(*losses) if pair is not None else None


def known_device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or "cpu")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def parse_bytes(amount: int | str) -> int:
    """4294967296, "4GB", "500 MB", "0": bytes, with units of 1024."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?\s*", str(amount), re.IGNORECASE)
    if not match:
        raise UsageError(f"{amount!r} is no amount of memory; write for example 4GB")
    return int(float(match[1]) * 1024 ** " kmgt".index(match[2].lower() or " "))


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _license(source: Source) -> str | None:
    card = source.folder / "README.md"
    found = re.search(r"^license:\s*(\S+)\s*$", card.read_text("utf-8"), re.MULTILINE) if card.is_file() else None
    return found[1] if found else None
