"""Týr-the-Pruner: whole KV groups and neurons removed, with the widths of all blocks found by a search (2503.09657)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from budwood.errors import UsageError
from budwood.methods.method import Step
from budwood.methods.option import option
from budwood.methods.structured import Structured, alignment, forecast, refusals
from budwood.methods.validation import number, one_of, truth, whole
from budwood.sparsity.forecast import Forecast
from budwood.supernet.level_choice import POOL, PRESETS, Size, choose_levels, keep_chosen, mean_errors, summary
from budwood.supernet.pruned_copies import Pruner
from budwood.supernet.sites import SIDE, Site, even_counts, levels_of, sites_of, spacings
from budwood.supernet.supernet import DENSE, Supernet, build, predicted_bytes

if TYPE_CHECKING:
    from budwood.checkpoints.structure import ModelStructure
    from budwood.checkpoints.work import Work
    from budwood.runs.run import Run
    from budwood.stream.block import Block
    from budwood.stream.model import Model

SHORT = 32  # tokens of the window on which the units of all blocks are verified
CHOSEN = "tyr-chosen"  # name of the files with the copies that the search chose


@dataclass(frozen=True)
class Tyr(Structured):
    """Prune every block to several widths with least-squares repair; search the widths that change the logits least.

    A unit is a KV group with its query heads, or a neuron of an MLP. All experts of a block get the same width. Every
    attention and every MLP keeps at least one unit.
    """

    drop: float = option(0.5, "share of the KV groups, and of the neurons, to remove")
    preset: Literal["full", "fast", "quick", "test"] = option(
        "quick", 'size of the search: "full" as published, "fast", "quick" (at most 40 forward passes), "test"'
    )
    levels: Literal["search", "uniform"] = option(
        "search", "the widths of the blocks: searched, or the same share for all"
    )
    rounds: int = option(0, "searches, each with half the spacing of the one before; 0: those of the preset")
    generations: int = option(0, "most generations of a search; 0: those of the preset")
    children: int = option(0, "candidates per generation; 0: those of the preset")
    tokens: tuple[int, ...] = option((), "tokens on which the candidates of each stage are compared; (): as the preset")
    survivors: tuple[int, ...] = option((), "candidates that each stage keeps; (): as the preset")
    first_order: Literal["signed", "abs", "none"] = option(
        "signed", "first-order term of the price of a unit, as in the released program, as in the paper, or without"
    )
    accumulate: Literal["expectation", "centre", "uniform", "none"] = option(
        "expectation",
        "what reaches the next block: the mean of all copies, weighted by width or not, one copy, the dense",
    )
    within_layer: Literal["joint", "sequential"] = option(
        "joint", "prune attention and MLP on the same inputs, or the MLP after the pruned attention (one more pass)"
    )
    damp: float = option(0.01, "least pull towards the dense weights; held-out windows choose up to 30 times as much")
    align: int = option(1, "keep a multiple of this many neurons; 16 makes products faster where widths would be odd")
    seed: int = option(0, "of the search")
    published: bool = option(False, "removal steps, damping and selection of the released program")

    def __post_init__(self) -> None:
        number("drop", self.drop, 0, 1)
        one_of("preset", self.preset, PRESETS)
        one_of("levels", self.levels, ("search", "uniform"))
        one_of("first_order", self.first_order, ("signed", "abs", "none"))
        one_of("accumulate", self.accumulate, ("expectation", "centre", "uniform", "none"))
        one_of("within_layer", self.within_layer, ("joint", "sequential"))
        number("damp", self.damp, 0, 1)
        truth("published", self.published)
        whole("align", self.align, 1)
        for name in ("rounds", "generations", "children", "seed"):
            whole(name, getattr(self, name), 0)
        for name in ("tokens", "survivors"):
            values = getattr(self, name)
            if not isinstance(values, tuple):
                raise UsageError(f"{name} must be numbers in parentheses such as (512, 2048, 8192), got {values!r}")
            for value in values:
                whole(name, value, 1)
        if len(self.size.tokens) != len(self.size.survivors):
            raise UsageError(f"tokens and survivors must be of the same length, got {self.tokens} and {self.survivors}")

    @property
    def size(self) -> Size:
        """The preset with the options that are given in its place."""
        names = ("rounds", "generations", "children", "tokens", "survivors")
        given: dict[str, Any] = {name: getattr(self, name) for name in names if getattr(self, name)}
        if self.tokens:
            given["shares"] = ()
        return replace(PRESETS[self.preset], **given)

    @property
    def turns(self) -> int:
        """Supernets that are built one after the other."""
        return self.size.rounds if self.levels == "search" else 1

    def prepare(self, model: "Model", windows: Tensor | None, work: "Work") -> Step:
        assert windows is not None
        refused = work.record("tyr-refused", lambda: refusals_of(model, windows))
        sites = sites_of(
            {
                block: {name: units for name, units in sets.items() if f"{block}.{name}" not in refused}
                for block, sets in model.structure.units.items()
            },
            self.align,
        )
        counts = self.first_counts(sites)
        reports = []
        for turn in range(self.turns):
            report = work.record(f"tyr-{turn + 1}", partial(self.round, model, windows, work, sites, counts, turn))
            self.supernet(work, sites, counts, turn).remove()
            counts = report["counts"]
            reports.append(report)
        work.file(f"{DENSE}.safetensors").unlink(missing_ok=True)
        return TyrStep(work, reports, refused)

    def first_counts(self, sites: Sequence[Site]) -> list[int]:
        """Units to remove at each site before any search."""
        if self.levels == "uniform":
            return [
                site.units - max(1, round((1 - self.drop) * site.units / site.grain)) * site.grain for site in sites
            ]
        return even_counts(sites, self.drop)

    def forecast(self, structure: "ModelStructure") -> dict[str, Forecast]:
        """Where levels are searched, the shapes that the search begins with: their total is that of the result."""
        sites = sites_of(structure.units, self.align)
        counts = self.first_counts(sites)
        names = list(structure.units)
        left = {
            (names[site.block], name): site.units - count
            for site, count in zip(sites, counts, strict=True)
            for name in site.consumers
        }
        order = iter([left[block, name] for block, sets in structure.units.items() for name in sets])
        return forecast(structure, lambda units: next(order))

    def supernet(self, work: "Work", sites: Sequence[Site], counts: Sequence[int], turn: int) -> Supernet:
        """The supernet around these numbers of removed units, whether built or not."""
        return Supernet(work, f"tyr-{turn + 1}-block", sites, self.levels_around(sites, counts, turn))

    def levels_around(self, sites: Sequence[Site], counts: Sequence[int], turn: int) -> list[dict[int, int]]:
        """Units removed at every level of each site, in round `turn`, from 0."""
        side = SIDE if self.levels == "search" else 0
        spaced = zip(sites, counts, spacings(sites, turn), strict=True)
        return [levels_of(site, centre, spacing, side) for site, centre, spacing in spaced]

    def round(
        self, model: "Model", windows: Tensor, work: "Work", sites: Sequence[Site], counts: Sequence[int], turn: int
    ) -> dict[str, Any]:
        """One supernet and the search in it: the units to remove at each site, and what was found on the way."""
        supernet = self.supernet(work, sites, counts, turn)
        pruner = Pruner(self.first_order, self.damp, self.published)
        manifest = build(model, windows, supernet, pruner, self.accumulate, self.within_layer)
        collecting = (
            1 if self.within_layer == "joint" else max(sum(1 for _ in supernet.at(i)) for i in range(len(model)))
        )
        passes, choice = 1.0 + collecting, None
        if self.levels == "search":
            choice = choose_levels(
                model, windows, work, supernet, self.size, seed=self.seed + turn, published=self.published
            )
            passes += choice.passes + (turn == 0) * min(1.0, POOL / windows.numel())  # and the dense model, once
        state = choice.state if choice else (0,) * len(sites)
        if turn == self.turns - 1:
            keep_chosen(supernet, state, work, CHOSEN, len(model))
        counts = [levels[level] for levels, level in zip(supernet.levels, state, strict=True)]
        return {
            "levels": list(state),
            "counts": counts,
            "widths": [site.units - count for site, count in zip(sites, counts, strict=True) if site.kind == "mlp"],
            "divergences": choice.divergences if choice else None,
            "errors": mean_errors(supernet, state),
            "generations": len(choice.log) if choice else 0,
            "log": choice.log if choice else [],
            "passes": passes,
            "manifest": manifest,
        }

    def work_bytes(self, structure: "ModelStructure", itemsize: int) -> int:
        """Bytes of the first supernet on disk; those of later rounds are about as large, and one exists at a time."""
        sites = sites_of(structure.units, self.align)
        names = list(structure.units)
        rows = [structure.shapes[f"{names[site.block]}.{site.consumers[0]}"][0] for site in sites]
        return predicted_bytes(sites, self.levels_around(sites, self.first_counts(sites), 0), rows, itemsize)


@dataclass(frozen=True)
class TyrStep(Step):
    """work: holds the chosen copies. reports: of the rounds. refused: units that are left whole, and why."""

    work: "Work"
    reports: Sequence[Mapping[str, Any]]
    refused: Mapping[str, str]

    def __call__(self, block: "Block") -> None:
        shards = self.work.shards(f"{CHOSEN}-{block.index:04d}")
        names = [key.removesuffix("|kept") for key in shards.names() if key.endswith("|kept")]
        block.keep({name: shards.read(f"{name}|kept") for name in names})
        for name in names:
            block.linears[name].weight = shards.read(f"{name}|weight").float()

    def finish(self, run: "Run") -> None:
        run.note(refusals(self.refused))
        run.note(alignment(self.reports[-1]["widths"]))
        run.note(summary(self.reports))


def refusals_of(model: "Model", windows: Tensor) -> dict[str, str]:
    """Units that the shapes promise and running a block disproves, by full name of their consumer, and the reason."""
    found = {}
    for block in model.survey(windows[:1, :SHORT], "verifying heads and neurons"):
        promised = set(model.structure.units[block.name]) - set(block.units)
        found.update({f"{block.name}.{name}": block.refused.get(name, "it has none") for name in sorted(promised)})
    return found
