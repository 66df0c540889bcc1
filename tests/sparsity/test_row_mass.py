import pytest
import torch

from budwood.errors import UsageError
from budwood.sparsity.row_mass import RowMass
from budwood.sparsity.selection import NotFinite


@pytest.mark.parametrize("drop", [0.3, 0.5, 0.6])
def test_the_whole_matrix_loses_the_share_and_rows_differ(drop):
    generator = torch.Generator().manual_seed(0)
    metric = torch.rand(64, 512, generator=generator) ** torch.linspace(0.5, 4, 64)[:, None]
    keep = RowMass(drop).keep(metric)
    assert 1 - keep.float().mean().item() == pytest.approx(drop, abs=0.001)
    assert len(keep.sum(dim=1).unique()) > 10
    for row, kept in zip(metric, keep, strict=True):
        assert row[kept].min() >= row[~kept].max()


def test_a_row_whose_smallest_score_exceeds_the_part_is_kept_whole():
    metric = torch.cat([torch.ones(1, 1), torch.full((1, 1), 5.0)])  # one weight is the whole sum of its row
    assert RowMass(0.5).keep(metric).all()


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(NotFinite):
        RowMass(0.5).keep(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(UsageError):
        RowMass(1.5)
