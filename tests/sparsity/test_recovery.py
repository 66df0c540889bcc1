import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from budwood.errors import UsageError
from budwood.sparsity import scores
from budwood.sparsity.blocks import TopBlocks
from budwood.sparsity.patterns import NM, Share, Top
from budwood.sparsity.recovery import Either, EitherToDensity, Recovered
from budwood.sparsity.selection import largest, portion

SMALL_WEIGHT = torch.tensor(
    [
        [0.75, -0.125, 0.5, 0.375, -0.375, 0.875, -0.625, 0.5],
        [-0.5, 0.3125, 0.75, -0.625, 0.125, -0.875, 0.375, 1.0],
    ]
)
SMALL_NORMS = torch.tensor([1.0, 4, 2, 3, 5, 1, 2, 3])

WEIGHT = torch.tensor(
    [
        [2.0, -0.875, 0.125, 0.40625, -0.1875, 1.875, -0.25, 0.25],
        [0.875, -0.5, 0.75, -0.375, -0.15625, 1.25, 1.375, -0.5625],
        [-0.125, 0.21875, 0.3125, -0.015625, 0.28125, -0.1875, 0.09375, 0.625],
        [-0.8125, 1.0, -0.4375, 0.46875, 0.0625, 0.5, -0.75, -0.34375],
    ]
).view(2, 16)
NORMS = torch.tensor([1.0, 2, 1, 4, 2, 1, 4, 1, 1, 1, 2, 2, 4, 1, 1, 2])
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def columns(keep):
    return [row.nonzero().flatten().tolist() for row in keep]


def recovered(pattern, metric):
    return columns(pattern.keep(metric) & ~pattern.base.keep(metric))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (0.25, [[], []]),
        (0.375, [[6], []]),
        (0.5, [[6], [1]]),
        (0.75, [[5, 6], [1, 6]]),
        (1.0, [[0, 1, 5, 6], [0, 1, 4, 6]]),
    ],
)
def test_recovery_of_the_small_example(dtype, alpha, expected):
    metric = scores.wanda(SMALL_WEIGHT.to(dtype), SMALL_NORMS)
    assert recovered(Either(NM(2, 4), Top(alpha)), metric) == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("alpha", "expected"),
    [(0.25, [[3], [8, 10]]), (0.1875, [[], [10]]), (0.3, [[3], [8, 10]]), (0.5, [[3, 15], [8, 10]])],
)
def test_recovery_of_the_larger_example(dtype, alpha, expected):
    metric = scores.wanda(WEIGHT.to(dtype), NORMS)
    assert (16 * metric[0]).tolist() == [32, 28, 2, 26, 6, 30, 16, 4, 14, 8, 24, 12, 10, 20, 22, 18]
    assert recovered(Either(NM(2, 4), Top(alpha)), metric) == expected


def test_masks_and_products_of_the_larger_example():
    metric = scores.wanda(WEIGHT, NORMS)
    base = NM(2, 4).keep(metric)
    assert columns(base) == [[0, 1, 5, 6, 8, 10, 13, 14], [1, 2, 4, 7, 9, 11, 14, 15]]
    assert columns(NM(2, 4).keep(scores.magnitude(WEIGHT)))[1] == [1, 2, 4, 7, 8, 9, 13, 14]
    matrix = Either(NM(2, 4), Top(0.25, "matrix"))
    assert columns(Top(0.25, "matrix").keep(metric)) == [[0, 1, 3, 5, 10, 13, 14, 15], []]
    assert recovered(matrix, metric) == [[3, 15], []]
    keep = Either(NM(2, 4), Top(0.25)).keep(metric)
    x = torch.arange(1.0, 17)
    assert (WEIGHT * base @ x).tolist() == [64.0, 6.65625]
    assert (WEIGHT * (keep & ~base) @ x).tolist() == [1.625, -12.125]
    assert (WEIGHT * keep @ x).tolist() == [65.625, -5.46875]
    unstructured = Share(0.5).keep(metric)
    assert unstructured.unflatten(1, (4, 4)).sum(dim=-1).tolist() == [[3, 1, 1, 3], [0, 2, 4, 2]]


def test_ties():
    metric = torch.tensor([[1.0, 1, 1, 1, 0, 0, 0, 0], [2, 2, 3, 2, 1, 2, 1, 2]])
    assert columns(NM(2, 4).keep(metric)) == [[0, 1, 4, 5], [0, 2, 5, 7]]
    assert columns(Top(0.5).keep(metric)) == [[0, 1, 2, 3]] * 2
    assert recovered(Either(NM(2, 4), Top(0.5)), metric) == [[2, 3], [1, 3]]


def block_example():
    i, j = torch.arange(8)[:, None], torch.arange(16)
    sign = torch.where((i + j) % 2 == 0, 1, -1)
    weight = sign * ((5 * i + 3 * j) % 17 + 1) / 16
    norms = torch.tensor([1.0, 2, 1, 2]).repeat_interleave(4)
    return weight, scores.wanda(weight, norms)


def test_block_recovery():
    weight, metric = block_example()
    assert (16 * weight[0]).tolist() == [1, -4, 7, -10, 13, -16, 2, -5, 8, -11, 14, -17, 3, -6, 9, -12]
    base = NM(2, 4).keep(metric)
    assert columns(base)[0] == [2, 3, 4, 5, 10, 11, 14, 15]
    assert columns(base)[7] == [2, 3, 4, 5, 9, 10, 14, 15]
    sums = (16 * metric * ~base).unflatten(1, (4, 4)).sum(dim=2).unflatten(0, (2, 4)).sum(dim=1)
    assert sums.tolist() == [[41, 82, 46, 80], [37, 74, 42, 94]]
    one = Recovered(NM(2, 4), TopBlocks(4, count=1))
    back = 16 * weight * (one.keep(metric) & ~base)
    assert back[:4, 4:8].tolist() == [[0, 0, 2, -5], [-1, 4, 0, 0], [6, -9, 0, 0], [-11, 0, 0, 3]]
    assert back[4:, 12:].tolist() == [[6, -9, 0, 0], [-11, 0, 0, 3], [0, -2, 5, 0], [-4, 7, 0, 0]]
    assert int((back != 0).sum()) == 16
    two = Recovered(NM(2, 4), TopBlocks(4, count=2))
    back = 16 * weight * (two.keep(metric) & ~base)
    assert back[0].tolist() == [0, 0, 0, 0, 0, 0, 2, -5, 0, 0, 0, 0, 3, -6, 0, 0]
    assert back[7].tolist() == [0, 0, 0, 0, 0, 0, -3, 6, 0, 0, 0, 0, -4, 7, 0, 0]
    assert int((back != 0).sum()) == 32
    for pattern in (one, two):
        forecast = pattern.forecast((8, 16))
        assert forecast.nonzeros == int(pattern.keep(metric).sum())
        assert forecast.recovered == int((pattern.keep(metric) & ~base).sum())
        assert forecast.block == (4, pattern.extra.count)
    assert torch.equal(Recovered(NM(2, 4), TopBlocks(4, density=0.5)).keep(metric), two.keep(metric))


def test_padded_blocks_recover_only_what_exists():
    metric = torch.rand(10, 20, generator=torch.Generator().manual_seed(0))
    pattern = Recovered(NM(2, 4), TopBlocks(8, count=3, pad=True))
    pattern.check((10, 20), "ragged")
    assert pattern.keep(metric).all()  # three blocks of 8 cover 20 columns
    assert pattern.forecast((10, 20)).nonzeros == 200
    assert pattern.forecast((10, 20)).block is None
    few = Recovered(NM(2, 4), TopBlocks(8, count=1, pad=True)).keep(metric)
    assert few.shape == (10, 20)
    assert few.sum() > NM(2, 4).keep(metric).sum()


def test_incomplete_blocks_are_refused_with_a_side_that_fits():
    with pytest.raises(UsageError, match=r"q_proj: blocks of 64 .* got 288 x 288; use block=32, pad=True, or leave"):
        Recovered(NM(2, 4), TopBlocks(64, count=1)).check((288, 288), "q_proj")
    with pytest.raises(UsageError, match="5 blocks per block row were asked for, but 16 inputs hold only 4"):
        TopBlocks(4, count=5).check((8, 16), "q_proj")


@pytest.mark.parametrize("options", [{}, {"count": 1, "density": 0.5}, {"count": -1}, {"density": 1.5}])
def test_blocks_need_one_amount(options):
    with pytest.raises(UsageError):
        TopBlocks(4, **options)


WIDTHS = st.sampled_from([8, 12, 16, 288])


@st.composite
def metrics(draw, widths=WIDTHS):
    width, levels, seed = draw(widths), draw(st.sampled_from([2, 6, 10**6])), draw(st.integers(0, 99))
    return torch.randint(0, levels, (5, width), generator=torch.Generator().manual_seed(seed)).float()


@settings(deadline=None, max_examples=80)
@given(metric=metrics(), pick=st.integers(0, 4), smaller=st.floats(0, 1))
def test_the_laws_of_recovery(metric, pick, smaller):
    width = metric.shape[1]
    alpha = [0, 1 / width, 0.25, 0.5, 1][pick]
    count = portion(alpha, width)
    base, crucial = NM(2, 4).keep(metric), Top(alpha).keep(metric)
    keep = Either(NM(2, 4), Top(alpha)).keep(metric)
    back = keep & ~base
    per_group = back.unflatten(1, (-1, 4)).sum(dim=-1)
    # P1: the recovered weights of a group are its crucial weights beyond two, its third and fourth
    assert torch.equal(per_group, (crucial.unflatten(1, (-1, 4)).sum(dim=-1) - 2).clamp(min=0))
    ranked = [largest(metric.unflatten(1, (-1, 4)), n).flatten(1) for n in (3, 4)]
    assert not (back & ~torch.where((per_group == 1).repeat_interleave(4, 1), ranked[0], ranked[1])).any()
    # P2
    assert not (back & ~crucial).any()
    assert torch.equal(keep, base | crucial)
    assert (back.sum(dim=1) <= count // 2).all()
    # P3
    less = Either(NM(2, 4), Top(alpha * smaller)).keep(metric)
    assert not (less & ~keep).any()
    # P4, P5
    if count <= 2:
        assert not back.any()
    if alpha == 1:
        assert keep.all()
    # P6
    if alpha == 0.5:
        assert torch.equal(back, Share(0.5).keep(metric) & ~base)
    # P8: dropped and at least the T-th largest; without ties exactly these
    if count and all(len(row.unique()) == width for row in metric):
        threshold = metric.sort(dim=1, descending=True).values[:, count - 1 : count]
        assert torch.equal(back, ~base & (metric >= threshold))


@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_scaling_changes_no_mask(scope):
    generator = torch.Generator().manual_seed(5)
    weight, norms = torch.randn(6, 48, generator=generator), torch.rand(48, generator=generator)
    pattern = Either(NM(2, 4), Top(0.4, scope))
    keep = pattern.keep(scores.wanda(weight, norms))
    assert torch.equal(pattern.keep(scores.wanda(weight, norms * 8)), keep)
    if scope == "row":
        rows = torch.tensor([2.0**n for n in range(-3, 3)])[:, None]  # powers of two, so nothing rounds
        assert torch.equal(pattern.keep(scores.wanda(weight * rows, norms)), keep)


def test_the_number_recovered_follows_from_the_zeros_alone():
    metric = torch.rand(40, 64, generator=torch.Generator().manual_seed(6)) + 0.1
    keep = Either(NM(2, 4), Top(0.5)).keep(metric)
    largest_two = NM(2, 4).keep(metric * keep)
    assert int((keep & ~largest_two).sum()) == int(keep.sum()) - 40 * 32
    assert ((keep & ~largest_two) == (keep & ~NM(2, 4).keep(metric))).all()


@settings(deadline=None, max_examples=40)
@given(metric=metrics(), density=st.floats(0, 0.5))
def test_density_is_met_as_nearly_as_one_rank_allows(metric, density):
    keep = EitherToDensity(NM(2, 4), density).keep(metric)
    got, wanted = int(keep.sum()) - metric.numel() // 2, portion(density, metric.numel())
    if len(metric.unique()) > metric.numel() * 0.9:
        assert abs(got - wanted) <= metric.shape[0]  # one more rank adds at most one weight per row
    assert NM(2, 4).keep(metric).logical_and(~keep).sum() == 0


def test_a_fixed_number_per_row_prefers_dropped_weights_of_score_zero_to_kept_ones():
    metric = torch.tensor([[0.0, 0, 0, 0, 0, 0, 0, 0], [9, 8, 7, 6, 5, 4, 3, 2]])
    assert recovered(Recovered(NM(2, 4), Top(0.25)), metric) == [[2, 3], [2, 3]]


@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_an_exact_number_is_forecast_exactly(scope):
    metric = torch.rand(7, 24, generator=torch.Generator().manual_seed(8))
    pattern = Recovered(NM(2, 4), Top(0.1, scope))
    assert pattern.forecast((7, 24)).nonzeros == int(pattern.keep(metric).sum())
