"""PERP: recovery after pruning by training a small set of tensors (Zimmer and others, 2023, arXiv 2312.15230)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from zlib import crc32

from torch import Tensor

from budwood.errors import UsageError
from budwood.formats import predict
from budwood.methods.method import Step, Wrapper
from budwood.methods.option import option
from budwood.methods.validation import number, one_of, whole
from budwood.training.move import Move, check_move, parse_move, vectors

if TYPE_CHECKING:
    from budwood.checkpoints.structure import ModelStructure
    from budwood.checkpoints.work import Work
    from budwood.runs.run import Run
    from budwood.stream.block import Block
    from budwood.stream.model import Model
    from budwood.training.block_recovery import BlockRecovery
    from budwood.training.recovery import Recovery


@dataclass(frozen=True)
class Perp(Wrapper):
    """Prune with another method, then train biases, norms and a masked low-rank term of every matrix; zeros stay zero.

    The whole model learns from the calibration windows, of which an eighth are held out; the best state is kept.
    """

    move: str = option(
        "biases+norms+masklora",
        "what is trained, joined by +: biases, norms, one of masklora, loraprune, scalelora, spp, scales (a factor for "
        "each output), weights (the kept ones); on request head and embeddings",
    )
    rank: int = option(16, "of the low-rank term")
    alpha: float = option(32, "the low-rank term is multiplied by alpha / rank")
    steps: int = option(1000, "of the optimiser")
    batch: int = option(8, "windows per step")
    rate: float = option(5e-4, "learning rate at its highest, after the first tenth of the steps")
    reconstruct: Literal["none", "block"] = option(
        "none",
        '"block": no training of the whole model; each block is fitted to the outputs of the dense block for the same '
        "inputs while the model is pruned, with `steps` steps per block",
    )
    patience: int = option(3, "stop after so many tenths of the steps without a lower held-out loss")
    seed: int = option(0, "of the order of the windows and of the start of the low-rank terms")

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("reconstruct", self.reconstruct, ("none", "block"))
        parse_move(self.move)
        whole("rank", self.rank, 1)
        number("alpha", self.alpha, 0, 1e6)
        whole("steps", self.steps, 0)
        whole("batch", self.batch, 1)
        number("rate", self.rate, 0, 1)
        whole("patience", self.patience, 1)
        whole("seed", self.seed, 0)
        if self.reconstruct == "block" and self.moves.outside:
            raise UsageError(f"move is {self.move!r}, but head and embeddings are in no block; use reconstruct='none'")

    @property
    def moves(self) -> Move:
        return parse_move(self.move, self.rank, self.alpha)

    @property
    def recovery(self) -> "Recovery":
        from budwood.training.descent import Descent
        from budwood.training.recovery import Recovery

        descent = Descent(self.steps, self.rate, patience=self.patience)
        return Recovery(self.moves, descent, self.rank, self.alpha, self.batch, self.seed)

    @property
    def block_recovery(self) -> "BlockRecovery":
        from budwood.training.block_recovery import BlockRecovery
        from budwood.training.descent import Descent

        descent = Descent(self.steps, self.rate, clip=None, patience=self.patience)
        return BlockRecovery(self.moves, descent, self.batch, self.seed)

    def options(self) -> dict[str, Any]:
        """For the report."""
        names = ("move", "rank", "alpha", "steps", "batch", "rate", "reconstruct", "patience", "seed")
        return {name: getattr(self, name) for name in names}

    def check_structure(self, structure: "ModelStructure") -> None:
        super().check_structure(structure)
        check_move(self.moves, structure.module)
        if self.reconstruct == "block" and self.inner.reduced(structure) is not structure:
            raise UsageError(
                f"{self.inner} removes whole blocks or experts, so there are no outputs of the dense block to fit to; "
                "use reconstruct='none'"
            )

    def reduced(self, structure: "ModelStructure") -> "ModelStructure":
        return self.inner.reduced(structure)

    def work_bytes(self, structure: "ModelStructure", itemsize: int) -> int:
        """A checkpoint of the training, and the blocks that are written a second time."""
        inner = super().work_bytes(structure, itemsize)
        if self.reconstruct == "block":
            return inner
        moves, shapes = self.moves, structure.shapes
        trained = sum(parameter.numel() for parameter in vectors(structure.module, moves).values())
        if moves.adapter is not None:
            trained += sum(moves.adapter.count(shape) for shape in shapes.values())
        forecast = self.forecast(structure)
        packed = sum(predict(held.shape or shapes[name], held, itemsize)[1] for name, held in forecast.items())
        return inner + 4 * 4 * trained + packed

    def prepare(self, model: "Model", windows: Tensor | None, work: "Work") -> Step:
        assert windows is not None
        inner = self.inner.prepare(model, windows, work)
        return PerpStep(self, inner, windows, work, f"perp-{crc32(str(self).encode()):08x}", model.activation_limit)


@dataclass(frozen=True)
class PerpStep(Step):
    """windows: for calibration and training [windows, tokens]. name: of what it keeps in `work`. limit: see `Model`."""

    method: Perp
    inner: Step
    windows: Tensor
    work: "Work"
    name: str
    limit: int

    def model(self, model: "Model") -> "Model":
        return self.inner.model(model)

    def inputs(self, windows: Tensor | None) -> Tensor | None:
        return windows if self.method.reconstruct == "block" else self.inner.inputs(windows)

    def __call__(self, block: "Block") -> None:
        from budwood.training.block_recovery import outputs_of, record_of, recover_block

        if self.method.reconstruct == "none":
            self.inner(block)
            return
        targets = outputs_of(block, self.limit)
        self.inner(block)
        curve, trained = recover_block(block, targets, self.method.block_recovery)
        self.work.record(f"{self.name}-{block.index}", lambda: record_of(curve, trained))

    def finish(self, run: "Run") -> None:
        from budwood.methods.recovery import recover

        self.inner.finish(run)
        if self.method.reconstruct == "none":
            recover(run, self.windows, self.method.recovery, self.name, self.method.options())
            return
        records = [self.work.record(f"{self.name}-{index}", dict) for index in range(len(run.model))]
        unchanged = sum(record.get("best_step") == 0 for record in records)
        if unchanged:
            run.note(f"{unchanged} of {len(records)} blocks stay as pruned: their held-out error did not fall")
        trained = sum(record.get("trained", 0) for record in records)
        share = trained / run.model.structure.parameters
        section = {**self.method.options(), "trained": trained, "trained_share": share, "blocks": records}
        run.sections.setdefault("training", []).append(section)
