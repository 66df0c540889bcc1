"""Wrong inputs, foreign tensors and changes in place: refused or right, never read or written beyond their memory."""

import copy
import warnings
from functools import cache

import pytest
import torch
from matrices import pruned
from torch import Tensor, nn
from torch.nn import functional as F

from budwood.errors import RunError
from budwood.formats import FORMATS
from budwood.kernels import gpu, native, ops
from budwood.kernels.arena import Arena
from budwood.kernels.head import DenseLinear, dense, multiply
from budwood.kernels.linear import SparseLinear
from budwood.kernels.native import FEW_ROWS, SPARSE
from budwood.kernels.native_matrix import MatrixGroup, native_matrix

SHAPE = (64, 256)
WITH_RECOVERED = ["two_four_compact", "two_four_compact_int8", "two_four_compact_int4"]
SPARSE_FORMATS = sorted(set(FORMATS) - {"dense"})
PURE = ("two_four", "two_four_int8", "two_four_int4")  # cannot store recovered weights
INT4 = [name for name in FORMATS if name.endswith("int4")]
WRONG = [(3, 255), (3, 257), (1, 64), (8, 512), (256, 3), (0, 255), ()]


def weight(seed: int, dtype: torch.dtype = torch.float32, share: float = 0.05) -> Tensor:
    """A matrix whose masks differ by seed; its number of kept weights does not."""
    return pruned(*SHAPE, share, dtype)[0].roll(seed, 0)


def packed_layer(format: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> SparseLinear:
    tensors = {suffix: tensor.clone() for suffix, tensor in packed_tensors(format, seed, dtype).items()}
    return SparseLinear.from_packed(format, SHAPE, tensors)


@cache
def packed_tensors(format: str, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return FORMATS[format].nearest(weight(seed, dtype, 0.0 if format in PURE else 0.05))


def assert_product(layer: SparseLinear, x: Tensor, tolerance: float = 1e-3) -> None:
    torch.testing.assert_close(layer(x), F.linear(x, layer.unpack()), rtol=tolerance, atol=tolerance)


# Foreign tensors


@pytest.mark.parametrize("format", WITH_RECOVERED)
@pytest.mark.parametrize("change", ["repeated", "falling", "beyond", "counts", "on the 2:4 part"])
def test_hostile_columns_are_refused_before_they_are_multiplied(path, format, change):
    shape = (8, 200)
    dense = torch.randn(shape)
    tensors = FORMATS[format].nearest(torch.where(torch.arange(200) % 4 < 3, dense, 0))  # 50 recovered in every row
    columns = tensors["rec_columns"]
    if change == "repeated":
        columns[:50] = columns[0].clone()
    elif change == "falling":
        columns[:50] = columns[:50].flip(0)
    elif change == "beyond":
        columns[49] = 255
    elif change == "counts":
        tensors["rec_counts"][0] -= 1
        tensors["rec_counts"][1] += 1
    else:
        free = tensors["places"][0, 0] & 3
        columns[0] = free
    with pytest.raises(RunError, match=r"SparseLinear is damaged: .*; give the tensors of one packed matrix"):
        SparseLinear.from_packed(format, shape, tensors)
    if format == "two_four_compact_int8":
        with pytest.raises(RunError, match="cannot be multiplied"):
            native_matrix(format, shape, tensors)


@pytest.mark.parametrize("format", SPARSE_FORMATS)
def test_from_packed_takes_only_tensors_of_the_right_number_size_and_dtype(format):
    tensors = FORMATS[format].nearest(weight(0, share=0.0 if format in PURE else 0.05))
    for suffix, tensor in tensors.items():
        for other in (tensor.reshape(-1)[:-1].clone(), tensor[None], tensor.to(torch.complex64)):
            with pytest.raises(RunError, match=r"SparseLinear.* (does not fit|is damaged)"):
                SparseLinear.from_packed(format, SHAPE, tensors | {suffix: other})
        with pytest.raises(RunError, match=f"lacks SparseLinear.{suffix}"):
            SparseLinear.from_packed(format, SHAPE, {name: t for name, t in tensors.items() if name != suffix})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float16])
@pytest.mark.parametrize("format", [*WITH_RECOVERED, "two_four_csr", "two_four_ell"])
def test_recovered_values_of_another_dtype_are_refused_in_one_sentence(fastest, format, dtype):
    tensors = FORMATS[format].nearest(weight(0))
    part = "ell_values" if format == "two_four_ell" else "rec_values"
    tensors[part] = tensors[part].to(dtype)
    sentence = rf"{part} does not fit a 64 x 256 matrix .*: expected float32 \[\d+.*\], found float"
    with pytest.raises(RunError, match=sentence):
        SparseLinear.from_packed(format, SHAPE, tensors)
    with pytest.raises(RunError, match=sentence):
        ops.linear(torch.ones(1, 256), None, list(tensors.values()), format, *SHAPE)


@torch.no_grad()
@pytest.mark.parametrize("format", ["two_four_compact_int8", "bitmask_int8", "bitmask"])
def test_a_layer_in_float64_multiplies_by_unpacking(fastest, format):
    layer, x = packed_layer(format), torch.randn(2, 256).double()
    layer(x.float())
    torch.testing.assert_close(layer.double()(x), F.linear(x, layer.unpack()))


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("format", SPARSE_FORMATS)
def test_an_operator_refuses_tensors_of_another_matrix(fastest, monkeypatch, format, kernels):
    monkeypatch.setenv(native.VARIABLE, kernels)
    tensors = list(packed_layer(format).packed().values())
    for shape in ((64, 200), (65, 256), (64, 264), (32, 256)):
        with pytest.raises(RunError):
            ops.linear(torch.ones(1, shape[1]), None, tensors, format, *shape)
    with pytest.raises(RuntimeError):
        ops.linear(torch.ones(1, 256), torch.ones(63), tensors, format, *SHAPE)


# Wrong inputs


@torch.no_grad()
@pytest.mark.parametrize("in_arena", [False, True])
@pytest.mark.parametrize("format", ["bitmask", "two_four", "two_four_csr", "two_four_compact_int8", *INT4])
def test_x_of_another_width_raises_as_torch_does(path, format, in_arena):
    layer = packed_layer(format)
    if in_arena:
        layer.to_native_format(Arena(1 << 20))
    for size in WRONG:
        x = torch.ones(size)
        with pytest.raises(RuntimeError):
            F.linear(x, layer.unpack())
        with pytest.raises(RuntimeError):
            layer(x)
        with pytest.raises(RuntimeError):
            ops.linear(x, None, list(layer.packed().values()), layer.format, *SHAPE)
        matrix = layer.native_matrix()
        if matrix is not None:
            for kernel in (FEW_ROWS, SPARSE):
                with pytest.raises(RuntimeError, match="cannot be multiplied"):
                    matrix.linear(x, None, kernel)
            with pytest.raises(RuntimeError, match="cannot be multiplied"):
                MatrixGroup([matrix, matrix]).linear(x, [None, None])


def test_x_of_another_width_raises_with_gradients_and_compiled(fastest):
    layer = SparseLinear.from_dense(weight(0), torch.zeros(64))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        layer(torch.ones(2, 128, requires_grad=True))
    with pytest.raises(Exception, match="cannot be multiplied"):  # torch wraps what tracing raises
        torch.compile(layer, backend="eager", fullgraph=True)(torch.ones(2, 128))


@torch.no_grad()
def test_x_of_another_width_raises_in_the_head(fastest):
    head = nn.Linear(256, 300, bias=False).bfloat16()
    head.__class__ = DenseLinear
    for size in WRONG:
        x = torch.ones(size, dtype=torch.bfloat16)
        for product in (head, lambda x: multiply(head.weight, x, None), lambda x: dense(x, head.weight, None)):
            with pytest.raises(RuntimeError):
                product(x)
    x = torch.ones(2, 256, dtype=torch.bfloat16)
    assert multiply(head.weight, x.float(), None) is None
    assert multiply(head.weight.float(), x, None) is None
    if native.has_dense():
        with pytest.raises(RuntimeError):
            multiply(head.weight, x, torch.ones(299).bfloat16())


def test_x_of_another_width_raises_for_a_matrix_of_the_gpu():
    matrix = gpu.gpu_matrix(weight(0, torch.bfloat16))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        matrix.linear(torch.ones(2, 128).bfloat16())


# Changes in place


@torch.no_grad()
@pytest.mark.parametrize("in_arena", [False, True])
@pytest.mark.parametrize(
    "format", ["bitmask", "two_four", "bitmask_int8", "two_four_compact_int8", "two_four_csr", *INT4]
)
@pytest.mark.parametrize("way", ["load_state_dict", "copy_", "assign", "data"])
def test_another_mask_loaded_after_a_product_is_multiplied(path, format, way, in_arena):
    layer, other = packed_layer(format), packed_layer(format, seed=7)
    if in_arena:
        layer.to_native_format(Arena(1 << 20))
        if layer.format != format:
            other.to_native_format()
    for rows in (1, 9):
        x = torch.randn(rows, 256)
        layer(x)
        if way == "load_state_dict":
            layer.load_state_dict(other.state_dict())
        elif way == "assign":
            layer.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
        else:
            for name, tensor in other.packed().items():
                parameter = layer.get_parameter(name)
                if way == "data":
                    parameter.data = tensor.clone()
                else:
                    parameter.copy_(tensor)
        torch.testing.assert_close(layer(x), F.linear(x, other.unpack()), rtol=1e-3, atol=5e-3)  # int8
        other = packed_layer(format, seed=3)
        if in_arena and layer.format != format:
            other.to_native_format()


@torch.no_grad()
@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("format", [name for name in SPARSE_FORMATS if name != "dense_int4"])
@pytest.mark.parametrize("in_arena", [False, True])
def test_tensors_changed_in_place_to_no_matrix_are_refused(fastest, monkeypatch, format, in_arena, kernels):
    """In whatever way they are multiplied, and whether somebody still holds them or not."""
    monkeypatch.setenv(native.VARIABLE, kernels)
    for held in (False, True):
        layer, x = packed_layer(format), torch.randn(1, 256)
        if in_arena:
            layer.to_native_format(Arena(1 << 20))
        layer(x)
        changed = layer.get_parameter("places" if "places" in layer.packed() else "bitmask").fill_(0)
        if not held:
            del changed
        with pytest.raises(RunError, match="cannot be multiplied"):
            layer(x)


@torch.no_grad()
@pytest.mark.parametrize("format", ["two_four_ell", "two_four_csr", "two_four_compact_int4"])
def test_values_that_become_zero_by_a_cast_or_by_training_are_no_fault(format):
    layer, x = packed_layer(format), torch.randn(2, 256)
    layer(x)
    for name, tensor in layer.packed().items():
        if tensor.is_floating_point() and name != "epsilon":
            tensor.mul_(1e-8)
    layer.half()
    torch.testing.assert_close(layer(x.half()), F.linear(x.half(), layer.unpack()))


@pytest.mark.parametrize("format", ["bitmask", "two_four_compact_int8", "two_four_csr", "bitmask_int4"])
def test_the_operator_sees_changes_in_place(fastest, format):
    x = torch.randn(2, 256)
    tensors = FORMATS[format].nearest(weight(0))
    for seed in (0, 7, 3):
        for name, tensor in FORMATS[format].nearest(weight(seed)).items():
            tensors[name].copy_(tensor)
        product = ops.linear(x, None, list(tensors.values()), format, *SHAPE)
        expected = F.linear(x, FORMATS[format].unpack(tensors, SHAPE))
        torch.testing.assert_close(product, expected, rtol=1e-3, atol=1e-3)
    tensors["bitmask" if "bitmask" in format else "rec_columns"].fill_(1)
    with pytest.raises(RunError):
        ops.linear(x, None, list(tensors.values()), format, *SHAPE)


def test_an_optimizer_changes_the_values(fastest):
    layer, x = packed_layer("bitmask"), torch.randn(2, 256)
    with torch.no_grad():
        before = layer(x)
    layer.values.grad = torch.ones_like(layer.values)
    torch.optim.SGD([layer.values], lr=0.1).step()
    with torch.no_grad():
        assert not torch.allclose(layer(x), before)
        assert_product(layer, x)


def test_inference_tensors_have_no_version_and_are_prepared_anew(fastest):
    x = torch.randn(1, 256)
    with torch.inference_mode():
        layer, other = packed_layer("bitmask"), packed_layer("bitmask", seed=7)
        layer(x)
        layer.load_state_dict(other.state_dict())
        assert_product(layer, x)
        layer.to_native_format(Arena(1 << 20))  # copies that have one
        assert_product(layer, x)
    assert not layer.get_parameter("values").is_inference()


@torch.no_grad()
def test_a_matrix_of_the_gpu_is_made_again_after_a_change(monkeypatch):
    layer, made = packed_layer("two_four_compact", dtype=torch.bfloat16), []
    monkeypatch.setattr(gpu, "gpu_matrix", lambda *given: made.append(given) or object())
    first = layer._on_gpu()
    assert layer._on_gpu() is first
    layer.rec_values.mul_(2)
    second = layer._on_gpu()
    assert second is not first
    layer.load_state_dict(packed_layer("two_four_compact", 7, torch.bfloat16).state_dict())
    assert layer._on_gpu() is not second
    assert torch.equal(made[-1][0], layer.unpack())
    for _ in range(5):  # memory that was freed is likely to be allocated again
        before, values = layer._on_gpu(), layer.values.detach().clone()
        with warnings.catch_warnings():
            layer.values = nn.Parameter(values, requires_grad=False)
        assert layer._on_gpu() is not before
    assert copy.deepcopy(layer)._on_gpu() is not layer._on_gpu()
