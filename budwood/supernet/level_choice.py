"""The search in one supernet: its size, its stages on calibration windows, its state on disk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from budwood.checkpoints.work import Work
from budwood.progress import tracked
from budwood.sparsity.level_search import Progress, Settings, Space, Stage, State, begin, search
from budwood.supernet.supernet import Supernet

if TYPE_CHECKING:
    from budwood.stream.model import Model

POOL = 524_288  # tokens of the calibration windows that the search draws from, at most


@dataclass(frozen=True)
class Size:
    """The size of a search. shares: of all calibration tokens, which bound the tokens of the stages."""

    rounds: int
    generations: int
    children: int
    tokens: tuple[int, ...]
    survivors: tuple[int, ...]
    shares: tuple[float, ...] = ()

    def stage_tokens(self, available: int) -> list[int]:
        """Tokens of each stage, for a number of calibration tokens."""
        shares = self.shares or (1.0,) * len(self.tokens)
        return [min(t, max(2, int(share * available))) for t, share in zip(self.tokens, shares, strict=True)]


PRESETS = {
    "full": Size(4, 50, 128, (2048, 16384, 131072), (16, 4, 1)),
    "fast": Size(2, 20, 32, (1024, 4096, 16384), (8, 2, 1)),
    "quick": Size(1, 12, 16, (512, 2048, 8192), (4, 2, 1), (1 / 32, 1 / 8, 1 / 2)),
    "test": Size(1, 5, 8, (128, 256, 512), (3, 2, 1)),
}


@dataclass(frozen=True)
class Choice:
    """The levels that a search chose. divergences: of its centre and of the choice, on the same windows.

    passes: forward passes over all calibration windows that it took.
    """

    state: State
    divergences: tuple[float, float]
    log: list[dict[str, Any]]
    passes: float


def choose_levels(
    model: "Model",
    windows: Tensor,
    work: Work,
    supernet: Supernet,
    size: Size,
    *,
    seed: int,
    published: bool,
) -> Choice:
    """Searches the levels of a supernet; an interrupted search continues after its last generation.

    windows: token ids [windows, tokens]. The winner is compared with the centre once more, on the first windows of the
    pool, and must not be worse there: generations are compared on different windows.
    """
    from budwood.supernet.divergence import Divergence, samples_for

    pool = windows[: max(1, POOL // windows.shape[1])]
    tokens = size.stage_tokens(pool.numel())
    fitness = Divergence(model, pool, tokens, work, supernet)
    samples = [samples_for(count, pool.shape[1]) for count in tokens]
    stages = [Stage(*each) for each in zip(samples, size.survivors, strict=True)]
    settings = Settings(size.generations, size.children, stages, published=published)
    levels = [range(min(counts), max(counts) + 1) for counts in supernet.levels]
    space = Space(levels, [site.group for site in supernet.sites])
    name = f"{supernet.name}-search"
    kept = work.record(name) if work.file(f"{name}.json").is_file() else None
    progress = begin(space, seed) if kept is None else Progress.from_json(kept["progress"])
    fitness.block_tokens = 0 if kept is None else kept["block_tokens"]
    generations = search(space, settings, len(pool), fitness, progress)
    for _ in tracked(
        model.progress, generations, size.generations, "search, generations", lambda each: str(each.generation)
    ):
        work.write(name, {"progress": progress.to_json(), "block_tokens": fitness.block_tokens})
    states = [space.centre, progress.parent]
    centre, winner = fitness(states, len(stages) - 1, range(samples[-1]))
    passes = fitness.passes * pool.numel() / windows.numel()
    return Choice(states[winner < centre], (centre, min(centre, winner)), progress.log, passes)


def generation_of(progress: Progress) -> str:
    return f"generation {progress.generation}"


def keep_chosen(supernet: Supernet, state: State, work: Work, name: str, blocks: int) -> None:
    """Writes the chosen copies of every block, one file each: kept units and repaired weights, by consumer."""
    for index in range(blocks):
        tensors = {}
        for place, site in supernet.at(index):
            if supernet.levels[place][state[place]]:
                for consumer in site.consumers:
                    tensors[f"{consumer}|kept"] = supernet.kept(index, consumer, state[place])
                    tensors[f"{consumer}|weight"] = supernet.read(index, consumer, state[place])[1]
        work.save(f"{name}-{index:04d}", tensors)


def mean_errors(supernet: Supernet, state: State) -> list[float]:
    """Relative squared output errors of the chosen copies, mean over linears: calibration inputs, held-out inputs."""
    found = [
        supernet.errors(site.block, name, level)
        for site, levels, level in zip(supernet.sites, supernet.levels, state, strict=True)
        for name in site.consumers
        if levels[level]
    ]
    return torch.tensor(found, dtype=torch.float64)[:, :2].mean(0).tolist() if found else [0.0, 0.0]


def summary(reports: Sequence[Mapping[str, Any]]) -> str:
    """What the rounds of a run found, in one sentence."""
    rounds = [report for report in reports if report["divergences"]]
    moved = ", then ".join("from {:.4g} to {:.4g}".format(*report["divergences"]) for report in rounds)
    generations = sum(report["generations"] for report in reports)
    searched = f"{generations} generations moved the divergence per token {moved}; " if rounds else ""
    calibration, held_out = reports[-1]["errors"]
    held = f" and {held_out:.4f} on held-out windows" if held_out else ""
    return (
        f"tyr: {searched}squared output error of the repaired linears {calibration:.4f} on calibration windows{held}; "
        f"{sum(report['passes'] for report in reports):.1f} forward passes over the calibration windows before pruning"
    )
