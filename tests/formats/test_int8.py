"""Formats with rounded values: which weights are rounded, which format is chosen, and that casts change nothing."""

import pytest
import torch
from test_formats import scattered, size, skeleton

from budwood.errors import UsageError
from budwood.formats import FORMATS, Refusal, count, known_layout, predict, rounds, store
from budwood.formats.two_four import covered
from budwood.kernels.linear import SparseLinear
from budwood.sparsity.forecast import Forecast
from budwood.sparsity.integers import dequantise

ROUNDED = [name for name in FORMATS if rounds(name)]


def test_the_tensors_of_each():
    weight = skeleton(16, 600, dtype=torch.bfloat16)
    tensors = FORMATS["two_four_int8"].nearest(weight)
    assert {suffix: (tensor.dtype, tuple(tensor.shape)) for suffix, tensor in tensors.items()} == {
        "values": (torch.int8, (16, 300)),
        "places": (torch.uint8, (16, 75)),
        "scales": (torch.int32, (16, 3)),
        "epsilon": (torch.bfloat16, (1,)),
    }
    assert tensors["epsilon"].item() == 2.0**-7
    tensors = FORMATS["bitmask_int8"].nearest(weight)
    assert tensors["values"].dtype == torch.int8
    assert tensors["values"].shape == (16 * 300,)
    tensors = FORMATS["two_four_compact_int8"].nearest(skeleton(16, 600, 0.05, torch.float16))
    assert tensors["values"].dtype == torch.int8
    assert tensors["rec_values"].dtype == torch.float16
    assert tensors["epsilon"].item() == 2.0**-10


def test_a_weight_is_int8_times_scale_rounded_once():
    weight = scattered(8, 300, 0.5, torch.bfloat16)
    tensors = FORMATS["bitmask_int8"].nearest(weight)
    integers = FORMATS["bitmask"].unpack(tensors, (8, 300))
    expected = dequantise(integers, tensors["scales"].view(torch.float32), torch.float64).to(torch.bfloat16)
    assert torch.equal(FORMATS["bitmask_int8"].unpack(tensors, (8, 300)), expected)


def test_recovered_weights_are_not_rounded():
    weight = skeleton(16, 512, 0.05, torch.bfloat16)
    tensors = FORMATS["two_four_compact_int8"].nearest(weight)
    back = FORMATS["two_four_compact_int8"].unpack(tensors, (16, 512))
    base = covered(tensors["places"], 512)
    assert torch.equal(back[~base], weight[~base])
    assert int((back != weight).sum()) > 0.3 * weight.numel()
    assert torch.equal(
        FORMATS["two_four_compact_int8"].unpack(FORMATS["two_four_compact_int8"].pack(back, base), (16, 512)), back
    )


@pytest.mark.parametrize("name", ROUNDED)
def test_matrices_that_are_not_rounded_are_refused(name):
    weight = skeleton(4, 64)
    with pytest.raises(Refusal, match=f"{name} cannot hold this 4 x 64 matrix: .* round them first"):
        FORMATS[name].pack(weight)
    with pytest.raises(UsageError, match="round them first"):
        SparseLinear.from_dense(weight, format=name)
    with pytest.raises(UsageError, match=r"torch\.float64"):
        store(weight.double(), name)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -0.0])
@pytest.mark.parametrize("name", ROUNDED)
def test_values_that_no_integer_represents_are_refused(name, odd):
    weight = torch.tensor([[odd, 1.0, 0.0, 0.0]])
    with pytest.raises(Refusal, match="1 x 4"):
        FORMATS[name].pack(weight)


@pytest.mark.parametrize("name", ROUNDED)
def test_casts_change_nothing(name):
    """Scales in the dtype of the module would be rounded; a weight keeps the rounding of its checkpoint."""
    weight = skeleton(16, 512, dtype=torch.bfloat16)
    tensors = FORMATS[name].nearest(weight)
    layer = SparseLinear.from_packed(name, (16, 512), tensors)
    before = layer.unpack()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        layer = layer.to(dtype)
        assert layer.weight.dtype == dtype
        assert torch.equal(layer.unpack(), before.to(dtype))
    assert torch.equal(layer.half().float().scales, tensors["scales"])


def test_the_layout_of_a_format_and_of_values():
    assert known_layout("auto") == "auto"
    assert known_layout("auto", "int8") == known_layout("auto_int8") == "auto_int8"
    assert known_layout("bitmask", "int8") == known_layout("bitmask_int8", "int8") == "bitmask_int8"
    with pytest.raises(UsageError, match="two_four_csr holds no int8 values; choose --format auto, or one of two_four"):
        known_layout("two_four_csr", "int8")
    with pytest.raises(UsageError, match="dense holds no int8 values"):
        known_layout("dense", "int8")
    assert known_layout("auto", "int4") == known_layout("auto_int4", "int4") == "auto_int4"
    assert known_layout("dense", "int4") == known_layout("dense_int4") == "dense_int4"
    with pytest.raises(UsageError, match="no values 'int3'; choose int8 or int4"):
        known_layout("auto", "int3")
    with pytest.raises(UsageError, match="bitmask_int8 has int8 values"):
        known_layout("bitmask_int8", "int4")
    with pytest.raises(UsageError, match="did you mean bitmask"):
        known_layout("bitmaks", "int8")


def test_two_four_keeps_its_recovered_weights_and_unstructured_is_a_bitmask():
    assert store(skeleton(16, 256), "auto_int8")[0] == "two_four_int8"
    assert store(skeleton(16, 256, 0.03), "auto_int8")[0] == "two_four_compact_int8"
    for density in (0.2, 0.5, 0.75, 0.9, 1.0):
        assert store(scattered(16, 256, density), "auto_int8")[0] == "bitmask_int8"
    assert store(scattered(16, 255, 0.5), "auto_int8")[0] == "bitmask_int8"


@pytest.mark.parametrize("layout", ["auto_int8", "auto_int4", *ROUNDED])
def test_the_bytes_are_predicted(layout):
    weight = skeleton(32, 520, 0.0 if layout in ("two_four_int8", "two_four_int4") else 0.02, torch.bfloat16)
    name, tensors = store(weight, layout)
    assert predict((32, 520), count(weight), 2, layout) == (name, size(tensors))


def test_bits_of_wrp():
    wrp = Forecast(nonzeros=8388608 + 258048, recovered=258048)
    name, nbytes = predict((4096, 4096), wrp, 2, "auto_int8")
    assert name == "two_four_compact_int8"
    bits = 4 + 1 + 8 / 256 + 32 / 256 + 24 * 258048 / 4096**2
    assert 8 * nbytes / 4096**2 == pytest.approx(bits, abs=1e-5)
