"""The kernel for the attention of one new token computes softmax(scale q kᵀ) v."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_paths import use
from torch import Tensor

from budwood.kernels.attention import attend


@pytest.fixture(autouse=True)
def path(monkeypatch):
    use("avx2", monkeypatch)  # the path that has the kernel


def expected(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, scale: float | None) -> Tensor:
    group = query.shape[1] // key.shape[1]
    key, value = (part.double().repeat_interleave(group, 1) for part in (key, value))
    scores = torch.einsum("bhw,bhtw->bht", query.double(), key) * (query.shape[2] ** -0.5 if scale is None else scale)
    if seen is not None:
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
    weights = torch.nan_to_num(scores.softmax(-1))  # a sequence that attends to nothing
    return torch.einsum("bht,bhtw->bhw", weights, value)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    batch=st.integers(1, 3),
    shared=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 4, 5, 9]),
    width=st.sampled_from([8, 16, 24, 64, 80, 128, 256]),
    tokens=st.sampled_from([1, 2, 7, 63, 64, 65, 200]),
    size=st.sampled_from([1.0, 30.0]),
    masked=st.booleans(),
    threads=st.integers(1, 3),
)
def test_it_is_the_softmax_of_scores_times_values(
    seed, dtype, batch, shared, group, width, tokens, size, masked, threads
):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    query = random(batch, shared * group, width) * size
    # As caches hold them: part of longer ones, and tokens before heads.
    key = random(batch, shared, tokens + 5, width)[:, :, 2 : tokens + 2]
    value = random(batch, tokens, shared, width).transpose(1, 2)
    seen = torch.rand(batch, tokens, generator=generator) < 0.6 if masked else None
    if seen is not None:
        seen[-1] = False
    exact = expected(query, key, value, seen, None)
    if seen is not None:  # unused parts of a cache may hold anything
        key, value = (part.masked_fill(~seen[:, None, :, None], torch.nan) for part in (key, value))
    before, one = torch.get_num_threads(), None
    try:
        torch.set_num_threads(1)
        one = attend(query, key, value, seen, None)
        torch.set_num_threads(threads)
        assert torch.equal(one, attend(query, key, value, seen, None))
    finally:
        torch.set_num_threads(before)
    rounding = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(one.double(), exact, rtol=rounding, atol=rounding)
    assert one.dtype == dtype


def test_a_score_that_is_no_number_is_not_hidden():
    query, key, value = torch.ones(1, 2, 16), torch.ones(1, 1, 70, 16), torch.ones(1, 1, 70, 16)
    key[0, 0, 69, 3] = torch.nan
    assert attend(query, key, value, None, None).isnan().all()
    key[0, 0, 69, 3] = torch.inf
    assert attend(query, key, value, None, None).isnan().all()


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v, seen: (q[..., :12], k[..., :12], v[..., :12], seen),  # no multiple of 8
        lambda q, k, v, seen: (q, k, v[..., :8], seen),
        lambda q, k, v, seen: (q, k[:, :, 1:], v, seen),
        lambda q, k, v, seen: (q[:, :3], k, v, seen),  # heads that key heads do not divide
        lambda q, k, v, seen: (q, k.double(), v, seen),
        lambda q, k, v, seen: (q.double(), k.double(), v.double(), seen),
        lambda q, k, v, seen: (q, k, v, seen[:, 1:]),
        lambda q, k, v, seen: (q, k, v, seen.float()),
        lambda q, k, v, seen: (q, k[:, :0], v[:, :0], seen),
        lambda q, k, v, seen: (q[:, :0], k, v, seen),
        lambda q, k, v, seen: (q.to("meta"), k.to("meta"), v.to("meta"), None),
    ],
)
def test_what_it_cannot_compute_is_left_to_torch(change):
    given = torch.zeros(2, 4, 16), torch.zeros(2, 2, 9, 16), torch.zeros(2, 2, 9, 16), torch.ones(2, 9) > 0
    assert attend(*given, None) is not None
    assert attend(*change(*given), None) is None
