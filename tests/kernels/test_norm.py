"""Norms of every family are recognised by what they compute, and the kernel computes the same."""

import copy
import pickle

import pytest
import torch
from families import build, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from native_paths import use
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from budwood.kernels import dispatch
from budwood.kernels.native import MAX_FEW_ROWS
from budwood.kernels.norm import Form, NativeNorm, accelerate_norms, form_of, normalized, tolerance

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def path(monkeypatch):
    use("avx2", monkeypatch)  # the path that has the kernel


def expected(x: Tensor, weight: Tensor, epsilon: float, form: Form) -> Tensor:
    quotient = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + epsilon)
    if form == Form.ROUNDED_FIRST:
        return weight * quotient.to(x.dtype)
    return (quotient * (weight.float() + (form == Form.FROM_ONE))).to(x.dtype)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 4),
    width=st.sampled_from([8, 16, 24, 64, 200, 576]),
    size=st.sampled_from([1e-4, 1.0, 100.0]),
    epsilon=st.sampled_from([1e-6, 1e-5, 0.1]),
    form=st.sampled_from(list(Form)),
)
def test_it_is_the_quotient_times_the_weight(seed, dtype, rows, width, size, epsilon, form):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, 2 * width, generator=generator) * size).to(dtype)[:, width:]  # not contiguous
    weight = torch.randn(width, generator=generator).to(dtype)
    found = normalized(x, weight, epsilon, form)
    assert found.dtype == dtype
    assert found.is_contiguous()
    tiny = torch.finfo(dtype).smallest_normal
    torch.testing.assert_close(found, expected(x, weight, epsilon, form), rtol=tolerance(dtype), atol=tiny)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", Form)
def test_what_is_no_number_stays_none(dtype, form):
    x, weight = torch.ones(4, 16, dtype=dtype), torch.ones(16, dtype=dtype)
    x[0, 3], x[1, 15], weight[7] = torch.nan, torch.inf, torch.nan
    found = normalized(x, weight, 1e-6, form)
    assert torch.equal(found.isnan(), expected(x, weight, 1e-6, form).isnan())
    assert found[2:, 7].isnan().all()
    assert normalized(x[:, :12], weight[:12], 1e-6, form) is None  # no multiple of 8
    assert normalized(x[:0], weight, 1e-6, form) is None
    assert normalized(x, weight[:8], 1e-6, form) is None
    assert normalized(x, weight.double(), 1e-6, form) is None
    assert normalized(x.to("meta"), weight, 1e-6, form) is None


def test_every_rms_norm_of_every_family_is_recognised(family):
    for dtype in (torch.bfloat16, torch.float32):
        model = build(family).to(dtype)
        plain = copy.deepcopy(model)
        accelerate_norms(model)
        for (name, module), (_, before) in zip(model.named_modules(), plain.named_modules(), strict=True):
            rms = type(before).__name__.endswith("RMSNorm") and len(list(before.parameters())) == 1
            assert isinstance(module, NativeNorm) == rms, name
            assert isinstance(module, type(before))
            assert type(module).__name__ == type(before).__name__
            if rms:
                x = torch.randn(1, 3, len(before.weight)).to(dtype)
                with torch.no_grad():
                    assert module.few(x) is not None
                    torch.testing.assert_close(module(x), before(x), rtol=tolerance(dtype), atol=0)
                assert module.few(x) is None  # gradients are torch's
        with torch.no_grad(), dispatch.exact():
            assert torch.equal(model(token_ids()).logits, plain(token_ids()).logits)


class Norm(nn.Module):
    """With an epsilon and one weight as a norm has them."""

    def __init__(self, compute):
        super().__init__()
        self.weight, self.eps, self.compute = nn.Parameter(torch.rand(16) + 0.5), 1e-6, compute

    def forward(self, x):
        return self.compute(x.float(), self.weight, self.eps).to(x.dtype)


@pytest.mark.parametrize(
    "other",
    [
        lambda x, weight, eps: x * weight,
        lambda x, weight, eps: nn.functional.layer_norm(x, (16,), weight, eps=eps),
        lambda x, weight, eps: expected(x, weight, eps, Form.ROUNDED_LAST) * 1.01,
        lambda x, weight, eps: expected(x, weight, eps + 0.01, Form.ROUNDED_LAST),
        lambda x, weight, eps: expected(x.view(-1, 2, 8), weight.view(2, 8), eps, Form.ROUNDED_LAST).view_as(x),
        lambda x, weight, eps: expected(x, weight, eps, Form.ROUNDED_LAST)[:, :8],
        lambda x, weight, eps: x.missing,
    ],
)
def test_what_computes_anything_else_is_left_alone(other):
    same = Norm(lambda x, weight, eps: expected(x, weight, eps, Form.ROUNDED_LAST))
    assert form_of(same) is not None
    assert form_of(Norm(other)) is None


@pytest.fixture
def norm():
    norm = LlamaRMSNorm(64).bfloat16()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(64))
    before = copy.deepcopy(norm)
    accelerate_norms(norm)
    assert isinstance(norm, NativeNorm)
    return norm, before


def test_it_stays_the_module_that_it_was(norm):
    norm, before = norm
    x = torch.randn(2, 64).bfloat16()
    with torch.no_grad():
        found = norm(x)
        for again in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
            assert type(again) is type(norm)
            assert again.weight is not norm.weight
            assert torch.equal(again(x), found)
        for module in (norm, before):
            module.weight.mul_(3)
            module.variance_epsilon = 0.5
        assert torch.equal(norm(x), before(x))
        assert all(
            torch.equal(*pair) for pair in zip(norm.state_dict().values(), before.state_dict().values(), strict=True)
        )
        assert list(norm.state_dict()) == list(before.state_dict())
        assert repr(norm) == repr(before)
        assert norm.few(torch.randn(MAX_FEW_ROWS, 64).bfloat16()) is not None
        assert norm.few(torch.randn(1, MAX_FEW_ROWS + 1, 64).bfloat16()) is None
        assert norm.few(torch.randn(2, 1, 12, 64).bfloat16()) is not None  # heads of one token
        assert norm.few(torch.randn(2, 12, 1, 64).bfloat16()) is not None
        assert norm.few(torch.randn(2, 3, 12, 64).bfloat16()) is None
        assert torch.equal(norm(x.float()), before(x.float()))  # another dtype than that of the weight
        assert torch.equal(norm(hidden_states=x), before(x))
        compiled = torch.compile(norm, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), before(x))
    x.requires_grad_()
    gradients = [torch.autograd.grad(module(x).float().sum(), [x, module.weight]) for module in (norm, before)]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
