import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from budwood.errors import UsageError
from budwood.sparsity import scores
from budwood.sparsity.patterns import NM, LowPrunes, Share, Top, parse_pattern
from budwood.sparsity.published import PublishedShare

WEIGHT = torch.tensor(
    [
        [0.75, -0.125, 0.5, 0.375, -0.375, 0.875, -0.625, 0.5],
        [-0.5, 0.3125, 0.75, -0.625, 0.125, -0.875, 0.375, 1.0],
    ]
)
NORMS = torch.tensor([1.0, 4, 2, 3, 5, 1, 2, 3])
WANDA = scores.wanda(WEIGHT, NORMS)
MAGNITUDE = scores.magnitude(WEIGHT)


def columns(keep):
    return [row.nonzero().flatten().tolist() for row in keep]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_metric_is_exact_in_float32(dtype):
    expected = [
        [0.75, 0.5, 1.0, 1.125, 1.875, 0.875, 1.25, 1.5],
        [0.5, 1.25, 1.5, 1.875, 0.625, 0.875, 0.75, 3.0],
    ]
    metric = scores.wanda(WEIGHT.to(dtype), NORMS)
    assert metric.dtype == torch.float32
    assert metric.tolist() == expected


@pytest.mark.parametrize(
    ("pattern", "metric", "expected"),
    [
        (NM(2, 4), WANDA, [[2, 3, 4, 7], [2, 3, 5, 7]]),
        (NM(2, 4), MAGNITUDE, [[0, 2, 5, 6], [2, 3, 5, 7]]),
        (NM(4, 8), WANDA, [[3, 4, 6, 7], [1, 2, 3, 7]]),
        (Share(0.5), WANDA, [[3, 4, 6, 7], [1, 2, 3, 7]]),
        (Share(0.5, "matrix"), MAGNITUDE, [[0, 2, 5, 6], [2, 3, 5, 7]]),
        (Share(0.5), MAGNITUDE, [[0, 2, 5, 6], [2, 3, 5, 7]]),
        (NM(1, 4), WANDA, [[3, 4], [3, 7]]),  # N is the number kept
    ],
)
def test_worked_masks(pattern, metric, expected):
    assert columns(pattern.keep(metric)) == expected


SHARES = st.sampled_from([0, 0.1, 0.3, 0.5, 2 / 3, 0.9, 1])


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 6), width=st.integers(1, 30), drop=SHARES, levels=st.integers(1, 60))
def test_shares_drop_exactly_the_count_and_the_smallest(rows, width, drop, levels):
    metric = torch.randint(0, levels, (rows, width), generator=torch.Generator().manual_seed(width)).float()
    by_row, by_matrix = Share(drop).keep(metric), Share(drop, "matrix").keep(metric)
    assert ((~by_row).sum(dim=1) == int(width * drop + 1e-9)).all()
    assert int((~by_matrix).sum()) == int(rows * width * drop + 1e-9)
    if by_matrix.any() and not by_matrix.all():
        assert metric[by_matrix].min() >= metric[~by_matrix].max()
    assert Share(drop).forecast((rows, width)).nonzeros == by_row.sum()
    assert Share(drop, "matrix").forecast((rows, width)).nonzeros == by_matrix.sum()


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 6), groups=st.integers(1, 6), group=st.integers(1, 20), data=st.data())
def test_every_group_keeps_exactly_n(rows, groups, group, data):
    pattern = NM(data.draw(st.integers(1, group)), group)
    metric = torch.randint(0, 9, (rows, groups * group), generator=torch.Generator().manual_seed(group)).float()
    keep = pattern.keep(metric)
    assert (keep.unflatten(1, (groups, group)).sum(dim=-1) == pattern.kept).all()
    assert pattern.forecast(tuple(metric.shape)).nonzeros == pytest.approx(int(keep.sum()))
    assert torch.equal(pattern.keep(metric * keep), keep) or not metric.all()  # idempotent


@pytest.mark.parametrize(
    ("pattern", "beyond_two"),
    [("2:4", 0), ("1:4", 0), ("1:2", 0), ("3:4", 8), ("4:4", 16), ("4:8", None), ("50%", None)],
)
def test_the_forecast_knows_which_patterns_contain_two_four(pattern, beyond_two):
    assert parse_pattern(pattern).forecast((4, 8)).recovered == beyond_two


def test_low_prunes_reverses_only_ties():
    flat = torch.ones(2, 8)
    assert columns(NM(2, 4).keep(flat)) == [[0, 1, 4, 5]] * 2
    assert columns(LowPrunes(NM(2, 4)).keep(flat)) == [[2, 3, 6, 7]] * 2
    assert columns(LowPrunes(Share(0.5)).keep(flat)) == [[4, 5, 6, 7]] * 2
    assert columns(LowPrunes(Share(0.5, "matrix")).keep(flat)) == [[], list(range(8))]
    assert torch.equal(LowPrunes(NM(2, 4)).keep(WANDA), NM(2, 4).keep(WANDA))


def test_unit_norms_make_wanda_magnitude():
    assert torch.equal(Share(0.5).keep(scores.wanda(WEIGHT, torch.ones(8))), Share(0.5).keep(MAGNITUDE))


def test_permuted_columns_permute_an_unstructured_mask():
    order = torch.tensor([3, 0, 7, 2, 6, 1, 5, 4])
    assert torch.equal(Share(0.5).keep(scores.wanda(WEIGHT[:, order], NORMS[order])), Share(0.5).keep(WANDA)[:, order])


def test_a_dead_channel_is_pruned_first_in_every_row():
    norms = NORMS.clone()
    norms[4] = 0
    assert not Share(0.125).keep(scores.wanda(WEIGHT, norms))[:, 4].any()


def test_the_published_count_is_one_more_and_all_ties():
    metric = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    assert PublishedShare(0.5).keep(metric).sum() == 3
    assert PublishedShare(0.0).keep(metric).sum() == 7
    assert PublishedShare(1.0).keep(metric).sum() == 0
    assert PublishedShare(0.25).keep(torch.ones(2, 4)).sum() == 0
    assert PublishedShare(0.5).forecast((2, 4)).nonzeros == 3


@pytest.mark.parametrize("text", ["2:4", "4:8", "1:4", "16:32", "50%", "62.5%", "0%", "100%", "33.3333%"])
def test_parsing_and_str_are_inverse(text):
    assert str(parse_pattern(text)) == text
    assert parse_pattern(str(parse_pattern(text))) == parse_pattern(text)


@pytest.mark.parametrize(
    "text", ["", "2:", "4:2", "0:4", "-1:4", "2:4:8", "101%", "-5%", "50", "0.5", "nan%", "half", None, 0.5]
)
def test_invalid_patterns_are_refused(text):
    with pytest.raises(UsageError):
        parse_pattern(text)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_shares_outside_0_and_1_are_refused(share):
    for make in (Share, Top, PublishedShare):
        with pytest.raises(UsageError):
            make(share)


def test_a_width_that_does_not_divide_is_refused_with_advice():
    NM(2, 4).check((3, 8), "fine")
    with pytest.raises(
        UsageError, match="down_proj: 2:4 needs the inputs to divide by 4, got 10; leave it dense"
    ) as error:
        NM(2, 4).check((3, 10), "model.layers.7.mlp.down_proj")
    assert r"--skip 'model\.layers\.\d+\.mlp\.down_proj'" in str(error.value)
    with pytest.raises(ValueError, match="divide by 4, got 10"):
        NM(2, 4).keep(torch.rand(3, 10))


def test_the_published_choice_differs_in_ties_only():
    scores = torch.rand(64, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(NM(2, 4, published=True).keep(scores), NM(2, 4).keep(scores))
    tied = (scores * 3).round()
    groups = NM(2, 4, published=True).keep(tied).view(-1, 4)
    assert (groups.sum(1) == 2).all()
    dropped = torch.where(groups, -1.0, tied.view(-1, 4)).amax(1)
    assert (dropped <= torch.where(groups, tied.view(-1, 4), float("inf")).amin(1)).all()
    assert not torch.equal(groups.view(64, 32), NM(2, 4).keep(tied))
