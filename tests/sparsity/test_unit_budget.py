"""Which units stay: worked examples, budgets met to one unit, nested sets, and the published program's masks."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from budwood.errors import UsageError
from budwood.sparsity.fluctuation import (
    Moments,
    PublishedMoments,
    channel_scores,
    column_norms,
    compensation,
    unit_scores,
)
from budwood.sparsity.selection import NotFinite
from budwood.sparsity.unit_budget import Pool, Rules, kept_counts, kept_units, kept_weights

REFERENCE = Path(__file__).parents[1] / "data" / "reference"

# The layer of the worked example: two heads of size 2 and six neurons, hidden size 4.
O_INPUT = torch.tensor([[1.0, 0, 2, 1], [3, 0, 2, -1], [1, 2, 2, 1], [3, 2, 6, -1]])
O_WEIGHT = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 2]])
DOWN_INPUT = torch.tensor([[0.0, 1, 5, 2, 0, 1], [2, 1, 5, -2, 0, 3], [0, 3, 5, 2, 1, 1], [2, 3, 5, -2, 1, 3]])
DOWN_WEIGHT = torch.tensor([[1.0, 0, 2, 1, 0, 1], [0, 1, 2, 0, 1, 0], [1, 0, 2, 0, 0, 0], [0, 1, 2, 1, 1, 0]])
LLAMA = {"heads": 32, "cost": 4 * 128 * 4096, "neurons": 11008, "neuron": 3 * 4096, "layers": 32}


def moments_of(x):
    moments = Moments(x.shape[-1])
    moments.add(x)
    return moments


def example(power):
    heads = channel_scores(O_WEIGHT, moments_of(O_INPUT), "wifv").reshape(2, 2)
    neurons = channel_scores(DOWN_WEIGHT, moments_of(DOWN_INPUT), "wifv").reshape(6, 1)
    return [
        Pool(0, "attention", 32, unit_scores(heads, power)),
        Pool(0, "mlp", 12, unit_scores(neurons)),
    ]


def lists(kept):
    return [indices.tolist() for indices in kept]


@pytest.mark.parametrize(("power", "head"), [(1, 0.848875), (2, 0.830970)])
def test_the_full_path_of_the_worked_example(power, head):
    pools = example(power)
    assert pools[0].scores.tolist() == pytest.approx([-head, head], abs=1e-6)
    z = [-0.085373, -0.085373, -0.768361, 1.963590, -0.597614, -0.426867]
    assert pools[1].scores.tolist() == pytest.approx(z, abs=1e-6)
    reference = Rules(search="reference")
    assert lists(kept_units(pools, 0.5, Rules())) == [[1], [0, 1, 3]]
    assert lists(kept_units(pools, 0.5, reference)) == [[1], [3]]
    assert lists(kept_units(pools, 0.2, Rules())) == [[1], [0, 1, 2, 3, 4, 5]]
    assert lists(kept_units(pools, 0.2, reference)) == [[1], [0, 1, 3, 4, 5]]
    assert lists(kept_units(pools, 0, Rules())) == [[0, 1], [0, 1, 2, 3, 4, 5]]


def test_the_biases_of_the_worked_example():
    o, down = moments_of(O_INPUT), moments_of(DOWN_INPUT)
    columns, neurons = torch.tensor([2, 3]), torch.tensor([0, 1, 3])
    o_bias = compensation(O_WEIGHT, o.mean, columns)
    down_bias = compensation(DOWN_WEIGHT, down.mean, neurons)
    assert o_bias.tolist() == [2, 1, 3, 0]
    assert down_bias.tolist() == [12, 10.5, 10, 10.5]
    output = O_INPUT[:, columns] @ O_WEIGHT[:, columns].T + o_bias
    assert output.mean(0).tolist() == (O_INPUT @ O_WEIGHT.T).mean(0).tolist() == [5, 1, 3, 3]
    dense = DOWN_INPUT @ DOWN_WEIGHT.T
    output = DOWN_INPUT[:, neurons] @ DOWN_WEIGHT[:, neurons].T + down_bias
    assert output.mean(0).tolist() == dense.mean(0).tolist() == [13, 12.5, 11, 12.5]
    assert (output - dense).square().sum(1).mean() == 1.5
    assert not compensation(DOWN_WEIGHT, down.mean, torch.arange(6)).any()


def test_wifn_of_the_worked_example_keeps_the_constant_neuron():
    scores = channel_scores(DOWN_WEIGHT, moments_of(DOWN_INPUT), "wifn")
    assert scores.tolist() == pytest.approx([1.414214, 2.236068, 20, 2, 0.707107, 1.118034], abs=1e-6)


def llama_pools():
    random = torch.Generator().manual_seed(0)
    return [
        Pool(layer, kind, cost, torch.rand(units, generator=random, dtype=torch.float64))
        for layer in range(LLAMA["layers"])
        for kind, cost, units in (
            ("attention", LLAMA["cost"], LLAMA["heads"]),
            ("mlp", LLAMA["neuron"], LLAMA["neurons"]),
        )
    ]


def test_budget_formulas_of_the_worked_example():
    pools = llama_pools()
    assert sum(pool.weights for pool in pools) == 6_476_005_376
    uniform = kept_counts(pools, 0.5, Rules("ul-mm", remove_groups=384, search="reference"))
    assert uniform == [20, 11008 - 6186] * 32
    assert kept_counts(pools, 0.5, Rules("ul-mm", remove_groups=384)) == [20, 11008 - 6187] * 32
    for search in ("reference", "nearest"):
        counts = kept_counts(pools, 0.5, Rules("al-mm", remove_groups=380, search=search))
        assert sum(counts[::2]) == 32 * 32 - 380
        assert sum(counts[1::2]) == 32 * 11008 - 198_656
    assert 6_738_415_616 - 6_476_005_376 + kept_weights(pools, counts) == 3_500_412_928


def test_equal_standardised_scores_go_in_the_order_of_layers():
    scores = [[1.0, 2, 3, 6], [10.0, 20, 30, 60], [5.0, 5, 5, 45]]
    pools = [Pool(i, "mlp", 3, unit_scores(torch.tensor(x)[:, None])) for i, x in enumerate(scores)]
    assert lists(kept_units([pools[0], pools[2]], 1 / 8, Rules())) == [[1, 2, 3], [0, 1, 2, 3]]
    assert lists(kept_units(pools[:2], 1 / 8, Rules())) == [[0, 1, 2, 3], [1, 2, 3]]  # the earlier stays


def pools_of(data):
    """Random pools of several layers, with ties and two costs."""
    pools = []
    for layer in range(data.draw(st.integers(1, 4))):
        for kind, cost, most in (("attention", data.draw(st.sampled_from([20, 64])), 6), ("mlp", 6, 40)):
            units = data.draw(st.integers(1, most))
            seed = data.draw(st.integers(0, 99))
            scores = torch.randn(units, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            pools.append(Pool(layer, kind, cost, (4 * scores).round() / 4))
    return pools


@settings(deadline=None, max_examples=60)
@given(data=st.data(), drop=st.floats(0, 0.95))
def test_the_budget_is_met_to_half_of_the_largest_unit(data, drop):
    pools = pools_of(data)
    counts = kept_counts(pools, drop, Rules(min_groups=0, min_neurons=0))
    whole = sum(pool.weights for pool in pools)
    assert abs(kept_weights(pools, counts) - (1 - drop) * whole) <= max(pool.cost for pool in pools) / 2 + 1e-6
    bounded = kept_counts(pools, drop, Rules(min_groups=2, min_neurons=3))
    assert all(
        n >= min(len(pool), 2 if pool.kind == "attention" else 3) for n, pool in zip(bounded, pools, strict=True)
    )


@settings(deadline=None, max_examples=60)
@given(data=st.data(), drops=st.tuples(st.floats(0, 1), st.floats(0, 1)), least=st.integers(0, 2))
def test_a_larger_share_keeps_a_subset(data, drops, least):
    pools = pools_of(data)
    rules = Rules(min_groups=least, min_neurons=least)
    more, fewer = (kept_units(pools, drop, rules) for drop in sorted(drops))
    for larger, smaller in zip(more, fewer, strict=True):
        assert set(smaller.tolist()) <= set(larger.tolist())


@settings(deadline=None, max_examples=60)
@given(data=st.data(), drop=st.floats(0, 0.9))
def test_uniform_layers_are_each_as_near_as_a_neuron_allows(data, drop):
    """However few groups there are: the rounded share of groups, and neurons for the rest."""
    pools = pools_of(data)
    counts = kept_counts(pools, drop, Rules("ul-um", min_groups=0, min_neurons=0))
    for i in range(0, len(pools), 2):
        layer, kept = pools[i : i + 2], counts[i : i + 2]
        goal = (1 - drop) * sum(pool.weights for pool in layer)
        assert abs(kept[0] - (1 - drop) * len(layer[0])) <= 0.5 + 1e-9
        if 0 < kept[1] < len(layer[1]):
            assert abs(kept_weights(layer, kept) - goal) <= layer[1].cost / 2 + 1e-6


@pytest.mark.parametrize("structure", ["ul-um", "al-am"])
def test_neurons_are_aligned_within_one_step(structure):
    random = torch.Generator().manual_seed(3)
    pools = [
        Pool(layer, kind, cost, torch.randn(units, generator=random))
        for layer in range(5)
        for kind, cost, units in (("attention", 100, 4), ("mlp", 6, 150))
    ]
    for drop in (0.1, 0.33, 0.5, 0.8):
        counts = kept_counts(pools, drop, Rules(structure, align=16))
        assert all(count % 16 == 0 or count == 150 for count in counts[1::2])
        assert all(count > 0 for count in counts)
        goal = (1 - drop) * sum(pool.weights for pool in pools)
        assert abs(kept_weights(pools, counts) - goal) <= (6 * 16 if structure == "al-am" else 5 * 6 * 8 + 1)


def test_experts_of_a_layer_share_its_budget():
    pools = [Pool(0, "attention", 96, torch.arange(2.0)), *[Pool(0, "mlp", 24, torch.arange(10.0))] * 4]
    for drop in (0.1, 0.25, 0.37, 0.5):
        counts = kept_counts(pools, drop, Rules("ul-um"))
        assert max(counts[1:]) - min(counts[1:]) <= 1
        assert abs(kept_weights(pools, counts) - (1 - drop) * 1152) <= 12


@pytest.mark.parametrize(
    ("drop", "rules", "message"),
    [
        (0.5, Rules("al-mm"), "which need it; the structure is al-mm"),
        (0.5, Rules("al-am", remove_groups=3), "the structure is al-am"),
        (0.25, Rules("al-mm", remove_groups=15), "cannot be removed: the blocks have 16 groups"),
        (0.1, Rules("al-mm", remove_groups=12), "removes more weights than the budget"),
        (0.9, Rules("al-mm", remove_groups=0), "more neurons removed than there are"),
        (0.25, Rules("ul-mm", remove_groups=16), "takes 4 of 4 groups"),
        (0.1, Rules("ul-mm", remove_groups=12), "removes more weights than the budget"),
    ],
)
def test_what_cannot_be_is_refused(drop, rules, message):
    pools = [
        Pool(layer, kind, cost, torch.arange(float(units)))
        for layer in range(4)
        for kind, cost, units in (("attention", 4096, 4), ("mlp", 192, 160))
    ]
    with pytest.raises(UsageError, match=message):
        kept_counts(pools, drop, rules)


def test_no_group_may_be_removed_by_request():
    pools = [Pool(0, "attention", 4, torch.arange(4.0)), Pool(0, "mlp", 1, torch.arange(40.0))]
    for search in ("nearest", "reference"):
        assert kept_counts(pools, 0.25, Rules("al-mm", remove_groups=0, search=search)) == [4, 26]


@pytest.mark.parametrize("structure", ["ul-um", "al-am"])
def test_permuting_units_permutes_what_stays(structure):
    random = torch.Generator().manual_seed(5)
    scores = [torch.randn(units, generator=random) for units in (6, 90, 6, 90)]
    orders = [torch.randperm(len(each), generator=random) for each in scores]

    def kept(values):
        pools = [
            Pool(i // 2, kind, cost, each)
            for i, (kind, cost, each) in enumerate(zip(["attention", "mlp"] * 2, [64, 6] * 2, values, strict=True))
        ]
        return lists(kept_units(pools, 0.4, Rules(structure)))

    permuted = kept([each[order] for each, order in zip(scores, orders, strict=True)])
    for mine, other, order in zip(kept(scores), permuted, orders, strict=True):
        assert mine == sorted(order[other].tolist())


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(NotFinite):
        kept_units([Pool(0, "mlp", 1, torch.tensor([1.0, float("nan")]))], 0.5, Rules())


# The published program on a model of 4 layers, 4 heads of size 16, 160 neurons; 8 sequences of 32 tokens.


@pytest.fixture(scope="module")
def published():
    folder = REFERENCE / "flap"
    return json.loads((folder / "flap_tiny.json").read_text()), load_file(folder / "flap_tiny.safetensors")


@pytest.fixture(scope="module")
def weights():
    return load_file(REFERENCE / "models" / "tiny-mha" / "model.safetensors")


@pytest.fixture(scope="module")
def moments():
    """By matrix and layer. A sequence of mean ± deviation has the sums that were recorded."""
    sums = load_file(REFERENCE / "flap" / "flap_moments.safetensors")
    found = {}
    for name in ("o_proj", "down_proj"):
        for layer in range(4):
            mean = sums[f"{name}.sum"][layer] / 32
            deviation = (sums[f"{name}.sumsq"][layer] / 32 - mean.square()).clamp(min=0).sqrt()
            statistic = PublishedMoments(mean.shape[1])
            statistic.add(torch.stack([mean + deviation, mean - deviation], dim=1).repeat(1, 16, 1))
            found[name, layer] = statistic
    return found


def weight_of(weights, name, layer):
    part = "self_attn" if name == "o_proj" else "mlp"
    return weights[f"model.layers.{layer}.{part}.{name}.weight"]


def published_pools(weights, moments, metric, structure, head):
    pools = []
    for layer in range(4):
        for name, kind, cost, width, power in (("o_proj", "attention", head, 16, 2), ("down_proj", "mlp", 1, 1, 1)):
            channels = channel_scores(weight_of(weights, name, layer), moments[name, layer], metric)
            scores = unit_scores(channels.reshape(-1, width), power, standardise=structure.startswith("al"))
            pools.append(Pool(layer, kind, cost, scores))
    return pools


def masks(kept):
    """Kept indices of every pool as [layers, heads] and [layers, neurons]."""
    heads, neurons = torch.zeros(4, 4, dtype=torch.uint8), torch.zeros(4, 160, dtype=torch.uint8)
    for layer in range(4):
        heads[layer, kept[2 * layer]] = 1
        neurons[layer, kept[2 * layer + 1]] = 1
    return heads, neurons


def test_published_statistics(published, moments):
    _, tensors = published
    for name in ("o_proj", "down_proj"):
        for layer in range(4):
            found = moments[name, layer]
            for kind, value in (("baseline_inp", found.mean), ("fluc_inp", found.variance())):
                expected = tensors[f"official.{name}.{kind}"][layer]
                torch.testing.assert_close(value.float(), expected, rtol=1e-5, atol=2e-7)
            torch.testing.assert_close(
                found.energy().float(), tensors[f"official.{name}.scaler_inp"][layer], rtol=1e-5, atol=0
            )


def test_published_masks_and_biases(published, weights, moments):
    facts, tensors = published
    assert len(facts["cases"]) == 30
    for case, about in facts["cases"].items():
        structure = about["structure"].lower()
        head = 4 * 16 * 64 / (3 * 64)  # neurons a head costs
        if structure == "al-am" and about["head_weight_used"] == 170:
            head = 170  # the program's constant, whatever the head size
        pools = published_pools(weights, moments, about["metric"].lower(), structure, head)
        groups = about["remove_heads"] if structure in ("ul-mm", "al-mm") else None
        rules = Rules(structure, groups, min_groups=0, min_neurons=0, search="reference")
        kept = kept_units(pools, about["pruning_ratio"], rules)
        heads, neurons = masks(kept)
        assert torch.equal(heads, tensors[f"{case}.heads"]), case
        assert torch.equal(neurons, tensors[f"{case}.neurons"]), case
        for layer in range(4):
            columns = (kept[2 * layer][:, None] * 16 + torch.arange(16)).flatten()
            for name, channels in (("o_proj", columns), ("down_proj", kept[2 * layer + 1])):
                bias = compensation(weight_of(weights, name, layer), moments[name, layer].mean, channels)
                expected = tensors[f"{case}.{name}.bias"][layer]
                torch.testing.assert_close(bias, expected, rtol=1e-5, atol=1e-5)


def test_the_nearest_search_keeps_one_unit_more(published, weights, moments):
    facts, tensors = published
    for case, about in facts["cases"].items():
        if about["structure"] == "AL-AM":
            pools = published_pools(weights, moments, about["metric"].lower(), "al-am", about["head_weight_used"])
            heads, neurons = masks(kept_units(pools, about["pruning_ratio"], Rules(min_groups=0, min_neurons=0)))
            more = heads.sum() + neurons.sum() - tensors[f"{case}.heads"].sum() - tensors[f"{case}.neurons"].sum()
            assert more == 1, case


@pytest.mark.parametrize("drop", [0.25, 0.5])
def test_published_magnitude_masks(published, weights, drop):
    _, tensors = published
    pools = []
    for layer in range(4):
        for name, kind, width in (("o_proj", "attention", 16), ("down_proj", "mlp", 1)):
            norms = column_norms(weight_of(weights, name, layer)).reshape(-1, width)
            pools.append(Pool(layer, kind, 1, unit_scores(norms, standardise=False)))
    heads, neurons = masks(kept_units(pools, drop, Rules("ul-um", search="reference")))
    assert torch.equal(heads, tensors[f"prune_magnitude_sp.{drop}.heads"])
    assert torch.equal(neurons, tensors[f"prune_magnitude_sp.{drop}.neurons"])
