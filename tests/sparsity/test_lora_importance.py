"""LoRAPrune's criterion: the worked example, what the published program gave, and what holds for any matrix."""

import pytest
import torch
from reference import record, tensors

from budwood.sparsity.lora_importance import (
    importance,
    keep_groups,
    low_rank_gradient,
    ratio_at,
    sensitivity,
    smoothed,
)

SCALE, HEAD = 2.0, 8  # of the reference
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def reference():
    return tensors("loraprune/loraprune"), record("loraprune/loraprune")


def scored(values, name, kind="lora", **options):
    """The sensitivity of one matrix of the reference."""
    weight, a, b, da, db, dw = (values[f"{name}.{part}"] for part in ("W", "A", "B", "dA", "dB", "dW"))
    gradient = {"lora": low_rank_gradient(a, b, da, db), "grad": dw, "magnitude": torch.ones_like(weight)}[kind]
    width = HEAD if name in ATTENTION else 1
    found = importance(weight, a, b, gradient, SCALE)
    return sensitivity(found, width, columns=name in ("o_proj", "down_proj"), **options)


def test_the_worked_example():
    weight, a, b = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[1.0, -1]]), torch.tensor([[0.5], [1]])
    da, db = torch.tensor([[0.1, 0.2]]), torch.tensor([[0.3], [-0.4]])
    gradient = low_rank_gradient(a, b, da, db)
    close = torch.testing.assert_close
    close(gradient, torch.tensor([[0.32, -0.26], [-0.26, 0.68]]))
    close(gradient, b @ a - (b - db) @ (a - da))
    paper = importance(weight, a, b, gradient, 1.0, squared=True)
    close(paper, torch.tensor([[0.2304, 0.1521], [1.0816, 4.1616]]))
    close(sensitivity(paper, normalised=False), torch.tensor([0.3825, 5.2432]))
    close(sensitivity(paper, columns=True, normalised=False), torch.tensor([1.312, 4.3137]))
    code = importance(weight, a, b, gradient, 2.0)
    close(code, torch.tensor([[0.64, 0.26], [1.3, 1.36]]))
    close(sensitivity(code, normalised=False), torch.tensor([0.9, 2.66]))
    close(sensitivity(code), torch.tensor([0.320498, 0.947249]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "grad", "magnitude"])
@pytest.mark.parametrize("name", [*ATTENTION, *MLP])
def test_sensitivities_are_those_of_the_published_program(reference, name, kind):
    values, _ = reference
    for part, normalised in (("raw", False), ("norm", True)):
        expected = values[f"{name}.sensitivity.{kind}.{part}"]
        torch.testing.assert_close(scored(values, name, kind, normalised=normalised), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("module", "names"), [("self_attn", ATTENTION), ("mlp", MLP)])
def test_smoothing_and_masks_are_those_of_the_published_program(reference, module, names):
    values, facts = reference
    now = sum(scored(values, name) for name in names)
    running = smoothed(smoothed(None, now), now)
    torch.testing.assert_close(running, 0.19 * now)
    key = next(key for key in facts["ema_keys"] if key.endswith(module))
    torch.testing.assert_close(running, values[f"ema2.{key}"], rtol=1e-5, atol=1e-6)
    before = torch.ones_like(running, dtype=torch.bool)
    for ratio, counts in facts["local_prune"].items():  # in this order: 0.3, 0.45, 0.2, 0.49
        keep = keep_groups(running * before, float(ratio))
        assert int((~keep).sum()) == counts[names[0]] // (HEAD if names is ATTENTION else 1)
        for name in names:
            if (stored := values.get(f"local_prune.{ratio}.{name}.mask")) is None:
                continue  # scored on its input side, without a mask of its own
            stored = stored.bool().unflatten(0, (len(keep), -1))[:, 0]
            if ratio == "0.2":  # fewer than are masked already, all of score 0: which ones is left to the sort
                assert int(stored.sum()) == int(keep.sum())
                assert not (before & ~stored).any()
                assert not (before & ~keep).any()
            else:
                assert torch.equal(keep, stored), (ratio, name)
            following = stored
        before = following


def test_the_schedule_is_that_of_the_published_program(reference):
    _, facts = reference
    assert len(facts["schedule"]) == 101
    for step, ratio in facts["schedule"].items():
        assert ratio_at(int(step), 100, 0.5) == pytest.approx(ratio, abs=1e-12)
    for step, ratio in {10: 0, 11: 0.018517, 20: 0.165039, 30: 0.289062, 50: 0.4375, 70: 0.492188, 90: 0.5}.items():
        assert ratio_at(step, 100, 0.5) == pytest.approx(ratio, abs=1e-6)
    ratios = [ratio_at(step, 37, 0.8, first=0.2) for step in range(38)]
    assert ratios == sorted(ratios)
    assert (ratios[0], ratios[-1]) == (0.2, 0.8)


def test_at_the_start_the_stand_in_is_the_projected_gradient():
    """With B = 0, ∂A is 0 and ∂B is G Aᵀ."""
    random = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)
    weight, a, inputs, target = draw(6, 8), draw(3, 8), draw(20, 8), draw(20, 6)
    a.requires_grad_()
    b = torch.zeros(6, 3, dtype=torch.float64, requires_grad=True)
    weight.requires_grad_()
    ((inputs @ (weight + b @ a).T - target) ** 2).sum().backward()
    assert not a.grad.any()
    found = low_rank_gradient(*(tensor.detach() for tensor in (a, b, a.grad, b.grad)))
    torch.testing.assert_close(found, (weight.grad @ a.T @ a).detach())


def test_the_stand_in_does_not_depend_on_the_order_of_rows_and_columns():
    random = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=random)
    weight, a, b, da, db = draw(6, 8), draw(2, 8), draw(6, 2), draw(2, 8), draw(6, 2)
    rows, columns = torch.randperm(6, generator=random), torch.randperm(8, generator=random)
    whole = importance(weight, a, b, low_rank_gradient(a, b, da, db), 0.7)
    turned = low_rank_gradient(a[:, columns], b[rows], da[:, columns], db[rows])
    found = importance(weight[rows][:, columns], a[:, columns], b[rows], turned, 0.7)
    torch.testing.assert_close(found, whole[rows][:, columns])


def test_a_step_with_nan_is_left_out():
    now = torch.tensor([1.0, 2.0])
    broken = torch.tensor([1.0, float("nan")])
    assert smoothed(None, broken) is None
    assert torch.equal(smoothed(now, broken), now)
    torch.testing.assert_close(smoothed(now, 2 * now), torch.tensor([1.1, 2.2]))


def test_counts_are_rounded_down_and_ties_keep_the_lower_index():
    scores = torch.tensor([1.0, 3, 1, 1, 2])
    assert keep_groups(scores, 0.59).tolist() == [True, True, False, False, True]
    assert keep_groups(scores, 0.19).all()
    assert not keep_groups(scores, 1.0).any()
    assert keep_groups(scores, 0.4).tolist() == [True, True, False, False, True]
    masked = scores * torch.tensor([1, 0, 1, 1, 1])  # a masked group has the lowest score, so it stays masked
    assert not keep_groups(masked, 0.2)[1]


def test_heads_are_sums_over_their_rows_or_columns():
    importances = torch.arange(24.0).reshape(4, 6)
    assert sensitivity(importances, 2, normalised=False).tolist() == [66, 210]
    assert sensitivity(importances, 3, columns=True, normalised=False).tolist() == [120, 156]
    assert float(sensitivity(importances, 2).norm()) == pytest.approx(1)
    assert not sensitivity(torch.zeros(4, 6)).any()
