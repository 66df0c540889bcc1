"""Every native path computes what the reference computes, for all shapes, dtypes, kernels and numbers of threads."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from budwood.errors import UsageError
from budwood.formats import FORMATS, LOSSLESS, pack_as
from budwood.kernels import dispatch, native, ops
from budwood.kernels.head import DenseLinear, accelerate_head
from budwood.kernels.linear import SparseLinear
from budwood.kernels.native import FEW_ROWS, PANELS, SPARSE
from budwood.kernels.native_matrix import MatrixGroup, NativeMatrix, native_matrix

SHAPES = [(8, 32), (7, 64), (130, 36), (33, 100), (1, 4), (257, 130), (64, 1000), (5, 7), (300, 576)]
ROWS = [1, 2, 3, 5, 8, 9, 16, 17, 33, 65]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights(out: int, width: int, extra: float, dtype: torch.dtype) -> Tensor:
    """2:4 with a share of recovered weights, a row without any and a row with all."""
    weight = torch.randn(out, width).to(dtype)
    keep = torch.rand(out, width) < 0.5
    if width % 4 == 0:
        groups = weight.float().abs().view(-1, 4)
        keep = torch.zeros(groups.shape, dtype=torch.bool).scatter_(1, groups.topk(2).indices, True).view(out, width)
        keep |= torch.rand(out, width) < 2 * extra
    if out > 2 and extra:
        keep[1], keep[2] = False, True
    return torch.where(keep, weight, 0)


def packed(weight: Tensor, format: str = "bitmask") -> NativeMatrix:
    matrix = native_matrix(format, (weight.shape[0], weight.shape[1]), pack_as(format, weight))
    assert matrix is not None
    return matrix


def kernels(dtype: torch.dtype) -> list[int]:
    """The kernels of the path for activations of this dtype."""
    panels = [PANELS] if dtype == torch.bfloat16 else []
    return [kernel for kernel in [FEW_ROWS, SPARSE, *panels] if native.has(kernel)]


def error(product: Tensor, x: Tensor, weight: Tensor) -> float:
    """Largest difference to the product in float64, relative to the sum of the magnitudes that were added."""
    exact = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    return float(((product.double() - exact).abs() / size.clamp(min=1e-30)).max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_equal_the_reference(path, shape, dtype):
    torch.manual_seed(0)
    for extra in (0.0, 0.015, 0.3):
        weight = weights(*shape, extra, dtype)
        formats = ["bitmask"] + (["two_four"] if extra == 0 and shape[1] % 4 == 0 else [])
        for matrix in (packed(weight, format) for format in formats):
            for rows in ROWS:
                x = torch.randn(rows, shape[1], dtype=dtype)
                for kernel in kernels(dtype):
                    product = matrix.linear(x, None, kernel)
                    assert product is not None
                    # float32 sums, rounded once to the dtype of the activations
                    rounded = torch.finfo(dtype).eps if dtype != torch.float32 else 0
                    assert error(product, x, weight) < 1e-5 + rounded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("format", ["bitmask", "bitmask_int8", "two_four_compact_int8"])
@pytest.mark.parametrize("shape", [(70, 5000), (700, 1100)], ids=str)
def test_matrices_larger_than_the_caches_are_multiplied_in_parts(path, shape, format, dtype):
    """Wide ones in blocks of columns, tall ones in chunks of rows and several panels."""
    torch.manual_seed(5)
    tensors = FORMATS[format].nearest(weights(*shape, 0.015, dtype))
    weight, matrix = FORMATS[format].unpack(tensors, shape), native_matrix(format, shape, tensors)
    assert matrix is not None
    for rows in (1, 6, 8, 21, 70):
        x = torch.randn(rows, shape[1]).to(dtype)
        for kernel in kernels(dtype):
            product = matrix.linear(x, None, kernel)
            if product is None:
                assert kernel == PANELS  # which need 16-bit or int8 values
                continue
            rounded = torch.finfo(dtype).eps if dtype != torch.float32 else 0
            assert error(product, x, weight) < (5e-5 if "int8" in format else 1e-5) + rounded


@pytest.mark.parametrize("kernel", [FEW_ROWS, SPARSE, PANELS])
@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_threads_change_no_bit(path, threads, kernel):
    if not native.has(kernel):
        pytest.skip("the path has no such kernel")
    torch.manual_seed(1)
    weight = weights(11, 96, 0.1, torch.bfloat16)
    matrix, x = packed(weight), torch.randn(20, 96, dtype=torch.bfloat16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = matrix.linear(x, None, kernel)
        torch.set_num_threads(threads)
        assert torch.equal(matrix.linear(x, None, kernel), alone)
    finally:
        torch.set_num_threads(before)


def test_panels_are_for_bfloat16(path):
    matrix = packed(weights(40, 64, 0.05, torch.float32))
    assert matrix.linear(torch.randn(9, 64), None, PANELS) is None
    if native.has(PANELS):
        halves = packed(weights(40, 64, 0.05, torch.float16))
        assert halves.linear(torch.randn(9, 64).half(), None, PANELS) is None
        assert halves.linear(torch.randn(9, 64).bfloat16(), None, PANELS) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bias_and_leading_dimensions(path, dtype):
    torch.manual_seed(2)
    weight, bias = weights(40, 64, 0.05, dtype), torch.randn(40, dtype=dtype)
    layer = SparseLinear.from_dense(weight, bias, "bitmask")
    for shape in ((64,), (3, 64), (2, 3, 64), (2, 40, 64), (0, 64)):
        x = torch.randn(shape, dtype=dtype)
        with torch.no_grad():
            product = layer(x)
        assert product.shape == (*shape[:-1], 40)
        torch.testing.assert_close(
            product.float(), F.linear(x.float(), weight.float(), bias.float()), rtol=2e-2, atol=2e-2
        )


def test_several_matrices_in_one_call_equal_each_alone(path):
    torch.manual_seed(3)
    matrices = [packed(weights(out, 64, 0.02, torch.bfloat16)) for out in (48, 16, 5)]
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    biases = [torch.randn(48, dtype=torch.bfloat16), None, None]
    together = MatrixGroup(matrices).linear(x, biases)
    assert together is not None
    for matrix, bias, product in zip(matrices, biases, together, strict=True):
        assert torch.equal(product, matrix.linear(x, bias))


def test_nan_inputs_give_nan(path):
    layer = SparseLinear.from_dense(weights(8, 64, 0.0, torch.float32), format="two_four")
    with torch.no_grad():
        assert layer(torch.full((1, 64), float("nan"))).isnan().all()


@pytest.mark.parametrize("format", sorted(set(LOSSLESS) - {"dense"}))
def test_every_format_is_converted_to_one_the_library_reads(fastest, format):
    weight = weights(32, 256, 0.0 if format == "two_four" else 0.03, torch.bfloat16)
    layer = SparseLinear.from_dense(weight, format=format)
    layer.to_native_format()
    assert layer.native_matrix() is not None
    assert torch.equal(layer.unpack(), weight)
    x = torch.randn(2, 256, dtype=torch.bfloat16)
    with torch.no_grad():
        assert error(layer(x), x, weight) < 1e-2


def test_gradients_are_those_of_the_reference(fastest, monkeypatch):
    weight = weights(32, 64, 0.05, torch.float32)
    layer = SparseLinear.from_dense(weight, torch.randn(32), "bitmask")
    x = torch.randn(5, 64, requires_grad=True)
    layer(x).square().sum().backward()
    found, layer.bias.grad = (x.grad, layer.bias.grad), None
    x.grad = None
    monkeypatch.setenv(native.VARIABLE, "reference")
    layer = copy.deepcopy(layer)  # makes its own native matrix
    layer(x).square().sum().backward()
    torch.testing.assert_close(found, (x.grad, layer.bias.grad), rtol=1e-4, atol=1e-3)


def test_a_copy_and_a_cast_make_their_own_native_matrix(fastest):
    layer = SparseLinear.from_dense(weights(32, 64, 0.05, torch.bfloat16), format="bitmask")
    x = torch.randn(1, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = layer(x)
        assert torch.equal(copy.deepcopy(layer)(x), expected)
        torch.testing.assert_close(layer.float()(x.float()), expected.float(), rtol=2e-2, atol=2e-2)


def test_changed_in_place_weights_are_seen(fastest):
    layer = SparseLinear.from_dense(weights(32, 64, 0.05, torch.float32), format="bitmask")
    x = torch.randn(1, 64)
    with torch.no_grad():
        before = layer(x)
        layer.values.mul_(2)
        torch.testing.assert_close(layer(x), 2 * before)


def test_the_kernels_are_measured_once(fastest, monkeypatch):
    monkeypatch.setattr(dispatch, "measured", {})
    matrix = packed(weights(64, 64, 0.02, torch.float32))
    calls = []
    dispatch.measure(matrix, lambda x: calls.append(len(x)), torch.float32)
    (found,) = dispatch.measured.values()
    assert set(found) == set(dispatch.ROWS)
    seen = len(calls)
    dispatch.measure(matrix, lambda x: calls.append(len(x)), torch.float32)
    assert len(calls) == seen
    for rows, choice in found.items():
        assert choice.seconds[dispatch.NAMES[choice.kernel]] == min(choice.seconds.values())
        assert dispatch.kernel_for(matrix, rows, torch.float32) == choice.kernel


def test_an_unknown_path_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setenv(native.VARIABLE, "quick")
    with pytest.raises(UsageError, match="BUDWOOD_KERNELS is 'quick'; set it to one of auto"):
        native.library()


def test_without_the_library_the_reference_runs_and_why_gives_the_reason(monkeypatch):
    monkeypatch.setattr(native, "file", lambda: None)
    native.opened.cache_clear()
    monkeypatch.setenv(native.VARIABLE, "auto")
    try:
        assert native.active() == "reference"
        assert "no C++ compiler" in native.why()
        monkeypatch.setenv(native.VARIABLE, "scalar")
        with pytest.raises(UsageError, match="not built"):
            native.library()
    finally:
        native.opened.cache_clear()


def test_compile_sees_one_node(fastest):
    layer = SparseLinear.from_dense(weights(32, 64, 0.05, torch.float32), torch.randn(32), "bitmask")
    x = torch.randn(3, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("format", ["bitmask", "two_four_csr"])
def test_opcheck(fastest, format):
    layer = SparseLinear.from_dense(weights(32, 64, 0.05, torch.float32), torch.randn(32), format)
    arguments = (torch.randn(3, 64, requires_grad=True), layer.bias, list(layer.packed().values()), format, 32, 64)
    torch.library.opcheck(torch.ops.budwood.linear.default, arguments)


def test_an_operator_caches_a_native_matrix_as_long_as_its_memory_exists(fastest, monkeypatch):
    made = []
    monkeypatch.setattr(ops, "native_matrix", lambda *given: made.append(given[1]) or native_matrix(*given))
    monkeypatch.setattr(ops, "_cache", {})
    x = torch.randn(2, 640)
    for seed in range(4):  # freed memory is likely to be allocated again
        torch.manual_seed(seed)
        weight = weights(96, 640, 0.05, torch.float32)
        tensors = list(pack_as("bitmask", weight).values())
        for _ in range(3):
            assert error(ops.linear(x, None, tensors, "bitmask", 96, 640), x, weight) < 1e-5
        assert len(made) == seed + 1
        snapshot, kept = next(reversed(ops._cache.values()))
        assert kept is not None
        assert snapshot.alive()
        del tensors
        made[-1] = None
        assert not snapshot.alive()
    assert len(ops._cache) == 1  # the others expired with their memory


@pytest.mark.parametrize("bias", [True, False])
def test_a_compiled_head_multiplies_as_an_eager_one_does(fastest, bias):
    if not native.has_dense():
        pytest.skip("the path has no kernel for dense matrices")
    model = nn.Module()
    model.head = nn.Linear(96, 300, bias=bias).bfloat16()
    model.get_output_embeddings = lambda: model.head
    accelerate_head(model)
    assert type(model.head) is DenseLinear
    compiled = torch.compile(model.head, backend="eager", fullgraph=True)
    with torch.no_grad():
        for rows in (1, 3, 20):  # 20 are too many for the kernel
            x = torch.randn(rows, 96).bfloat16()
            assert torch.equal(compiled(x), model.head(x))
        torch.library.opcheck(torch.ops.budwood.dense.default, (x[:2], model.head.weight, model.head.bias))


def test_the_process_has_one_openmp_runtime(fastest):
    """A second one would have a thread pool of its own."""
    code = (
        "import torch; from budwood.kernels import native; native.library(); "
        "names = {line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line or 'libomp' in line}; "
        "print(len(names))"
    )
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("needs /proc")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


@pytest.mark.parametrize("format", ["bitmask_int8", "two_four_int8", "two_four_compact_int8"])
@pytest.mark.parametrize("shape", [(9, 64), (40, 300), (33, 576)], ids=str)
def test_int8_values_and_recovered_weights(path, format, shape):
    torch.manual_seed(4)
    weight = weights(*shape, 0.0 if format == "two_four_int8" else 0.03, torch.float32)
    if format == "two_four_compact_int8":
        weight[2] = 0  # a group has at most two recovered weights, and this row has none
    tensors = FORMATS[format].nearest(weight)
    rounded = FORMATS[format].unpack(tensors, shape)  # float32: what the kernel computes with
    matrix = native_matrix(format, shape, tensors)
    assert matrix is not None
    for rows in (1, 2, 7, 20, 70):
        for dtype in (torch.float32, torch.bfloat16):
            for kernel in kernels(dtype):
                x = torch.randn(rows, shape[1]).to(dtype)
                product = matrix.linear(x, None, kernel)
                assert product is not None
                # few rows may be rounded to 16-bit integers, 256 of them with one scale
                assert error(product, x, rounded) < 5e-5 + (torch.finfo(dtype).eps if dtype != torch.float32 else 0)


def test_inside_exact_products_equal_those_of_torch(fastest):
    weight = weights(300, 576, 0.02, torch.float32)
    layer = SparseLinear.from_dense(weight, format="bitmask")
    x = torch.randn(33, 576)
    with torch.no_grad(), dispatch.exact():
        assert torch.equal(layer(x), F.linear(x, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", ["bitmask_int8", "two_four_int8", "two_four_compact_int8"])
def test_one_large_activation_does_not_spoil_the_others(path, format, dtype):
    torch.manual_seed(6)
    shape = (40, 600)
    tensors = FORMATS[format].nearest(weights(*shape, 0.0 if format == "two_four_int8" else 0.03, torch.float32))
    rounded, matrix = FORMATS[format].unpack(tensors, shape), native_matrix(format, shape, tensors)
    assert matrix is not None
    for rows in (1, 2, 4, 7, 11):
        for large in (1, 5, 30, 1e3, 3e4, 1e6, 1e9):
            if large > 1e4 and dtype == torch.float16:
                continue
            x = torch.randn(rows, 600)
            x[rows // 2, 70] = large
            x[0, 598] = -large
            x, bias = x.to(dtype), torch.randn(40).to(dtype)
            product = matrix.linear(x, bias, FEW_ROWS)
            assert product is not None
            others = torch.where(x.abs() < 10, x, 0)  # the large ones do not hide what is lost of the others
            exact = x.double() @ rounded.double().T
            size = others.double().abs() @ rounded.double().abs().T
            sums = x.double().abs() @ rounded.double().abs().T + bias.double().abs()
            rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6
            if large >= 1e6:
                # Summed in float32, weight after weight: each of n additions is off by at most 2**-24 of `sums`, and
                # n independent errors add up to sqrt(n) of one. Four times that is more than six standard deviations.
                rounding = rounding + 4 * 2**-24 * (rounded != 0).sum(1).clamp(min=1).double().sqrt()
            assert ((product.double() - exact - bias.double()).abs() <= 5e-5 * size + rounding * sums).all()


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e-33, 3e38])
def test_activations_that_integers_cannot_hold(path, value):
    torch.manual_seed(7)
    tensors = FORMATS["bitmask_int8"].nearest(weights(16, 512, 0.03, torch.float32))
    weight, matrix = (
        FORMATS["bitmask_int8"].unpack(tensors, (16, 512)),
        native_matrix("bitmask_int8", (16, 512), tensors),
    )
    assert matrix is not None
    x = torch.randn(2, 512)
    x[1, :256] = value
    product = matrix.linear(x, None, FEW_ROWS)
    assert product is not None
    assert error(product[:1], x[:1], weight) < 5e-5
    if value == 1e-33:
        assert error(product[1:], x[1:], weight) < 5e-5
        return
    found, there = product[1], (weight[:, :256] != 0).any(1)
    assert int(there.sum()) == 15  # row 1 of the matrix has no weights: 0, or NaN where a kernel multiplies its zeros
    assert bool((found[~there].isnan() | (found[~there] == 0)).all())
    if value == 3e38:  # whether a sum overflows depends on the order of the additions; a finite one is right
        finite = found.isfinite()
        assert error(product[1:, finite], x[1:], weight[finite]) < 5e-5
        assert not bool(finite[there].all())
    else:
        assert not found[there].isfinite().any()
