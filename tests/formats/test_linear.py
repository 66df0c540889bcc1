"""The packed layer behaves as the dense one."""

import copy

import pytest
import torch
from test_formats import scattered, skeleton
from torch import nn
from torch.utils.checkpoint import checkpoint

from budwood.errors import UsageError
from budwood.formats import FORMATS
from budwood.kernels.linear import SparseLinear

pytestmark = pytest.mark.usefixtures("reference")  # bit-equality with the dense layer
SPARSE = sorted(set(FORMATS) - {"dense"})
PURE = ("two_four", "two_four_int8", "two_four_int4")  # cannot store recovered weights


def layers(format: str, dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple[SparseLinear, nn.Linear]:
    """A packed layer 16 <- 64 and the dense one with the same weight."""
    weight = skeleton(16, 64, 0.0 if format in PURE else 0.1, dtype)
    tensors = FORMATS[format].nearest(weight)
    dense = nn.Linear(64, 16, bias, dtype=dtype)
    dense.weight = nn.Parameter(FORMATS[format].unpack(tensors, (16, 64)))
    return SparseLinear.from_packed(format, (16, 64), tensors, dense.bias), dense


@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64), (2, 1, 3, 64)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", SPARSE)
def test_the_output_is_bit_equal_to_the_dense_layer(format, dtype, bias, shape):
    sparse, dense = layers(format, dtype, bias)
    x = torch.randn(shape, dtype=dtype)
    assert torch.equal(sparse(x), dense(x))


@pytest.mark.parametrize("format", SPARSE)
def test_it_is_a_linear_and_has_only_the_packed_tensors(format):
    sparse, dense = layers(format)
    assert isinstance(sparse, nn.Linear)
    assert (sparse.in_features, sparse.out_features) == (64, 16)
    assert set(sparse.state_dict()) == {*FORMATS[format].suffixes, "bias"}
    assert torch.equal(sparse.weight, dense.weight)
    kept = (dense.weight != 0).float().mean()
    assert f"in_features=64, out_features=16, bias=True, format={format}, density={kept:.4f}" in repr(sparse)


@pytest.mark.parametrize("format", SPARSE)
def test_it_can_be_built_on_meta_from_headers_and_filled(format):
    sparse, _ = layers(format)
    headers = {suffix: (tensor.shape, tensor.dtype) for suffix, tensor in sparse.packed().items()}
    empty = SparseLinear(format, (16, 64), headers, bias=True, device="meta")
    assert empty.weight.is_meta
    assert empty.weight.shape == (16, 64)
    assert f"format={format}" in repr(empty)
    empty.load_state_dict(sparse.state_dict(), assign=True)
    x = torch.randn(3, 64)
    assert torch.equal(empty(x), sparse(x))


@pytest.mark.parametrize("format", SPARSE)
def test_copies_and_state_dicts(format):
    sparse, _ = layers(format)
    x = torch.randn(3, 64)
    before = sparse(x)
    twin = copy.deepcopy(sparse)
    for tensor in twin.packed().values():
        tensor.zero_()
    assert torch.equal(sparse(x), before)
    twin.load_state_dict(sparse.state_dict())
    assert torch.equal(twin(x), before)


@pytest.mark.parametrize("format", SPARSE)
def test_casts_change_only_the_values(format):
    sparse, dense = layers(format)
    places = {suffix: t.clone() for suffix, t in sparse.packed().items() if not t.is_floating_point()}
    sparse, dense = sparse.to(torch.float16), dense.to(torch.float16)
    assert all(torch.equal(sparse.packed()[suffix], tensor) for suffix, tensor in places.items())
    x = torch.randn(3, 64, dtype=torch.float16)
    assert torch.equal(sparse(x), dense(x))


def test_activations_of_another_dtype_fail_as_they_do_in_a_linear():
    sparse, dense = layers("bitmask")
    for layer in (sparse, dense):
        with pytest.raises(RuntimeError, match="same dtype"):
            layer(torch.randn(3, 64, dtype=torch.float16))


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64)])
@pytest.mark.parametrize("format", SPARSE)
def test_gradients_reach_the_input_and_the_bias(format, shape):
    sparse, dense = layers(format)
    gradients = []
    for layer in (sparse, dense):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        layer.bias.grad = None
        layer(x).square().sum().backward()
        gradients.append((x.grad, layer.bias.grad))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)  # the same products, perhaps added in another order


def test_gradients_under_autocast():
    sparse, _ = layers("bitmask")
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = sparse(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == sparse.bias.grad.dtype == torch.float32


def test_gradients_under_checkpointing():
    sparse, _ = layers("two_four_compact")
    x = torch.randn(3, 64, requires_grad=True)
    checkpoint(sparse, x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(x.grad, sparse.unpack().sum(0).expand(3, 64))  # float32 sums of 16 terms


def test_training_does_not_keep_the_dense_weight():
    sparse, _ = layers("bitmask")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        sparse(torch.randn(3, 64, requires_grad=True))
    assert (16, 64) not in kept


def test_writing_to_the_weight_is_an_error_and_never_a_silent_loss():
    sparse, _ = layers("bitmask")
    before = sparse.weight
    attempts = [
        lambda: sparse.weight.data,
        lambda: sparse.weight.add_(1),
        lambda: sparse.weight.copy_(torch.zeros(16, 64)),
        lambda: nn.init.zeros_(sparse.weight),
        lambda: sparse.weight.__setitem__(0, 1),
        lambda: sparse.weight.__iadd__(1),
    ]
    for attempt in attempts:
        with pytest.raises(RuntimeError, match=r"call dequantize\(\)"):
            attempt()
    with pytest.raises(AttributeError, match=r"call dequantize\(\)"):
        sparse.weight = torch.zeros(16, 64)
    assert torch.equal(sparse.weight, before)
    assert type(sparse.weight.t() + 1) is torch.Tensor


@pytest.mark.parametrize("format", SPARSE)
def test_dequantize_returns_the_dense_layer(format):
    sparse, dense = layers(format)
    back = sparse.eval().dequantize()
    assert type(back) is nn.Linear
    assert not back.training
    assert torch.equal(back.weight, dense.weight)
    assert torch.equal(back.bias, dense.bias)
    back.weight.data += 1


def test_the_smallest_sparse_format_is_taken_if_none_is_named():
    assert SparseLinear.from_dense(skeleton(16, 64)).format == "two_four"
    assert SparseLinear.from_dense(scattered(16, 63, 0.5)).format == "bitmask"
    with pytest.raises(UsageError, match="two_four cannot hold"):
        SparseLinear.from_dense(scattered(16, 64, 0.9), format="two_four")


def test_wrong_tensors_and_dense_are_refused():
    with pytest.raises(ValueError, match="bitmask has the tensors values, bitmask; got values"):
        SparseLinear("bitmask", (2, 4), {"values": ((3,), torch.float32)})
    with pytest.raises(ValueError, match="dense matrix needs no SparseLinear"):
        SparseLinear("dense", (2, 4), {"weight": ((2, 4), torch.float32)})
    with pytest.raises(UsageError, match="no format 'csr'"):
        SparseLinear("csr", (2, 4), {})


def test_an_adapter_trains_on_top_and_its_merge_is_refused():
    peft = pytest.importorskip("peft")
    sparse, dense = layers("two_four_compact")
    model = nn.Sequential()
    model.add_module("up", sparse)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["up"], init_lora_weights=False))
    x = torch.randn(3, 64)
    adapter = adapted.base_model.model.up
    delta = adapter.get_delta_weight("default")
    torch.testing.assert_close(adapted(x), dense(x) + x @ delta.t())  # float32 sums of 64 terms
    adapted(x).square().sum().backward()
    assert adapter.lora_B["default"].weight.grad.abs().sum() > 0
    with pytest.raises(RuntimeError, match=r"call dequantize\(\)"):
        adapted.merge_and_unload()
