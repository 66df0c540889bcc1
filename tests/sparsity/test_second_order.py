import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from budwood.sparsity import scores
from budwood.sparsity.patterns import NM, Share, Top
from budwood.sparsity.published import PublishedShare
from budwood.sparsity.recovery import Either
from budwood.sparsity.second_order import factorise, sparsegpt
from budwood.sparsity.statistics import Gram

TOKENS = torch.tensor([[1.0, 0, 2, 1], [0, 1, 1, 0], [2, 1, 0, 1], [1, 1, 0, 2], [0, 2, 1, 1], [1, 0, 1, 0]])
WEIGHT = torch.tensor([[1.0, -0.5, 0.25, 2.0], [0.5, 1.5, -1.0, 0.75]])
HALF = Share(0.5, "matrix")


def example_factor(tokens=TOKENS, damp=0.01):
    gram = Gram(4)
    gram.add(tokens)
    return gram.factor(damp)


def correlated(tokens, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator) @ torch.randn(width, width, generator=generator)
    gram = Gram(width)
    gram.add(x)
    return x.double(), gram, torch.randn(24, width, generator=generator)


def close(actual, expected, atol=1e-6):
    torch.testing.assert_close(actual.double(), torch.as_tensor(expected).double(), rtol=0, atol=atol)


def test_the_factor_of_the_worked_example():
    gram = Gram(4)
    gram.add(TOKENS)
    assert gram.matrix().tolist() == [[7, 3, 3, 5], [3, 7, 3, 5], [3, 3, 7, 3], [5, 5, 3, 7]]
    factor = gram.factor(0.01)
    close(
        factor.upper,
        [
            [0.553071, 0.108823, -0.100290, -0.425545],
            [0, 0.542259, -0.082163, -0.348629],
            [0, 0, 0.415334, -0.176238],
            [0, 0, 0, 0.376089],
        ],
    )
    saliency = WEIGHT.double().square() / factor.upper.diagonal().square()
    expected = [[3.269179, 0.850211, 0.362313, 28.28], [0.817295, 7.651899, 5.797016, 3.976875]]
    close(saliency, expected, atol=2e-6)


@pytest.mark.parametrize(
    ("pattern", "block", "expected", "loss"),
    [
        (NM(2, 4), 128, [[1, 0, 0, 1.752475], [0, 1.401619, -0.909334, 0]], 5.473306),
        (HALF, 4, [[0, 0, 0, 2.459689], [0, 1.401619, -0.909334, 1.134711]], 3.176341),
        (PublishedShare(0.5), 4, [[0, 0, 0, 2.459689], [0, 1.401619, -0.909334, 0]], 7.727896),
        (HALF, 2, [[1, 0, 0, 1.752475], [0, 1.401619, 0, 0.748855]], None),
        (PublishedShare(0.5), 2, [[0, 0, 0, 2.459689], [0, 1.401619, 0, 0]], None),
        (Share(1.0, "matrix"), 128, [[0] * 4] * 2, None),
        (PublishedShare(1.0), 128, [[0] * 4] * 2, None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_worked_example(pattern, block, expected, loss, dtype):
    swept = sparsegpt(WEIGHT.to(dtype), example_factor(), pattern, block)
    close(swept.weight, expected)
    if loss is not None:
        assert swept.loss == pytest.approx(loss, abs=1e-6)


def test_errors_and_output_error_of_the_worked_example():
    swept = sparsegpt(WEIGHT, example_factor(), NM(2, 4))
    close(swept.errors, [[0, -0.922069, 0.419518, 0], [0.904044, 0, 0, 3.017136]])
    change = TOKENS.double() @ (swept.weight - WEIGHT).T
    assert float(change.square().sum()) == pytest.approx(10.862321, abs=1e-5)
    only_masked = TOKENS @ (WEIGHT * ~swept.keep).T
    assert float(only_masked.square().sum()) == pytest.approx(10.875)
    half = sparsegpt(WEIGHT, example_factor(), HALF, 4)
    change = TOKENS.double() @ (half.weight - WEIGHT).T
    assert float(change.square().sum()) == pytest.approx(6.216901, abs=1e-5)


def test_a_dead_feature_loses_its_column():
    tokens = TOKENS.clone()
    tokens[:, 1] = 0
    factor = example_factor(tokens)
    assert factor.dead.tolist() == [False, True, False, False]
    swept = sparsegpt(WEIGHT, factor, NM(2, 4))
    close(swept.weight, [[1, 0, 0, 2.106308], [0, 0, -0.924399, 1.072211]])
    assert [row.nonzero().flatten().tolist() for row in ~swept.keep] == [[1, 2], [0, 1]]


@settings(deadline=None, max_examples=15)
@given(width=st.sampled_from([8, 12, 40, 64, 100]), seed=st.integers(0, 9))
def test_the_factor_inverts_the_damped_matrix(width, seed):
    _, gram, _ = correlated(300, width, seed)
    factor = gram.factor(0.01)
    damped = gram.matrix() + 0.01 * gram.matrix().diagonal().mean() * torch.eye(width, dtype=torch.float64)
    assert torch.equal(factor.upper, factor.upper.triu())
    assert (factor.upper.diagonal() > 0).all()
    torch.testing.assert_close(
        factor.upper @ damped @ factor.upper.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-9
    )
    spread = torch.linalg.inv(damped).diagonal()
    _, _, weight = correlated(1, width, seed)
    torch.testing.assert_close(scores.obs(weight, factor), weight.double().square() / spread)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), NM(3, 5), HALF, Share(0.3), Either(NM(2, 4), Top(0.4))])
def test_result_errors_and_loss_agree(pattern):
    _, gram, weight = correlated(400, 40)
    factor = gram.factor(0.01)
    swept = sparsegpt(weight, factor, pattern, 16 if not isinstance(pattern, NM) else 128)
    torch.testing.assert_close(swept.weight, weight.double() - swept.errors @ factor.upper)
    damped = torch.linalg.inv(factor.upper.T @ factor.upper)
    change = swept.weight - weight.double()
    assert swept.loss == pytest.approx(0.5 * float((change @ damped @ change.T).trace()), rel=1e-8)
    assert torch.equal(swept.weight != 0, swept.keep)
    assert not swept.errors[swept.keep].any()


def column_by_column(weight, upper, kept, group):
    """The published loop, one rank-one update per column, for N:M."""
    weight = weight.double().clone()
    for i in range(weight.shape[1]):
        if i % group == 0:
            saliency = weight[:, i : i + group] ** 2 / upper.diagonal()[i : i + group] ** 2
            keep = NM(kept, group).keep(saliency)
        error = torch.where(keep[:, i % group], 0, weight[:, i]) / upper[i, i]
        weight[:, i:] -= error[:, None] * upper[i, i:]
        weight[~keep[:, i % group], i] = 0
    return weight


@pytest.mark.parametrize(("kept", "group", "width"), [(2, 4, 64), (4, 8, 40), (2, 6, 42), (1, 1, 7), (2, 4, 292)])
def test_it_equals_the_published_loop_for_any_block(kept, group, width):
    _, gram, weight = correlated(600, width)
    factor = gram.factor(0.01)
    plain = column_by_column(weight, factor.upper, kept, group)
    for block in (group, 4 * group, 128):
        close(sparsegpt(weight, factor, NM(kept, group), block).weight, plain, atol=1e-11)


@pytest.mark.parametrize("drop", [0.0, 0.3, 0.5, 1.0])
def test_shares_are_exact_in_every_block_and_the_last_may_be_short(drop):
    _, gram, weight = correlated(300, 44)
    keep = sparsegpt(weight, gram.factor(0.01), Share(drop, "matrix"), 16).keep
    for part in keep.split(16, dim=1):
        assert int((~part).sum()) == int(part.numel() * drop)


def test_without_pruning_nothing_changes():
    _, gram, weight = correlated(300, 24)
    for choice in (Share(0.0, "matrix"), torch.ones_like(weight, dtype=torch.bool), NM(4, 4)):
        assert torch.equal(sparsegpt(weight, gram.factor(0.01), choice).weight, weight.double())


def test_a_given_mask_is_kept_and_errors_are_compensated():
    x, gram, weight = correlated(500, 48)
    own = sparsegpt(weight, gram.factor(0.01), NM(2, 4))
    again = sparsegpt(weight, gram.factor(0.01), own.keep)
    close(again.weight, own.weight, atol=1e-11)
    keep = NM(2, 4).keep(scores.magnitude(weight))
    repaired = sparsegpt(weight, gram.factor(0.01), keep).weight
    assert torch.equal(repaired != 0, keep)
    assert (x @ (repaired - weight).T).norm() < (x @ (weight * ~keep).double().T).norm()


@pytest.mark.parametrize("scale", [2.0**-20, 2.0, 1e6])
def test_the_scale_of_the_second_moments_does_not_matter(scale):
    _, gram, weight = correlated(300, 32)
    scaled = sparsegpt(weight, factorise(gram.total * scale, 0.01), NM(2, 4))
    close(scaled.weight, sparsegpt(weight, gram.factor(0.01), NM(2, 4)).weight, atol=1e-9)


def test_large_damping_is_magnitude_without_compensation():
    _, gram, weight = correlated(300, 32)
    swept = sparsegpt(weight, gram.factor(1e12), NM(2, 4))
    assert torch.equal(swept.keep, NM(2, 4).keep(scores.magnitude(weight)))
    close(swept.weight, weight * swept.keep, atol=1e-9)


def test_a_diagonal_without_damping_is_wanda():
    generator = torch.Generator().manual_seed(1)
    weight, variance = torch.randn(8, 16, generator=generator), torch.rand(16, generator=generator) + 0.1
    swept = sparsegpt(weight, factorise(torch.diag(variance).double(), 0.0), NM(2, 4))
    assert torch.equal(swept.keep, NM(2, 4).keep(scores.wanda(weight, variance.sqrt())))
    assert torch.equal(swept.weight, (weight * swept.keep).double())


def test_the_output_error_is_below_wanda_and_magnitude():
    x, gram, weight = correlated(512, 64)
    error = lambda changed: float((x @ (changed - weight).double().T).norm())
    swept = sparsegpt(weight, gram.factor(0.01), NM(2, 4)).weight
    norms = x.square().mean(dim=0).sqrt()
    by_wanda = weight * NM(2, 4).keep(scores.wanda(weight, norms))
    by_magnitude = weight * NM(2, 4).keep(scores.magnitude(weight))
    assert error(swept) < error(by_wanda)
    assert error(swept) < error(by_magnitude)


def test_damping_is_raised_and_then_interactions_are_ignored():
    indefinite = torch.tensor([[1.0, 1.05], [1.05, 1.0]], dtype=torch.float64)
    factor = factorise(indefinite, 0.01)
    assert factor.damp == 0.1
    hopeless = factorise(torch.tensor([[1.0, 3], [3, 1]], dtype=torch.float64), 0.01)
    assert hopeless.damp is None
    assert torch.equal(hopeless.upper, torch.eye(2, dtype=torch.float64))
    singular = factorise(torch.ones(2, 2, dtype=torch.float64), 0.0)
    assert singular.damp == 0.1


def test_the_input_weight_is_not_modified():
    for weight in (WEIGHT.double()[:1].clone(), WEIGHT.clone()):
        before = weight.clone()
        sparsegpt(weight, example_factor(), NM(2, 4))
        assert torch.equal(weight, before)


def test_the_number_of_threads_does_not_matter():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(900, 300, generator=random, dtype=torch.float64)
    weight, hessian = torch.randn(64, 300, generator=random), x.T @ x
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            factor = factorise(hessian, 0.01)
            assert torch.get_num_threads() == threads
            results.append((factor.upper, sparsegpt(weight, factor, NM(2, 4)).weight.float()))
    finally:
        torch.set_num_threads(before)
    for upper, pruned in results[1:]:
        assert torch.equal(upper, results[0][0])
        assert torch.equal(pruned, results[0][1])
