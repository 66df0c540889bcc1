"""The search of levels: constant totals, a planted optimum, elitism, and the released program's generations."""

import json
import random
from pathlib import Path

import pytest

from budwood.sparsity.level_search import (
    Progress,
    Settings,
    Space,
    Stage,
    begin,
    children,
    draw_samples,
    mutate,
    search,
    with_parent,
)

REFERENCE = Path(__file__).parents[1] / "data" / "reference" / "tyr" / "tyr_tiny.json"
SPACE = Space([range(-3, 4)] * 6 + [range(-1, 2)] * 4, ["mlp"] * 6 + ["attention"] * 4)
OPTIMUM = (2, -3, 1, 0, -1, 1, 1, -1, 0, 0)
SETTINGS = Settings(generations=60, children=24, stages=[Stage(1, 8), Stage(2, 4), Stage(4, 1)], patience=15)


def distance(states, stage, samples):
    return [float(sum((a - b) ** 2 for a, b in zip(state, OPTIMUM, strict=True))) for state in states]


def noisy(states, stage, samples):
    """Differs from sample to sample, as text does."""
    return [
        near + sum(samples) * 0.01 * state[0]
        for near, state in zip(distance(states, stage, samples), states, strict=True)
    ]


def result(settings=SETTINGS, fitness=distance, seed=0, space=SPACE, progress=None):
    progress = progress or begin(space, seed)
    for _ in search(space, settings, 8, fitness, progress):
        pass
    return progress


def totals(state):
    return sum(state[:6]), sum(state[6:])


@pytest.mark.parametrize("published", [False, True])
def test_mutations_keep_the_totals_and_the_levels(published):
    generator, state = random.Random(0), SPACE.centre
    for _ in range(10_000):
        state = mutate(state, SPACE, generator, published)
        assert totals(state) == (0, 0)
        assert all(SPACE.has(site, level) for site, level in enumerate(state))


def test_children_are_different_and_none_is_the_parent():
    found = children(SPACE.centre, SPACE, 40, random.Random(0))
    assert len(set(found)) == 40
    assert SPACE.centre not in found


def test_a_small_space_has_fewer_children():
    pair = Space([range(0, 2)] * 2, ["mlp", "mlp"])
    assert children(pair.centre, pair, 10, random.Random(0)) == []  # no level below
    pair = Space([range(-1, 2)] * 2, ["mlp", "mlp"])
    assert sorted(children(pair.centre, pair, 10, random.Random(0))) == [(-1, 1), (1, -1)]
    assert result(space=Space([range(-1, 2)], ["mlp"])).parent == (0,)  # nothing to search


def test_finds_a_planted_optimum():
    found = result()
    assert found.parent == OPTIMUM
    assert found.fitness == 0


def test_the_same_seed_gives_the_same_result():
    one, two = result(fitness=noisy, seed=3), result(fitness=noisy, seed=3)
    assert one.parent == two.parent
    assert one.log == two.log
    assert result(fitness=noisy, seed=4).log != one.log


def test_no_generation_is_worse_than_its_parent():
    """On the samples of its last stage; on a pool that is drawn whole the fitness never rises."""
    found = result(fitness=noisy)
    assert all(entry["fitness"] <= entry["parent_fitness"] for entry in found.log)
    whole = [Stage(8, 8), Stage(8, 4), Stage(8, 1)]
    found = result(Settings(20, 24, whole), noisy)
    fitness = [entry["fitness"] for entry in found.log]
    assert fitness == sorted(fitness, reverse=True)


def test_ends_when_the_parent_stays():
    found = result(Settings(100, 24, SETTINGS.stages, patience=4))
    assert found.unchanged == 4
    assert found.generation < 60


def test_an_interrupted_search_continues_to_the_same_result():
    whole = result(fitness=noisy)
    for stop in (1, 7, whole.generation - 1):
        progress = begin(SPACE, 0)
        for _ in search(SPACE, SETTINGS, 8, noisy, progress):
            if progress.generation == stop:
                break
        kept = Progress.from_json(json.loads(json.dumps(progress.to_json())))
        assert result(fitness=noisy, progress=kept).to_json() == whole.to_json()


def test_stages_see_the_same_samples_and_nothing_is_measured_twice():
    asked = []

    def fitness(states, stage, samples):
        asked.extend((state, stage, tuple(samples)) for state in states)
        return distance(states, stage, samples)

    found = result(fitness=fitness)
    assert len(set(asked)) == len(asked)
    stages = [SETTINGS.stages[stage].samples for _, stage, _ in asked]
    assert all(len(samples) == wanted for (_, _, samples), wanted in zip(asked, stages, strict=True))
    assert found.log[0]["candidates"] == [24, 8, 5]


def test_samples_are_drawn_without_replacement():
    assert sorted(draw_samples(8, 8, random.Random(1))) == list(range(8))


def test_the_parent_wins_a_tie():
    assert result(fitness=lambda states, stage, samples: [0.0] * len(states)).parent == SPACE.centre
    assert with_parent([(1, -1)], (0, 0), published=False) == [(0, 0), (1, -1)]


def test_the_released_search():
    """Candidates, survivors and parents of the released program, seed 0, with Python's generator."""
    about = json.loads(REFERENCE.read_text())["search"]
    names, optimum = about["layer_names"], about["planted_optimum"]
    levels = [range(about["levels"][name][0], about["levels"][name][-1] + 1) for name in names]
    space = Space(levels, [index % 2 for index in range(len(names))])
    stages = [Stage(1, 8), Stage(2, 4), Stage(4, 2)]  # samples of 32 tokens
    settings = Settings(12, 24, stages, patience=99, published=True)
    measured = []

    def fitness(states, stage, samples):
        measured.append((stage, [list(state) for state in states]))
        weights = [1 + 0.1 * site for site in range(len(names))]
        return [sum(w * (a - b) ** 2 for w, a, b in zip(weights, s, optimum, strict=True)) for s in states]

    parents, log = [], []
    for progress in search(space, settings, 8, fitness, begin(space, 0)):
        parents.append(list(progress.parent))
        log = progress.log
    assert parents == about["parents"]
    assert [entry["fitness"] for entry in log] == pytest.approx(about["parent_fitness"])
    assert [entry["candidates"] for entry in log] == about["n_candidates"]
    first = [states for _, states in measured[:4] if len(states) == 24]
    assert first[0] == about["selections"][0]["candidates"]
    second = about["selections"][3]["candidates"]
    assert measured[3][1] == [state for state in second if state in measured[3][1]]  # others were measured before
    assert measured[1][1] == about["selections"][0]["survivors"]
