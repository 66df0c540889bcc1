"""Removal of units: exact prices, optimal repairs, one sweep for all counts, and the released program's figures."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from budwood.sparsity import unit_removal
from budwood.sparsity.unit_removal import (
    equal_rounds,
    expectation,
    first_order_terms,
    outputs_of,
    prices,
    problem_of,
    remove_units,
)

REFERENCE = Path(__file__).parents[1] / "data" / "reference" / "tyr"
MODELS = REFERENCE.parent / "models"


def inputs(width, tokens=200, seed=0):
    """[tokens, in] with correlated features."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)
    return draw(tokens, width) @ (draw(width, width) / width**0.5 + torch.eye(width))


def weight(out, width, seed=1):
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def units(count, width):
    return torch.arange(count * width).view(count, width)


def best(dense, x, columns, ridge):
    """The repair by a least-squares solver on stacked rows, without second moments."""
    rows = torch.cat([x, ridge**0.5 * torch.eye(x.shape[1], dtype=x.dtype)])
    return torch.linalg.lstsq(rows[:, columns], rows @ dense.T, driver="gelsd").solution.T


@pytest.mark.parametrize("width", [1, 4])
def test_first_order_terms_add_up_and_prices_are_the_least_increase_of_the_loss(width):
    x, dense, groups = inputs(24), weight(7, 24), units(24 // width, width)
    problem = problem_of(dense, x.T @ x, damp=0.0)
    assert torch.allclose(first_order_terms(problem.dense, problem.target, groups).sum(), (x @ dense.T).square().sum())
    found = prices(dense, torch.linalg.inv(problem.moments), groups)
    for unit, price in zip(groups, found, strict=True):
        rest = torch.tensor([c for c in range(24) if c not in unit.tolist()])
        assert problem.loss(rest, best(dense, x, rest, 0.0)) == pytest.approx(float(price), rel=1e-8)


def test_prices_in_batches_are_the_same(monkeypatch):
    dense, groups = weight(7, 24), units(6, 4)
    inverse = torch.linalg.inv(problem_of(dense, inputs(24).T @ inputs(24)).moments)
    whole = prices(dense, inverse, groups)
    monkeypatch.setattr(unit_removal, "BYTES", 8 * 7 * 4 * 2)
    assert torch.allclose(prices(dense, inverse, groups), whole)


@pytest.mark.parametrize("first_order", ["signed", "abs", "none"])
@pytest.mark.parametrize(("count", "width", "step"), [(24, 1, 1), (24, 1, 5), (6, 4, 1)])
def test_repairs_are_optimal_and_the_loss_grows_with_the_count(count, width, step, first_order):
    x, dense = inputs(24), weight(7, 24)
    problem = problem_of(dense, x.T @ x)
    found = remove_units(problem, units(count, width), range(count + 1), step=step, first_order=first_order)
    losses = []
    for removed, left in found.items():
        assert len(left.kept) == count - removed
        assert torch.equal(left.columns, units(count, width)[left.kept].flatten())
        if 0 < removed < count:
            assert torch.allclose(left.weight, best(dense, x, left.columns, problem.ridge), atol=1e-9)
        losses.append(problem.loss(left.columns, left.weight))
    assert losses[0] == pytest.approx(0, abs=1e-9)
    assert losses[-1] == pytest.approx(problem.energy)
    assert all(later >= earlier - 1e-9 for earlier, later in itertools.pairwise(losses))


def test_the_running_inverse_and_weights_are_those_of_the_kept_columns():
    """With single steps the choice of each step must be the one that a fresh inverse and a fresh fit give."""
    x, dense = inputs(20), weight(5, 20)
    problem = problem_of(dense, x.T @ x)
    found = remove_units(problem, units(20, 1), range(1, 20), first_order="signed")
    kept = torch.arange(20)
    for removed in range(1, 20):
        fitted = best(dense, x, kept, problem.ridge)
        inverse = torch.linalg.inv(problem.moments[kept][:, kept])
        places = torch.arange(len(kept)).view(-1, 1)
        score = prices(fitted, inverse, places) + first_order_terms(fitted, problem.target[:, kept], places)
        kept = kept[torch.arange(len(kept)) != score.argmin()]
        assert torch.equal(found[removed].kept, kept)


def test_the_first_choice_is_the_best_and_greedy_is_near_the_best_support():
    x, dense = inputs(9, seed=3), weight(4, 9)
    problem = problem_of(dense, x.T @ x, damp=1e-9)
    found = remove_units(problem, units(9, 1), [1, 3], first_order="none")
    for removed, most in ((1, 1.0 + 1e-9), (3, 1.5)):
        every = [torch.tensor(kept) for kept in itertools.combinations(range(9), 9 - removed)]
        least = min(problem.loss(kept, problem.repair(kept)) for kept in every)
        assert problem.loss(found[removed].columns, found[removed].weight) <= most * least


@pytest.mark.parametrize("step", [1, 4])
def test_one_sweep_equals_separate_sweeps(step):
    x, dense = inputs(24), weight(7, 24)
    problem = problem_of(dense, x.T @ x)
    counts = [4, 8, 16, 20]  # whole steps, so that the snapshots cut none short
    together = remove_units(problem, units(24, 1), counts, step=step)
    for count in counts:
        alone = remove_units(problem, units(24, 1), [count], step=step)[count]
        assert torch.equal(alone.kept, together[count].kept)
        assert torch.equal(alone.weight, together[count].weight)


def test_units_that_others_express_are_removed_without_a_loss():
    x = inputs(12)
    x[:, 8:] = x[:, :8] @ weight(8, 4)
    problem = problem_of(weight(5, 12), x.T @ x, damp=1e-9)
    found = remove_units(problem, units(12, 1), [4], first_order="none")[4]
    assert problem.loss(found.columns, found.weight) < 1e-6 * problem.energy


def test_output_errors_are_those_of_the_outputs():
    x, dense = inputs(24), weight(7, 24)
    columns, kept = torch.arange(0, 24, 2), weight(7, 12, seed=4)
    lost = (x[:, columns] @ kept.T - x @ dense.T).square().sum() / (x @ dense.T).square().sum()
    assert outputs_of(dense, x.T @ x).error(columns, kept) == pytest.approx(float(lost))
    assert outputs_of(dense, 0 * x.T @ x).error(columns, kept) == 0


def test_inputs_that_are_always_zero_go_first_and_count_as_nothing():
    x = inputs(12)
    x[:, [2, 7]] = 0
    dense = weight(5, 12)
    found = remove_units(problem_of(dense, x.T @ x), units(12, 1), [2], first_order="none")[2]
    assert found.kept.tolist() == [c for c in range(12) if c not in (2, 7)]
    assert outputs_of(dense, x.T @ x).error(found.columns, found.weight) < 1e-12


def test_nothing_and_everything_can_be_removed():
    dense = weight(5, 12)
    found = remove_units(problem_of(dense, torch.eye(12)), units(6, 2), [0, 6])
    assert torch.equal(found[0].weight, dense)
    assert len(found[0].kept) == 6
    assert found[6].weight.shape == (5, 0)
    assert len(found[6].kept) == 0


def test_counts_out_of_range_and_columns_outside_units_are_refused():
    problem = problem_of(weight(5, 12), torch.eye(12))
    with pytest.raises(ValueError, match="between 0 and 6 units"):
        remove_units(problem, units(6, 2), [7])
    with pytest.raises(ValueError, match="do not cover"):
        remove_units(problem, units(5, 2), [1])


def test_moments_that_cannot_be_factorised_are_damped_more():
    moments = torch.ones(6, 6, dtype=torch.float64)
    left = remove_units(problem_of(weight(3, 6), moments, damp=0.0), units(6, 1), [3])[3]
    assert left.weight.isfinite().all()
    assert len(left.kept) == 3


def test_the_expectation_is_one_product_in_place_of_many():
    dense, x = weight(5, 12), inputs(12)
    found = remove_units(problem_of(dense, x.T @ x), units(12, 1), [0, 3, 6, 9])
    copies = [(left.columns, left.weight) for left in found.values()]
    shares = [1 - count / 12 for count in found]
    mean = sum(share * x[:, columns] @ kept.T for (columns, kept), share in zip(copies, shares, strict=True))
    assert torch.allclose(x @ expectation(dense, copies, shares).T, mean / sum(shares))


def test_rounds_are_as_equal_as_possible():
    assert equal_rounds(10, 4) == [3, 6, 8, 10]
    assert equal_rounds(2, 16) == [1, 2]


def reference():
    return load_file(REFERENCE / "tyr_tiny.safetensors"), json.loads((REFERENCE / "tyr_tiny.json").read_text())


def mask(kept, count):
    found = torch.zeros(count, dtype=torch.uint8)
    found[kept] = 1
    return found


CASES = json.loads((REFERENCE / "tyr_tiny.json").read_text())["local"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"].removeprefix("local.model.layers.1."))
def test_released_local_pruner(case):
    """Kept units, weights and losses of the released program, float32, on a tiny model."""
    tensors, _ = reference()
    name, share = case["name"].rsplit(".0.", 1)[0], case["sparsity"]
    moments = tensors[f"{name}.H_undamped"]
    dense = load_file(MODELS / "tiny-mha" / "model.safetensors")[name.removeprefix("local.") + ".weight"]
    heads = "o_proj" in name
    count = case["units"] - case["kept"]
    problem = problem_of(dense, moments)
    groups = units(case["units"], dense.shape[1] // case["units"])
    left = remove_units(problem, groups, [count], rounds=1 if heads else 16)[count]
    prefix = f"{name}.{share:g}"
    assert torch.equal(mask(left.kept, case["units"]), tensors[f"{prefix}.kept"])
    whole = torch.zeros_like(dense)
    whole[:, left.columns] = left.weight.float()
    assert torch.allclose(whole, tensors[f"{prefix}.weight"], rtol=1e-4, atol=1e-4)
    assert problem.energy == pytest.approx(case["half_W0G"], rel=1e-5)
    loss = problem.loss(left.columns, left.weight)
    assert loss == pytest.approx(case["prune_loss"] + case["half_W0G"], rel=2e-3)
    if "prune_loss_one_by_one" in case:
        for key, setting in (("one_by_one", {"step": 1}), ("all_at_once", {"rounds": 1})):
            other = remove_units(problem, groups, [count], **setting)[count]
            assert torch.equal(mask(other.kept, case["units"]), tensors[f"{prefix}.{key}.kept"])
            found = problem.loss(other.columns, other.weight)
            assert found == pytest.approx(case[f"prune_loss_{key}"] + case["half_W0G"], rel=2e-3)


def test_expectation_of_the_released_copies():
    """The weighted mean of the copies of layer 0, with the sparsities as the program counts them."""
    tensors, about = reference()
    model = AutoModelForCausalLM.from_pretrained(MODELS / "tiny-mha")
    moments = {}
    for name in about["supernet"]["expectation_levels"]:
        gram = lambda module, args, name=name: moments.update({name: args[0].flatten(0, 1).T @ args[0].flatten(0, 1)})
        model.get_submodule(name).register_forward_pre_hook(gram)
    with torch.no_grad():
        model(load_file(MODELS / "tokens.safetensors")["input_ids"])
    for name, levels in about["supernet"]["expectation_levels"].items():
        dense = model.get_submodule(name).weight.detach()
        problem = problem_of(dense, moments[name])
        copies = []
        for level in levels:
            kept = tensors[f"supernet.tiny-mha.intended_expectation/{name}/{level}.kept"]
            columns = units(len(kept), dense.shape[1] // len(kept))[kept.bool()].flatten()
            copies.append((columns, problem.repair(columns) if len(columns) < len(kept) * 16 else dense))
        shares = [1 - share for share in levels.values()]
        expected = tensors[f"expectation/{name}.weight"]
        assert torch.allclose(expectation(dense, copies, shares), expected, rtol=1e-4, atol=1e-4)
