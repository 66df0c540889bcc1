"""Evolutionary search of one level per site, with a constant total per group (Týr-the-Pruner, arXiv 2503.09657, 4.2).

A site is something that exists at several levels, such as an MLP at several widths. A child lowers some sites by one
level and raises as many of the same group, so totals never change. Each generation halves its children in stages, on
more and more samples, and the parent takes part in the last one. Fitness is a callable; lower is better.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

State = tuple[int, ...]  # the level of every site
Fitness = Callable[[Sequence[State], int, Sequence[int]], Sequence[float]]  # states, stage, samples -> one per state
TRIES = 100  # draws per child that is wanted: a small space has fewer children than are asked for
MOVES = 4  # at most, in one mutation


@dataclass(frozen=True)
class Space:
    """The levels that each site has, first to last, and the group of each site."""

    levels: Sequence[range]
    groups: Sequence[Any]

    def __post_init__(self) -> None:
        if len(self.levels) != len(self.groups):
            raise ValueError("a space needs one group for each site")

    def has(self, site: int, level: int) -> bool:
        return level in self.levels[site]

    @property
    def centre(self) -> State:
        """Level 0 everywhere, where a round begins."""
        return (0,) * len(self.levels)


@dataclass(frozen=True)
class Stage:
    """samples: drawn for this stage, the same for all candidates. survivors: candidates that go on."""

    samples: int
    survivors: int


@dataclass(frozen=True)
class Settings:
    """generations: at most; a search ends earlier after `patience` of them with the same parent.

    published: as the released program, a child may equal its parent, and the parent joins every stage that has as many
    survivors as the last one.
    """

    generations: int
    children: int
    stages: Sequence[Stage]
    patience: int = 10
    published: bool = False


@dataclass
class Progress:
    """What a search has done so far; `to_json` and `from_json` keep it between processes."""

    parent: State
    fitness: float | None = None  # of the parent, on the last stage of the last generation
    generation: int = 0
    unchanged: int = 0  # generations with the same parent
    random: Random = field(default_factory=Random)
    log: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        version, internal, gauss = self.random.getstate()
        return {
            "parent": list(self.parent),
            "fitness": self.fitness,
            "generation": self.generation,
            "unchanged": self.unchanged,
            "random": [version, list(internal), gauss],
            "log": self.log,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Progress":
        version, internal, gauss = content["random"]
        generator = Random()
        generator.setstate((version, tuple(internal), gauss))
        return cls(
            tuple(content["parent"]),
            content["fitness"],
            content["generation"],
            content["unchanged"],
            generator,
            list(content["log"]),
        )


def begin(space: Space, seed: int) -> Progress:
    """The start of a search: the centre, and a generator with this seed."""
    return Progress(space.centre, random=Random(seed))


def search(space: Space, settings: Settings, samples: int, fitness: Fitness, progress: Progress) -> Iterator[Progress]:
    """Yields `progress` after every generation until the search has ended; its parent is then the result.

    samples: in the pool that stages draw from. fitness: of some states on some samples of the pool, at a stage. A value
    that was computed before is not computed again. A progress that was kept after a generation continues to the same
    result.
    """
    known: dict[tuple[State, int, tuple[int, ...]], float] = {}

    def measured(states: Sequence[State], stage: int, drawn: Sequence[int]) -> list[float]:
        batch = tuple(sorted(drawn))
        new = [state for state in states if (state, stage, batch) not in known]
        if new:
            known.update({(s, stage, batch): float(f) for s, f in zip(new, fitness(new, stage, batch), strict=True)})
        return [known[state, stage, batch] for state in states]

    while progress.generation < settings.generations and progress.unchanged < settings.patience:
        before = progress.parent
        candidates = children(before, space, settings.children, progress.random, settings.published)
        if not candidates:
            return
        counts = []
        for index, stage in enumerate(settings.stages):
            last = index == len(settings.stages) - 1
            if last or (settings.published and stage.survivors == settings.stages[-1].survivors):
                candidates = with_parent(candidates, before, settings.published)
            drawn = draw_samples(samples, min(stage.samples, samples), progress.random)
            counts.append(len(candidates))
            values = measured(candidates, index, drawn)
            order = sorted(range(len(candidates)), key=lambda place: values[place])
            candidates = [candidates[place] for place in order[: stage.survivors]]
            if last:
                batch = tuple(sorted(drawn))
                progress.log.append(
                    {
                        "fitness": values[order[0]],
                        "parent_fitness": known[before, index, batch],
                        "changed": sum(a != b for a, b in zip(before, candidates[0], strict=True)),
                        "candidates": counts,
                    }
                )
                progress.fitness = values[order[0]]
        progress.parent = candidates[0]
        progress.unchanged = progress.unchanged + 1 if progress.parent == before else 0
        progress.generation += 1
        yield progress


def mutate(parent: State, space: Space, generator: Random, published: bool = False) -> State:
    """A child: one to four times, one site loses a level and another one of its group gains one."""
    state = list(parent)
    for _ in range(min(generator.randint(1, MOVES), generator.randint(1, MOVES))):
        lower = _draw(generator, [space.has(i, level - 1) for i, level in enumerate(state)])
        if lower is None:
            break
        state[lower] -= 1
        raised = [
            space.has(i, level + 1) and space.groups[i] == space.groups[lower] and (published or i != lower)
            for i, level in enumerate(state)
        ]
        upper = _draw(generator, raised)
        state[lower if upper is None else upper] += 1
    return tuple(state)


def children(parent: State, space: Space, count: int, generator: Random, published: bool = False) -> list[State]:
    """Different children of a parent; fewer than `count` where the space has no more."""
    found: dict[State, None] = {}
    for _ in range(TRIES * count):
        child = mutate(parent, space, generator, published)
        if published or child != parent:
            found.setdefault(child)
        if len(found) == count:
            break
    return list(found)


def with_parent(candidates: Sequence[State], parent: State, published: bool) -> list[State]:
    """The parent among the candidates: first, so that it wins a tie; last in the published program."""
    others = [state for state in candidates if state != parent]
    if published:
        return list(candidates) if parent in candidates else [*others, parent]
    return [parent, *others]


def draw_samples(samples: int, count: int, generator: Random) -> list[int]:
    """`count` different samples out of `samples`."""
    drawn: dict[int, None] = {}
    while len(drawn) < count:
        drawn.setdefault(generator.randint(0, samples - 1))
    return list(drawn)


def _draw(generator: Random, allowed: Sequence[bool]) -> int | None:
    """One of the allowed places; None where there is none. Draws as the published program does."""
    if not any(allowed):
        return None
    while True:
        place = generator.randint(0, len(allowed) - 1)
        if allowed[place]:
            return place
