import math

import pytest
import torch

from budwood.sparsity.forecast import expected_density, group_law
from budwood.sparsity.histogram import x4_histogram
from budwood.sparsity.patterns import NM, Share, Top
from budwood.sparsity.recovery import Either

TABLE = [
    (0.05, 0.000119),
    (0.10, 0.000940),
    (0.15, 0.003104),
    (0.20, 0.007176),
    (0.25, 0.013646),
    (0.30, 0.022876),
]
TABLE += [(0.35, 0.035293), (0.40, 0.051123), (0.50, 0.093704), (0.75, 0.263646)]


@pytest.mark.parametrize(("alpha", "density"), TABLE)
def test_the_exact_law_at_width_4096(alpha, density):
    assert expected_density(alpha, 4096) == pytest.approx(density, abs=5.1e-7)


@pytest.mark.parametrize(
    ("width", "density"),
    [(8, 0), (16, 0.006868), (32, 0.010317), (64, 0.012009), (128, 0.012844), (768, 0.013534)],
)
def test_small_widths_recover_less(width, density):
    assert expected_density(0.25, width) == pytest.approx(density, abs=5.1e-7)


@pytest.mark.parametrize(
    ("kept", "group", "density"),
    [(2, 4, 0.013672), (4, 8, 0.00399), (8, 16, 0.00059), (1, 4, 0.0791), (1, 2, 0.03125)],
)
def test_large_widths_reach_the_closed_form(kept, group, density):
    assert expected_density(0.25, 2**20, kept, group) == pytest.approx(density, rel=5e-3)
    closed = sum((j - kept) * math.comb(group, j) * 0.25**j * 0.75 ** (group - j) for j in range(kept + 1, group + 1))
    assert expected_density(0.25, 2**20, kept, group) == pytest.approx(closed / group, rel=1e-4)


@pytest.mark.parametrize(
    ("alpha", "percent"),
    [(0.5, [6.241, 25.0, 37.518, 25.0, 6.241]), (0.25, [31.63, 42.21, 21.10, 4.68, 0.39])],
)
def test_kept_weights_per_group(alpha, percent):
    assert [100 * p for p in group_law(alpha, 4096, 4)] == pytest.approx(percent, abs=0.0051)


@pytest.mark.parametrize(("alpha", "tolerance"), [(0.25, 0.04), (0.1, 0.15)])  # 5 standard deviations of the mean
def test_the_law_holds_on_random_scores(alpha, tolerance):
    metric = torch.randn(256, 4096, generator=torch.Generator().manual_seed(1)).exp()
    recovered = int(Either(NM(2, 4), Top(alpha)).keep(metric).sum()) - metric.numel() // 2
    assert recovered / metric.numel() == pytest.approx(expected_density(alpha, 4096), rel=tolerance)
    assert Either(NM(2, 4), Top(alpha)).forecast((256, 4096)).recovered == pytest.approx(recovered, rel=tolerance)


@pytest.mark.parametrize("kept", [1, 2, 3])
@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_the_forecast_counts_weights_beyond_two_of_four(kept, scope):
    pattern, metric = (
        Either(NM(kept, 4), Top(0.4, scope)),
        torch.rand(512, 512, generator=torch.Generator().manual_seed(2)),
    )
    keep, forecast = pattern.keep(metric), pattern.forecast((512, 512))
    assert forecast.nonzeros == pytest.approx(int(keep.sum()), rel=0.02)
    beyond = (keep.unflatten(1, (-1, 4)).sum(dim=-1) - 2).clamp(min=0).sum()
    assert forecast.recovered == pytest.approx(int(beyond), rel=0.03)


def test_histogram_counts_groups():
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 1], [1, 1, 1, 1, 0, 0, 0, 0]]).bool()
    assert x4_histogram(mask).tolist() == [1, 1, 0, 1, 1]
    assert x4_histogram(mask, group=2).tolist() == [3, 2, 3]
    metric = torch.rand(64, 4096, generator=torch.Generator().manual_seed(3))
    share = x4_histogram(Share(0.5).keep(metric)) / (64 * 1024)
    assert share.tolist() == pytest.approx([0.0624, 0.25, 0.3752, 0.25, 0.0624], abs=0.006)  # 3 sd of 65536 draws
    with pytest.raises(ValueError, match="do not divide a width of 6"):
        x4_histogram(mask[:, :6])
