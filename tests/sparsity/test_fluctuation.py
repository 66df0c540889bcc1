"""FLAP's statistics and scores: the worked examples, the published program's data, and the meaning of the score."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from budwood.errors import RunError
from budwood.sparsity.fluctuation import (
    Moments,
    PublishedMoments,
    channel_scores,
    compensation,
    standardised,
    unit_scores,
)

A, B, C = (torch.tensor(x) for x in ([[1.0, 0, 4], [3, 0, 4]], [[2.0, 6, 4], [6, 2, 4]], [[0.0, 2, 4], [0, 2, 4]]))
W = torch.tensor([[1.0, 2, 3], [0, -1, 4]])


def summed(statistic, *inputs):
    result = statistic(inputs[0].shape[-1])
    for x in inputs:
        result.add(x)
    return result


def test_streaming_statistics_of_the_worked_example():
    moments = Moments(3)
    for x, count, mean, centred in (
        (A, 2, [2, 0, 4], [2, 0, 0]),
        (B, 4, [3, 2, 4], [14, 24, 0]),
        (C, 6, [2, 2, 4], [26, 24, 0]),
    ):
        moments.add(x)
        assert moments.count == count
        assert moments.mean.tolist() == pytest.approx(mean, abs=1e-12)
        assert moments.centred.tolist() == pytest.approx(centred, abs=1e-12)
    assert moments.variance().tolist() == pytest.approx([5.2, 4.8, 0])
    assert moments.energy().tolist() == pytest.approx([50 / 3, 16, 32])
    assert channel_scores(W, moments, "ifv").tolist() == pytest.approx([5.2, 4.8, 0])
    assert channel_scores(W, moments, "wifv").tolist() == pytest.approx([5.2, 24, 0])
    assert channel_scores(W, moments, "wifn").tolist() == pytest.approx([2.041241, 6, 19.798990], abs=1e-6)


def test_the_published_recursion_of_the_worked_example():
    moments = summed(PublishedMoments, A, B, C)
    assert moments.variance().tolist() == pytest.approx([31 / 6, 4, 0])
    assert moments.mean.tolist() == pytest.approx([2, 2, 4])
    with pytest.raises(NotImplementedError):
        moments.merge(summed(PublishedMoments, A))


@settings(deadline=None, max_examples=25)
@given(data=st.data(), sequences=st.integers(1, 7), tokens=st.integers(1, 300), width=st.integers(1, 12))
def test_any_division_into_batches_gives_the_same_moments(data, sequences, tokens, width):
    x = torch.randn(sequences, tokens, width, generator=torch.Generator().manual_seed(tokens)) + 5
    cut = data.draw(st.integers(0, sequences))
    whole = summed(Moments, x)
    batches = summed(Moments, x[:cut], x[cut:])
    assert torch.equal(batches.mean, whole.mean)
    assert torch.equal(batches.centred, whole.centred)
    other = summed(Moments, x[cut:].flip(0))
    other.merge(summed(Moments, x[:cut]))
    assert (other.count, other.sequences) == (whole.count, whole.sequences) == (sequences * tokens, sequences)
    flat = x.double().reshape(-1, width)
    for found in (whole, other):
        torch.testing.assert_close(found.mean, flat.mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.centred, (flat - flat.mean(0)).square().sum(0), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.energy() * sequences, flat.square().sum(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("statistic", [Moments, PublishedMoments])
def test_a_saved_statistic_continues(statistic):
    x = torch.randn(5, 9, 4, generator=torch.Generator().manual_seed(0))
    whole, first, second = summed(statistic, x), summed(statistic, x[:2]), statistic(4)
    second.load_state(first.state())
    second.add(x[2:])
    for name, tensor in whole.state().items():
        assert torch.equal(second.state()[name], tensor)
    assert summed(statistic, x[:0]).count == summed(statistic, x[0, :0]).count == 0


def test_broken_inputs_are_refused():
    moments = summed(Moments, torch.tensor([[1.0, float("inf")], [2, 3]]))
    with pytest.raises(RunError, match=r"layer\.o_proj: 1 of 2"):
        moments.check("layer.o_proj")


def test_wifv_is_the_error_of_removing_one_channel_with_its_bias():
    random = torch.Generator().manual_seed(1)
    x = torch.randn(40, 6, generator=random) * torch.tensor([1.0, 2, 3, 0, 1, 1]) + torch.arange(6)
    weight = torch.randn(5, 6, generator=random)
    moments = summed(Moments, x)
    scores = channel_scores(weight, moments, "wifv")
    for channel in range(6):
        kept = torch.tensor([index for index in range(6) if index != channel])
        output = x[:, kept] @ weight[:, kept].T + compensation(weight, moments.mean, kept)
        error = (output - x @ weight.T).square().sum(1).mean()
        assert float(error) == pytest.approx(39 / 40 * float(scores[channel]), rel=1e-4, abs=1e-9)
        torch.testing.assert_close(output.mean(0), (x @ weight.T).mean(0), rtol=1e-4, atol=1e-4)


def test_scaling_a_producer_against_its_consumer_changes_no_wifv():
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(2))
    weight = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))
    scale = torch.tensor([1.0, 4, 0.25, 2, 0.5, 1])
    one = channel_scores(weight, summed(Moments, x), "wifv")
    other = channel_scores(weight / scale, summed(Moments, x * scale), "wifv")
    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_standardising_makes_layers_comparable():
    z = [-0.925820, -0.462910, 0, 1.388730]
    assert standardised(torch.tensor([1.0, 2, 3, 6])).tolist() == pytest.approx(z, abs=1e-6)
    assert standardised(torch.tensor([10.0, 20, 30, 60])).tolist() == pytest.approx(z, abs=1e-6)
    assert standardised(torch.tensor([5.0, 5, 5, 45])).tolist() == pytest.approx([-0.5, -0.5, -0.5, 1.5])
    assert standardised(torch.full((7,), 0.1)).tolist() == [0] * 7


def test_the_exponent_decides_which_head_goes():
    scores = torch.tensor([[1, 5], [3, 3.2]])
    assert unit_scores(scores, 1, standardise=False).tolist() == pytest.approx([6, 6.2])
    assert unit_scores(scores, 2, standardise=False).tolist() == pytest.approx([26, 19.24])
    assert unit_scores(scores, 1).argmin() == 0
    assert unit_scores(scores, 2).argmin() == 1


def test_a_group_scores_the_mean_over_all_of_its_query_heads():
    """Four query heads of size 2 in two groups; standardising again changes neither order nor ratio."""
    z = torch.tensor([0.9, -0.1, 0.3, 0.1, -0.6, -0.2, -0.3, -0.1])
    heads, groups = unit_scores(z.reshape(4, 2)), unit_scores(z.reshape(2, 4))
    deviation = z.double().std()
    assert (heads * deviation).tolist() == pytest.approx([0.4, 0.2, -0.4, -0.2])
    assert (groups * deviation).tolist() == pytest.approx([0.3, -0.3])
