"""Retraining of a folder that budwood pruned: unpacked, trained on text with its zeros fixed, packed as it was."""

from pathlib import Path
from typing import Any

from budwood.checkpoints.source import open_source
from budwood.data.sources import Data
from budwood.data.tokens import Bos, check_vocabulary, tokenizer_for
from budwood.data.windows import Sampling, calibration_windows
from budwood.errors import UsageError
from budwood.evaluation.subject import context
from budwood.methods.recovery import recover
from budwood.methods.validation import number, whole
from budwood.progress import Progress
from budwood.reports.record import Report
from budwood.runs.origin import recipe_of, recovered
from budwood.runs.recipe import Recipe
from budwood.runs.run import Run
from budwood.stream.arithmetic import Arithmetic, check_arithmetic, choose_arithmetic, known_device, name_of
from budwood.stream.model import Model
from budwood.training.descent import Descent
from budwood.training.move import check_move, parse_move
from budwood.training.recovery import Recovery

MOVE = "biases+norms+masklora"


def retrain(
    folder: str | Path,
    target: str | Path,
    data: Data,
    *,
    move: str = MOVE,
    rank: int = 16,
    alpha: float = 32,
    steps: int = 1000,
    batch: int = 8,
    rate: float = 5e-4,
    patience: int = 3,
    save_every: int = 50,
    num_samples: int = 1024,
    seq_length: int = 2048,
    sampling: Sampling = "random",
    seed: int = 0,
    bos: Bos = "auto",
    compute_dtype: str = "auto",
    device: str | None = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Trains the pruned model of `folder` on text and writes it to `target` in the same format; returns the report.

    The same call continues where an earlier one was interrupted. data: text, of which an eighth of the windows are held
    out to choose the state that is kept. move: what is trained, see `budwood.training.move`; every zero stays. rank,
    alpha: of low-rank terms. batch: windows per step. rate: the highest learning rate. patience: tenths of the steps
    without a lower held-out loss after which it stops. save_every: steps between two checkpoints.

    Raises UsageError where `folder` was not pruned by budwood or `target` is taken, RunError when the training fails.
    """
    recovery = checked(move, rank, alpha, steps, batch, rate, patience, seed, save_every)
    opened = open_source(folder, trust_remote_code)
    if Path(target).expanduser().resolve() == opened.folder.resolve():
        raise UsageError(f"{target} is the folder to retrain itself; give another folder")
    made = recipe_of(opened)
    structure = opened.structure(skip=made.skip)
    check_move(recovery.move, structure.module)
    check_arithmetic(compute_dtype, "off", "fused")
    placed = known_device(device)
    opened.check()
    tokenizer = tokenizer_for(opened.folder, data, trust_remote_code)
    length = min(seq_length, context(opened.config))
    windows = calibration_windows(
        data, tokenizer, num_samples=num_samples, seq_length=length, sampling=sampling, seed=seed, bos=bos
    )
    check_vocabulary(windows.ids, structure.vocabulary, windows.record["data"])
    options: dict[str, Any] = {
        "move": move,
        "rank": rank,
        "alpha": alpha,
        "steps": steps,
        "batch": batch,
        "rate": rate,
        "patience": patience,
        "seed": seed,
    }
    recipe = Recipe(
        verb="retrain",
        method=made.method,
        source={"name": str(folder), "sha256": opened.fingerprint},
        data=windows.record,
        dtype=name_of(Model(opened, skip=made.skip).storage),
        format=made.format if opened.packed else "dense",
        skip=made.skip,
        asked={"compute_dtype": compute_dtype},
        made_from=made.to_json(),
        training=options,
    )
    with Run.open(target, recipe, opened, overwrite=overwrite, progress=progress) as run:
        if run.report is not None:
            return run.report
        if run.recorded is not None:
            arithmetic = Arithmetic.recorded(run.recorded)
        else:
            widest = min(2048, max((columns for _, columns in structure.shapes.values()), default=1))
            arithmetic, notes = choose_arithmetic(compute_dtype, "off", "fused", placed, widest, published=False)
            for sentence in notes:
                run.note(sentence)
        model = Model(opened, skip=made.skip, arithmetic=arithmetic, device=placed)
        run.start(model, {**arithmetic.record(), "device": placed.type})
        run.note(f"retrained from {folder}, whose report has the output errors of the blocks")
        for block in run.blocks(None, "unpacking"):
            for linear in block.linears.values():
                linear.recovered = recovered(linear)
        recover(run, windows.ids, recovery, "retraining", options)
        return run.finish(None, opened.license)


def checked(
    move: str,
    rank: int,
    alpha: float,
    steps: int,
    batch: int,
    rate: float,
    patience: int,
    seed: int,
    save_every: int,
) -> Recovery:
    """The settings of a training. Raises UsageError for values that cannot be."""
    number("alpha", alpha, 0, 1e6)
    number("rate", rate, 0, 1)
    whole("seed", seed, 0)
    for name, value in (
        ("rank", rank),
        ("steps", steps),
        ("batch", batch),
        ("patience", patience),
        ("save_every", save_every),
    ):
        whole(name, value, 1)
    moves = parse_move(move, rank, alpha)
    return Recovery(moves, Descent(steps, rate, patience=patience), rank, alpha, batch, seed, save_every)
