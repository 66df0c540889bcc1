"""The main job: text in, blocks through a method, a folder that is really smaller out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from budwood.checkpoints.source import Source, open_source
from budwood.checkpoints.structure import ModelStructure
from budwood.checkpoints.weights import storage_dtype
from budwood.data.sources import Data
from budwood.data.tokens import Bos, check_vocabulary, tokenizer_for
from budwood.data.windows import Sampling, Windows, calibration_windows
from budwood.errors import RunError, UsageError
from budwood.evaluation.perplexity import BOS_TOKENS, bos_note, streamed_losses, with_bos
from budwood.evaluation.subject import context
from budwood.formats import known_layout
from budwood.humanize import parse_bytes
from budwood.methods import parse_method
from budwood.methods.method import Method, layout_of, values_of
from budwood.models.linears import unmatched, unsplit
from budwood.progress import Progress
from budwood.reports.record import Report
from budwood.runs.recipe import Recipe
from budwood.runs.run import Run
from budwood.stream.arithmetic import (
    Arithmetic,
    check_arithmetic,
    choose_arithmetic,
    dtype_named,
    known_device,
    name_of,
)
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
    sparse_products: str = "auto",
    attention: str = "auto",
    device: str | None = "auto",
    skip: Sequence[str] = (),
    overwrite: bool = False,
    activation_memory: int | str = DEFAULT_LIMIT,
    trust_remote_code: bool = False,
    like: Recipe | None = None,
    progress: Progress | None = None,
) -> Report:
    """Prunes `source` with `method` into the folder `target`; returns the report that is also written there.

    The same call continues where an earlier one was interrupted. source: folder or hub name. method: an expression
    such as 'wrp(alpha=0.25)', or the method itself. data: calibration text (see `calibration_windows`); methods that
    need none run nothing forward. values: "int8" or "int4" rounds the kept weights, which later blocks see; a method
    with `values` of its own has fitted them. dtype: of the written weights. compute_dtype, sparse_products ("on",
    "off"), attention ("fused", "blocked"): how the forward passes compute; "auto" tries what is fastest here, and the
    recipe records it. activation_memory: bytes, or text such as "4GB". overwrite: replace what budwood wrote to
    `target` before, once the new folder is complete. like: the recipe that the folder is to repeat (see
    `recipe_options`); another source or text than its own is noted.

    Raises UsageError for what cannot be (nothing is written), RunError when the run fails (finished blocks stay).
    """
    method = parse_method(method) if isinstance(method, str) else method
    job = Job.of(
        source,
        target,
        method,
        known_layout(format, values_of(method, values)),
        dtype,
        {"compute_dtype": compute_dtype, "sparse_products": sparse_products, "attention": attention},
        known_device(device),
        skip,
        parse_bytes(activation_memory),
        trust_remote_code,
    )
    job.calibrate(data, num_samples=num_samples, seq_length=seq_length, sampling=sampling, seed=seed, bos=bos)
    with Run.open(target, job.recipe(), job.source, overwrite=overwrite, progress=progress) as run:
        if run.report is not None:
            return run.report
        if like is not None and like.source.get("sha256") == run.recipe.source["sha256"]:
            run.reading.expected = like.source.get("content")
        for sentence in [*unmatched(job.structure.module, skip), *job.differences(like)]:
            run.note(sentence)
        run.note(unsplit(job.structure.module))
        model = job.model(run)
        step = job.method.prepare(model, job.ids, run.work)
        run.stream(step.model(model))
        for block in run.blocks(step.inputs(job.ids), f"pruning with {job.method}"):
            step(block)
        step.finish(run)
        base_model = None if job.source.is_local else job.source.name
        return run.finish(base_model, job.source.license)


@dataclass
class Job:
    """What is asked for, checked as far as it can be before anything is written."""

    source: Source
    method: Method
    layout: str
    storage: torch.dtype
    asked: dict[str, str]  # arithmetic options
    device: torch.device
    skip: Sequence[str]
    activation_limit: int
    structure: ModelStructure
    windows: Windows | None = None
    tokenizer: Any = None

    @classmethod
    def of(
        cls,
        source: str | Path,
        target: str | Path,
        method: Method,
        layout: str,
        dtype: str | None,
        asked: dict[str, str],
        device: torch.device,
        skip: Sequence[str],
        activation_limit: int,
        trust_remote_code: bool,
    ) -> "Job":
        opened = open_source(source, trust_remote_code)
        if Path(target).expanduser().resolve() == opened.folder.resolve():
            raise UsageError(f"{target} is the model to prune itself; give another folder")
        structure = opened.structure(skip=skip)
        structure.check_scope()
        method.check(structure.shapes)
        method.check_structure(structure)
        layout = layout_of(layout, method, structure)
        check_arithmetic(**asked)
        storage = storage_dtype(opened.shards) if dtype in (None, "auto") else dtype_named(str(dtype))
        return cls(opened, method, layout, storage, asked, device, skip, activation_limit, structure)

    def calibrate(self, data: Data | None, *, seq_length: int, **options: Any) -> None:
        """Reads the calibration windows, where the method needs them. Raises UsageError where there are none."""
        if not self.method.calibrated:
            return
        if data is None:
            raise UsageError(
                f"{self.method} chooses by activations and needs text: give --data FILE, or a name such as sotu"
            )
        self.tokenizer = tokenizer_for(self.source.folder, data, self.source.trust_remote_code)
        length = min(seq_length, context(self.source.config))
        self.windows = calibration_windows(data, self.tokenizer, seq_length=length, **options)
        check_vocabulary(self.windows.ids, self.structure.vocabulary, self.windows.record["data"])

    @property
    def ids(self) -> Tensor | None:
        """The calibration windows [windows, tokens]."""
        return self.windows.ids if self.windows else None

    def recipe(self) -> Recipe:
        """Without the arithmetic, which is chosen when the run starts."""
        return Recipe(
            method=str(self.method),
            source={"name": self.source.name, "sha256": self.source.fingerprint},
            data=self.windows.record if self.windows else None,
            dtype=name_of(self.storage),
            format=self.layout,
            skip=list(self.skip),
            asked=self.asked,
        )

    def differences(self, like: Recipe | None) -> list[str]:
        """In what this job departs from the recipe that it is to repeat, a sentence each."""
        if like is None:
            return []
        mine, sentences = self.recipe(), []
        if like.source.get("sha256") != mine.source["sha256"]:
            sentences.append(f"{self.source.name} is not the model of the recipe, so the folder will be another one")
        if (like.data or {}).get("sha256") != (mine.data or {}).get("sha256"):
            sentences.append("the calibration windows are not those of the recipe, so the folder will be another one")
        return sentences

    def model(self, run: Run) -> Model:
        """The model to stream, its arithmetic chosen now or when the run began; the run is started with it.

        Raises RunError where the loss of the dense model is not finite.
        """
        notes: list[str] = []
        if run.recorded is not None:
            arithmetic = Arithmetic.recorded(run.recorded)
        elif self.windows is None and self.asked["compute_dtype"] == "auto":
            arithmetic = Arithmetic()
        else:
            widest = max((columns for _, columns in self.structure.shapes.values()), default=1)
            arithmetic, notes = choose_arithmetic(
                **self.asked, device=self.device, widest=min(2048, widest), published=self.method.published
            )
        model = Model(
            self.source,
            storage=self.storage,
            arithmetic=arithmetic,
            device=self.device,
            skip=self.skip,
            activation_limit=self.activation_limit,
        )
        for sentence in notes:
            run.note(sentence)
        if self.windows and run.recorded is None:
            run.note(check_dense_loss(model, self.windows.ids, self.tokenizer))
        run.start(model, {**arithmetic.record(), "device": self.device.type})
        return model


def check_dense_loss(model: Model, ids: Tensor, tokenizer: Any) -> str | None:
    """Runs the start of the first window through the dense model, with a BOS token and without.

    Returns the advice to use one where it helps. Raises RunError where the loss is not finite.
    """
    pair = with_bos(ids[:1], tokenizer)
    losses = streamed_losses(model, ids[:1, :BOS_TOKENS] if pair is None else pair)
    if not all(map(math.isfinite, losses)):
        raise RunError(
            f"the loss of the dense model {model.source.name} is NaN or infinite in {name_of(model.compute)}; "
            "its checkpoint is broken, or it needs --compute-dtype float32"
        )
    return bos_note(*losses) if pair is not None else None
