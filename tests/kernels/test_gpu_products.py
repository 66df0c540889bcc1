"""The Triton kernels equal the product of the dense matrix, in Triton's interpreter: `make gpu-check`."""

import os

import pytest
import torch
from matrices import SHAPES, pruned, relative

pytest.importorskip("triton", reason="triton is not installed; `make gpu-check` brings it")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("these run in Triton's interpreter: set TRITON_INTERPRET=1", allow_module_level=True)

from budwood.kernels import gpu, gpu_products
from budwood.kernels.gpu_layouts import pack_two_four

# The same numbers summed in float32 in another order; nothing else may differ.
EXACT = 1e-5
TYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
KERNELS = {
    "rows": gpu_products.two_four_linear,
    "dot": lambda *args, **options: gpu_products.two_four_some(*args, **options, wide=True),
}


def product(name, weight, base, x, bias=None, dtype=torch.float32):
    """The kernel's result and the one in double precision."""
    result = KERNELS[name](pack_two_four(weight, base), x, bias, dtype=dtype)
    expected = x.double() @ weight.double().T
    return result, expected if bias is None else expected + bias.double()


@TYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_any_shape(name, shape, dtype):
    weight, base = pruned(*shape, dtype)
    x, bias = torch.randn(3, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
    assert relative(*product(name, weight, base, x, bias)) < EXACT
    assert relative(*product(name, weight, base, x[:1])) < EXACT


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("name", KERNELS)
def test_any_number_of_rows(name, rows):
    weight, base = pruned(36, 100, 0.05, torch.bfloat16)
    x = torch.randn(rows, 100).bfloat16()
    assert relative(*product(name, weight, base, x)) < EXACT


@pytest.mark.parametrize("rows", [5, 16, 33, 64])
def test_the_dot_kernel_takes_up_to_64_rows(rows):
    weight, base = pruned(36, 260, 0.05, torch.float16)
    x = torch.randn(rows, 260).half()
    assert relative(*product("dot", weight, base, x)) < EXACT
    narrow = gpu_products.two_four_some(pack_two_four(weight, base), x, dtype=torch.float32)
    assert relative(narrow, x.double() @ weight.double().T) < EXACT  # fp16 products are exact in float32


@pytest.mark.parametrize("name", KERNELS)
def test_a_matrix_of_zeros_and_a_row_of_everything(name):
    weight, base = pruned(32, 64, 0.0, torch.bfloat16)
    x = torch.randn(2, 64).bfloat16()
    result, _ = product(name, torch.zeros_like(weight), base, x)
    assert not result.any()
    weight[31] = torch.randn(64).bfloat16()
    assert relative(*product(name, weight, base, x)) < EXACT


@pytest.mark.parametrize("name", KERNELS)
def test_rows_that_are_not_contiguous(name):
    weight, base = pruned(32, 64, 0.1, torch.bfloat16)
    x = torch.randn(64, 3).bfloat16().T
    assert relative(*product(name, weight, base, x)) < EXACT


@TYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpacking_is_bit_exact(shape, dtype):
    weight, base = pruned(*shape, dtype)
    for layout in (pack_two_four(weight, base), pack_two_four(weight)):
        assert torch.equal(gpu_products.two_four_unpacked(layout).view(torch.int16), weight.view(torch.int16))


def test_an_unaligned_x_is_copied():
    weight, base = pruned(32, 64, 0.1, torch.bfloat16)
    x = torch.randn(2 * 64 + 1).bfloat16()[1:].view(2, 64)
    for name in KERNELS:
        assert relative(*product(name, weight, base, x)) < EXACT


@pytest.mark.parametrize("name", KERNELS)
def test_the_result_has_the_dtype_of_x(name):
    weight, base = pruned(32, 64, 0.1, torch.float16)
    result, expected = product(name, weight, base, torch.randn(2, 64).half(), dtype=None)
    assert result.dtype == torch.float16
    assert relative(result, expected) < 1e-3  # rounded to fp16


@pytest.mark.parametrize("name", KERNELS)
def test_x_that_does_not_fit_is_refused(name):
    weight, base = pruned(32, 64, 0.1, torch.float16)
    for x in (torch.randn(2, 60).half(), torch.randn(65, 64).half(), torch.randn(2, 64).bfloat16()):
        with pytest.raises(ValueError, match="this kernel takes"):
            product(name, weight, base, x)


@pytest.mark.parametrize(
    ("rows", "free", "names"),
    [
        (1, True, {"unpack", "triton"}),
        (1, False, {"unpack", "triton"}),
        (4, False, {"unpack", "triton", "triton dot"}),
        (8, False, {"unpack", "triton dot"}),
        (64, False, {"unpack", "triton dot", "semi-structured"}),
        (64, True, {"unpack", "triton dot", "semi-structured"}),
    ],
)
def test_the_candidates_are_all_kernels_that_fit(rows, free, names, monkeypatch):
    monkeypatch.setattr(gpu, "results", {})
    monkeypatch.setattr(gpu, "usable", lambda tensor: True)
    weight, base = pruned(64, 128, 0.05, torch.float16)
    layer = gpu.gpu_matrix(weight, None if free else base)
    assert set(layer.candidates(rows)) == names
    x = torch.randn(rows, 128).half()
    for name, kernel in layer.candidates(rows).items():
        if name != "semi-structured":  # torch has it on GPUs only
            assert relative(kernel(x, None), x.double() @ weight.double().T) < 1e-3  # rounded to fp16
    assert relative(layer.linear(x), x.double() @ weight.double().T) < 1e-3
    for result in gpu.results.values():
        assert set(result.dropped) <= {"semi-structured"}
