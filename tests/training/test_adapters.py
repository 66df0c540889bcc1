"""Adapters: the worked example of PERP, the published program's numbers, zeros, and both ways to the gradients."""

import pytest
import reference
import torch

from budwood.errors import UsageError
from budwood.training.adapters import (
    ADAPTERS,
    KeptWeights,
    Lora,
    LoraPrune,
    MaskLora,
    RowScales,
    ScaleLora,
    Spp,
    stored,
)
from budwood.training.product import adapted

W = torch.tensor([[1.0, 0, -2, 0], [0, 3, 0, 4]])
A, B = torch.tensor([[1, 2, -1, 0.5]]), torch.tensor([[0.5], [-1]])
X = torch.ones(1, 4)
EXAMPLE = {  # output for ones while training, merged weight
    Lora: ((1.5, 2), None),
    LoraPrune: ((1.5, 2), [[2, 0, -3, 0], [0, -1, 0, 3]]),
    MaskLora: ((-1, 2), [[2, 0, -3, 0], [0, -1, 0, 3]]),
    ScaleLora: ((1.5, -8), [[0.5, 0, 1, 0], [0, -6, 0, -2]]),
    Spp: ((2, -9), [[2, 0, 0, 0], [0, -9, 0, 0]]),
}
GRADIENTS = {
    MaskLora: ((1, -2, 1, -2), (0, 5)),
    Lora: ((-1, -1, -1, -1), (5, 5)),
    ScaleLora: ((0.5, -3, -1, -4), (3, 8)),
}
RULES = [*ADAPTERS.values(), Lora]
LOW_RANK = [MaskLora, LoraPrune, ScaleLora, Spp]


@pytest.mark.parametrize("kind", EXAMPLE)
def test_worked_example(kind):
    rule = kind(rank=1, alpha=2)
    outputs, merged = EXAMPLE[kind]
    assert adapted(X, W, rule, [A, B])[0].tolist() == list(outputs)
    if merged is not None:
        assert rule.merged(W, W != 0, [A, B]).tolist() == merged


@pytest.mark.parametrize("kind", GRADIENTS)
def test_worked_gradients(kind):
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    adapted(X, W, kind(rank=1, alpha=2), [a, b]).sum().backward()
    assert (tuple(a.grad[0].tolist()), tuple(b.grad[:, 0].tolist())) == GRADIENTS[kind]


def test_recovered_weights_count_as_kept():
    """WRP: the mask is that of both parts, inferred from the zeros."""
    weight = torch.tensor([[1, 0.9, -2, 0], [0, 3, 0, 4]])
    merged = MaskLora(rank=1, alpha=2).merged(weight, weight != 0, [A, B])
    torch.testing.assert_close(merged, torch.tensor([[2, 2.9, -3, 0], [0, -1, 0, 3]]))


def test_plain_lora_is_not_merged():
    with pytest.raises(UsageError, match="use masklora"):
        Lora(rank=1, alpha=2).merged(W, W != 0, [A, B])


@pytest.mark.parametrize("kind", RULES)
def test_gradients_are_those_of_autograd(kind):
    random = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)
    weight = draw(6, 8) * (torch.rand(6, 8, generator=random) > 0.5)
    rule = kind(rank=3, alpha=5)
    ours = [(p.double() + 0.1 * draw(*p.shape)).requires_grad_() for p in rule.start(weight, random)]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    x, other = draw(2, 5, 8).requires_grad_(), None
    other = x.detach().clone().requires_grad_()
    cotangent = draw(2, 5, 6)
    (adapted(x, weight, rule, ours) * cotangent).sum().backward()
    ((other @ rule.weight(weight, weight != 0, theirs).T) * cotangent).sum().backward()
    for one, two in zip([x, *ours], [other, *theirs], strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ADAPTERS.values())
def test_zeros_are_exactly_the_zeros_of_before(kind, dtype):
    random = torch.Generator().manual_seed(0)
    weight = (torch.randn(16, 32, generator=random) * (torch.rand(16, 32, generator=random) > 0.5)).to(dtype)
    rule = kind(rank=4, alpha=8)
    parameters = [p + torch.randn(p.shape, generator=random) for p in rule.start(weight, random)]
    merged = rule.merged(weight.float(), weight != 0, parameters)
    assert not merged[weight == 0].view(torch.int32).any()  # no negative zeros either
    kept = stored(merged, weight)
    assert kept.dtype == dtype
    assert torch.equal(kept != 0, weight != 0)
    assert not torch.equal(kept, weight)


def test_a_kept_weight_that_becomes_zero_stays_as_it_was():
    weight = torch.tensor([[1.0, 0, 2]]).half()
    assert stored(torch.tensor([[0.0, 0, 1e-12]]), weight).tolist() == [[1, 0, 2]]


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("rank", [4, 5])
def test_the_start_is_the_pruned_weight(kind, rank):
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 32, generator=random) * (torch.rand(16, 32, generator=random) > 0.5)
    rule = kind(rank=rank, alpha=8)
    parameters = rule.start(weight, random)
    started = rule.weight(weight, weight != 0, parameters)
    torch.testing.assert_close(started, weight, rtol=0 if kind is not ScaleLora or rank == 4 else 3e-7, atol=0)
    assert rule.count((16, 32)) == sum(p.numel() for p in parameters)


@pytest.mark.parametrize("kind", [MaskLora, ScaleLora, Spp, RowScales, KeptWeights])
def test_the_forward_pass_is_that_of_the_merged_weight(kind):
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 32, generator=random) * (torch.rand(16, 32, generator=random) > 0.5)
    rule = kind(rank=4, alpha=8)
    parameters = [p + torch.randn(p.shape, generator=random) for p in rule.start(weight, random)]
    x = torch.randn(7, 32, generator=random)
    merged = x @ rule.merged(weight, weight != 0, parameters).T
    torch.testing.assert_close(adapted(x, weight, rule, parameters), merged, rtol=1e-5, atol=1e-5)


PUBLISHED = {"lora": Lora, "lora_prune": LoraPrune, "scale_lora": ScaleLora, "mask_lora": MaskLora}


@pytest.mark.parametrize("name", PUBLISHED)
def test_agrees_with_the_published_layer(name):
    held = {key.removeprefix("one_linear."): t for key, t in reference.tensors("perp/perp").items() if "linear." in key}
    rule = PUBLISHED[name](rank=4, alpha=8)
    weight, x = held["W_pruned"], held["x"].clone().requires_grad_()
    a, b = held["A"].clone().requires_grad_(), held["B"].clone().requires_grad_()
    assert torch.equal(weight != 0, held["mask"].bool())
    outputs = adapted(x, weight, rule, [a, b]) + held["bias"]
    (outputs * held["cotangent"]).sum().backward()
    close = lambda found, part: torch.testing.assert_close(found, held[f"{name}.{part}"], rtol=1e-5, atol=1e-5)
    close(outputs.detach(), "forward")
    close(a.grad, "grad_A")
    close(b.grad, "grad_B")
    close(x.grad, "grad_x")
    if name == "lora":
        close(rule.weight(weight, weight != 0, [a, b]).detach(), "merged")
    else:
        close(rule.merged(weight, weight != 0, [a, b]).detach(), "merged")
    if name == "scale_lora":
        started = rule.start(weight, torch.Generator())
        assert torch.equal(started[0], held["scale_lora.init_A"])
        assert torch.equal(started[1], held["scale_lora.init_B"])


def test_autocast_multiplies_in_its_dtype():
    x, a, b = X.clone().requires_grad_(), A.clone().requires_grad_(), B.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = adapted(x, W, MaskLora(rank=1, alpha=2), [a, b])
    assert outputs.dtype == torch.bfloat16
    outputs.sum().backward()
    assert (a.grad.dtype, x.grad.dtype) == (torch.float32, torch.float32)
    assert tuple(a.grad[0].tolist()) == GRADIENTS[MaskLora][0]
