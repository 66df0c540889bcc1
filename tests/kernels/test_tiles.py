"""Weights in tiles: the exact inverse, products equal to the reference, and layers that behave as before."""

import copy
import io

import pytest
import torch
from native_paths import use
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from budwood.formats import FORMATS
from budwood.formats.bits import pack_bits
from budwood.kernels import native, tiles
from budwood.kernels.arena import Arena
from budwood.kernels.linear import SparseLinear
from budwood.kernels.native import FEW_ROWS, SPARSE
from budwood.kernels.native_matrix import MatrixGroup
from budwood.kernels.norm import NativeNorm
from budwood.kernels.optimize import optimize
from budwood.kernels.tiles import Tiles
from budwood.sparsity.codes import dequantise4, quantise4

# Widths and numbers of rows around the sizes of tiles, strips, segments and blocks of columns.
SHAPES = [(1, 1), (3, 5), (9, 33), (17, 100), (40, 260), (25, 1028), (264, 520), (7, 4100)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
INT8 = ["bitmask_int8", "two_four_int8", "two_four_compact_int8"]


@pytest.fixture(autouse=True)
def on_avx2(monkeypatch):
    use("avx2", monkeypatch)
    monkeypatch.setattr(tiles, "LIMIT", float("inf"))  # in tiles, small as they are


def masks(out: int, width: int) -> dict[str, Tensor]:
    """Masks by name, bool [out, in]."""
    random = torch.rand(out, width)
    rows = torch.arange(out)[:, None]
    found = {
        "half": random < 0.5,
        "some rows full": (random < 0.5) | (rows % 7 == 3),
        "some rows empty": (random < 0.5) & (rows % 5 != 2),
        "sparse": random < 0.2,
        "full": random < 2,
        "empty": random > 2,
        "one column": torch.arange(width).expand(out, width) == 0,
        "left half": torch.arange(width).expand(out, width) < width / 2,
        "first of four": torch.arange(width).expand(out, width) % 4 == 0,
    }
    if width % 4 == 0:
        two = random.view(out, -1, 4).argsort(-1).argsort(-1).view(out, width) < 2
        found["2:4"] = two
        found["2:4 and recovered"] = two | (torch.rand(out, width) < 0.03)
        found["below 2:4"] = two & (torch.rand(out, width) < 0.9)
    return found


def weight_of(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights of a model, with some far larger, far smaller and negative zero."""
    weight = torch.randn(mask.shape) * 0.05
    weight.view(-1)[::97] *= 100
    weight.view(-1)[5::211] = 1e-30
    weight.view(-1)[3::301] = -0.0
    return torch.where(mask, weight, 0).to(dtype)


def packed(format: str, shape: tuple[int, int], tensors: dict[str, Tensor]) -> Tiles:
    found = tiles.pack(format, shape, tensors)
    assert found is not None
    return found


def assert_exact(found: Tiles, tensors: dict[str, Tensor]) -> None:
    back = found.unpack()
    assert set(back) == set(tensors)
    for suffix, tensor in tensors.items():
        assert back[suffix].shape == tensor.shape
        assert torch.equal(back[suffix].view(torch.uint8), tensor.contiguous().view(torch.uint8)), suffix


def assert_products(found: Tiles, dense: Tensor, x: Tensor, kernel: int, bias: Tensor | None = None) -> None:
    """Within 1e-5 of the float64 product, relative to the magnitudes that are added, and one rounding."""
    y = found.matrix.linear(x, bias, kernel)
    assert y is not None
    exact = F.linear(x.double(), dense.double(), None if bias is None else bias.double())
    size = F.linear(x.double().abs(), dense.double().abs(), None if bias is None else bias.double().abs())
    rounded = torch.finfo(x.dtype).eps * (size + 1e-3) if x.dtype != torch.float32 else 0
    assert ((y.double() - exact).abs() <= 1e-5 * size + rounded).all()


def assert_same_with_threads(threads: int, found: Tiles, x: Tensor, kernel: int) -> None:
    """As many threads give the bits that one gives."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = found.matrix.linear(x, None, kernel)
        assert alone is not None
        torch.set_num_threads(threads)
        assert torch.equal(found.matrix.linear(x, None, kernel), alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["2:4", "half"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_inverse_is_exact_for_all_65536_values(dtype, kind):
    torch.manual_seed(0)
    shape = (256, 512)
    mask = masks(*shape)["2:4"] if kind == "2:4" else (torch.randperm(1 << 17) < 1 << 16).view(shape)
    values = torch.randperm(1 << 16).to(torch.uint16).view(dtype)
    tensors = {"values": values, "bitmask": pack_bits(mask)}
    assert_exact(packed("bitmask", shape, tensors), tensors)
    if kind == "2:4":
        tensors = FORMATS["two_four"].pack(torch.where(mask, torch.ones(shape, dtype=dtype), 0))
        tensors["values"] = values.view(tensors["values"].shape)
        assert_exact(packed("two_four", shape, tensors), tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_mask_is_restored_and_multiplied(shape, dtype):
    torch.manual_seed(1)
    for turn, (name, mask) in enumerate(masks(*shape).items()):
        weight = weight_of(mask, dtype)
        formats = ["bitmask", *(["two_four"] if name in ("2:4", "below 2:4", "empty") and shape[1] % 4 == 0 else [])]
        for format in formats:
            tensors = FORMATS[format].pack(weight)
            found = packed(format, shape, tensors)
            assert_exact(found, tensors)
            for rows in (1, 2 + turn % 3, 5 + turn % 4, 11):
                x = torch.randn(rows, shape[1])
                assert_products(found, weight, x, FEW_ROWS, torch.randn(shape[0]))
                assert_products(found, weight, x.to(dtype), FEW_ROWS)
            assert_products(found, weight, torch.randn(70, shape[1]), SPARSE)


@pytest.mark.parametrize("format", INT8)
@pytest.mark.parametrize("shape", [(9, 64), (40, 300), (33, 576), (264, 1028)], ids=str)
def test_int8_values_and_recovered_weights(format, shape):
    torch.manual_seed(2)
    mask = masks(*shape)["2:4" if format == "two_four_int8" else "2:4 and recovered"]
    tensors = FORMATS[format].nearest(torch.where(mask, torch.randn(shape) * 0.05, 0))
    found, dense = packed(format, shape, tensors), FORMATS[format].unpack(tensors, shape)
    assert_exact(found, tensors)
    for rows, kernel in ((1, FEW_ROWS), (2, FEW_ROWS), (4, FEW_ROWS), (7, FEW_ROWS), (20, FEW_ROWS), (600, SPARSE)):
        assert_products(found, dense, torch.randn(rows, shape[1]), kernel)


INT4 = ["bitmask_int4", "two_four_int4", "two_four_compact_int4", "dense_int4"]


def int4_tensors(format: str, shape: tuple[int, int], group: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random weights on levels of groups of this many columns."""
    mask = masks(*shape)[{"two_four_int4": "2:4", "two_four_compact_int4": "2:4 and recovered"}.get(format, "half")]
    if format == "dense_int4":
        mask |= True
    weight = torch.where(mask, torch.randn(shape) * 0.05, 0).to(dtype)
    levels = dequantise4(*quantise4(weight, mask, group), dtype, group)
    return FORMATS[format].nearest(weight if format == "two_four_compact_int4" else levels)


@pytest.fixture(params=["avx2", "avx512", "avx2 then avx512"])
def paths(request, monkeypatch):
    """Sets the path to pack on; returns what sets the one to multiply on.

    AVX-512 has another layout of 4-bit values, and reads that of AVX2.
    """
    first, _, last = request.param.partition(" then ")
    use(last or first, monkeypatch)
    use(first, monkeypatch)
    return lambda: use(last or first, monkeypatch)


@pytest.mark.parametrize("format", INT4)
@pytest.mark.parametrize("shape", [(1, 4), (9, 64), (40, 300), (33, 576), (264, 1028)], ids=str)
def test_int4_values_and_recovered_weights(format, shape, paths):
    torch.manual_seed(7)
    for group, dtype in ((128, torch.bfloat16), (64, torch.float32), (128, torch.float16)):
        tensors = int4_tensors(format, shape, group, dtype)
        found, dense = packed(format, shape, tensors), FORMATS[format].unpack(tensors, shape)
        assert_exact(found, tensors)
        paths()
        assert_exact(found, tensors)
        for rows in range(1, 10):
            x = torch.randn(rows, shape[1]) * torch.logspace(-4, 2, rows)[:, None]
            assert_products(found, dense, x, FEW_ROWS, torch.randn(shape[0]))
            assert_products(found, dense, x.bfloat16(), FEW_ROWS)
            assert_products(found, dense, x.half(), FEW_ROWS, torch.randn(shape[0]))
        x = torch.randn(70, shape[1])
        if format == "dense_int4":
            assert found.matrix.linear(x, None, SPARSE) is None  # unpacked and multiplied densely instead
        else:
            assert_products(found, dense, x, SPARSE)


def test_int4_matrices_of_several_layouts_in_one_call(paths):
    torch.manual_seed(8)
    kinds = [("bitmask_int4", 128), ("bitmask_int4", 64), ("dense_int4", 64), ("two_four_int4", 128)]
    for rows in (1, 3, 8):
        tensors = [int4_tensors(format, (40, 576), group, torch.bfloat16) for format, group in kinds]
        found = [packed(format, (40, 576), each) for (format, _), each in zip(kinds, tensors, strict=True)]
        paths()
        x = torch.randn(rows, 576)
        products = MatrixGroup([each.matrix for each in found]).linear(x, [None] * len(found), FEW_ROWS)
        assert products is not None
        for (format, _), each, product in zip(kinds, tensors, products, strict=True):
            dense = FORMATS[format].unpack(each, (40, 576))
            size = F.linear(x.abs(), dense.float().abs())
            assert ((product - F.linear(x, dense.float())).abs() <= 1e-5 * size).all()


@pytest.mark.parametrize("density", [0.3, 0.5, 0.6, 0.8, 0.97])
@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("shape", [(9, 68), (40, 300), (70, 1028)], ids=str)
def test_int4_masks_of_any_density(shape, group, density, paths):
    torch.manual_seed(11)
    mask = torch.rand(shape) < density
    weight = torch.where(mask, torch.randn(shape).sign() * (torch.rand(shape) + 0.3), 0).bfloat16()
    tensors = FORMATS["bitmask_int4"].nearest(dequantise4(*quantise4(weight, mask, group), torch.bfloat16, group))
    found, dense = packed("bitmask_int4", shape, tensors), FORMATS["bitmask_int4"].unpack(tensors, shape)
    assert_exact(found, tensors)
    paths()
    for rows in (1, 2, 5, 8):
        assert_products(found, dense, torch.randn(rows, shape[1]), FEW_ROWS)
        assert_products(found, dense, torch.randn(rows, shape[1]).bfloat16(), FEW_ROWS, torch.randn(shape[0]))
    assert_products(found, dense, torch.randn(70, shape[1]), SPARSE)


@torch.no_grad()
def test_a_layer_packed_for_avx512_is_right_on_other_paths_too(monkeypatch):
    use("avx512", monkeypatch)
    torch.manual_seed(12)
    tensors = int4_tensors("bitmask_int4", (48, 256), 128, torch.bfloat16)
    layer, x = SparseLinear.from_packed("bitmask_int4", (48, 256), tensors), torch.randn(2, 256).bfloat16()
    layer.to_native_format(Arena(1 << 20))
    assert layer._tiles is not None
    expected = F.linear(x.double(), layer.unpack().double())
    for path in ("avx512", "avx2", "scalar", "reference"):
        monkeypatch.setenv(native.VARIABLE, path)
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("rows", [1, 3, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int4_products_of_infinities_and_nan(dtype, rows, paths):
    torch.manual_seed(9)
    tensors = int4_tensors("dense_int4", (20, 64), 64, torch.bfloat16)
    found, dense = packed("dense_int4", (20, 64), tensors), FORMATS["dense_int4"].unpack(tensors, (20, 64)).float()
    paths()
    for value in (float("inf"), float("-inf"), float("nan")):
        x = torch.randn(rows, 64).to(dtype)
        x[-1, 17] = value
        y, exact = found.matrix.linear(x, None, FEW_ROWS), F.linear(x.float(), dense)
        assert y is not None
        for same in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(same(y), same(exact))


@pytest.mark.parametrize("threads", [2, 3, 16])
def test_threads_change_no_bit_of_int4(threads, paths):
    torch.manual_seed(10)
    found = packed("bitmask_int4", (120, 96), int4_tensors("bitmask_int4", (120, 96), 64, torch.bfloat16))
    paths()
    assert_same_with_threads(threads, found, torch.randn(6, 96).bfloat16(), FEW_ROWS)


def test_extras_in_late_rows_only():
    torch.manual_seed(3)
    mask = masks(600, 256)["2:4"]
    weight = torch.where(mask, torch.rand(600, 256) + 0.5, 0).bfloat16()
    weight[400] = torch.where(mask[400], 5.0, 0).bfloat16()  # beyond the range of a lane
    for format in ("two_four", "bitmask"):
        tensors = FORMATS[format].pack(weight)
        found = packed(format, (600, 256), tensors)
        assert_exact(found, tensors)
        for rows in range(1, 9):
            assert_products(found, weight, torch.randn(rows, 256), FEW_ROWS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extras_at_any_distance(dtype):
    """Their columns are counted from one to the next in eight bits."""
    torch.manual_seed(3)
    distances = [1, 3, 254, 255, 256, 257, 509, 510, 511, 765, 1021, 4099]
    mask = torch.stack([(torch.arange(4100) + 1) % distance == 0 for distance in distances])
    mask[5:, 0] = True  # after an extra in the first column too
    beyond = torch.where(mask, 5.0 if dtype != torch.float16 else -0.0, 0).to(dtype)  # what no lane holds
    tensors = {"values": beyond[mask], "bitmask": pack_bits(mask)}
    two = masks(*mask.shape)["2:4"]
    values = torch.rand(mask.shape) + 0.5
    recovered = FORMATS["two_four_compact_int8"].nearest(torch.where(two | mask, values, 0))
    for format, packing in (("bitmask", tensors), ("two_four_compact_int8", recovered)):
        found, dense = packed(format, mask.shape, packing), FORMATS[format].unpack(packing, mask.shape)
        assert_exact(found, packing)
        for rows in (1, 3, 8):
            assert_products(found, dense, torch.randn(rows, 4100), FEW_ROWS)
        assert_products(found, dense, torch.randn(70, 4100), SPARSE)


@pytest.mark.parametrize("kernel", [FEW_ROWS, SPARSE])
@pytest.mark.parametrize("threads", [2, 3, 16])
def test_threads_change_no_bit(threads, kernel):
    torch.manual_seed(4)
    weight = weight_of(masks(120, 96)["half"], torch.bfloat16)
    found, x = packed("bitmask", (120, 96), FORMATS["bitmask"].pack(weight)), torch.randn(6, 96).bfloat16()
    assert_same_with_threads(threads, found, x, kernel)


def test_matrices_of_both_kinds_in_one_call_equal_each_alone():
    torch.manual_seed(5)
    found = [
        packed("bitmask", (out, 256), FORMATS["bitmask"].pack(weight_of(masks(out, 256)[name], torch.bfloat16)))
        for out, name in ((48, "2:4"), (16, "half"), (5, "full"))
    ]
    x = torch.randn(3, 256).bfloat16()
    together = MatrixGroup([one.matrix for one in found]).linear(x, [None] * 3)
    assert together is not None
    for one, product in zip(found, together, strict=True):
        assert torch.equal(product, one.matrix.linear(x))
    halves = packed("bitmask", (8, 256), FORMATS["bitmask"].pack(weight_of(masks(8, 256)["2:4"], torch.float16)))
    assert MatrixGroup([found[0].matrix, halves.matrix]).linear(x, [None] * 2) is None  # of different types


def test_a_matrix_that_would_grow_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(tiles, "LIMIT", 1.1)
    torch.manual_seed(6)
    sparse = torch.where(torch.rand(64, 512) < 0.2, torch.randn(64, 512), 0)
    assert tiles.pack("bitmask", (64, 512), FORMATS["bitmask"].pack(sparse)) is None
    layer = SparseLinear.from_dense(sparse, format="bitmask")
    layer.to_native_format(Arena(1 << 20))
    assert layer._tiles is None
    assert layer.native_matrix() is not None


def test_other_paths_keep_the_layout_of_the_file(monkeypatch):
    assert "in tiles of eight rows" in native.why()
    monkeypatch.setenv(native.VARIABLE, "scalar")
    assert not native.has_tiles()
    assert "as in the file" in native.why()
    assert tiles.pack("bitmask", (8, 32), FORMATS["bitmask"].pack(torch.ones(8, 32))) is None


X = torch.linspace(-1, 1, 512).view(1, 512)


@pytest.fixture(params=["bitmask", "two_four_compact_int8"])
def layer(request) -> SparseLinear:
    """A layer in tiles, and its tensors before as `layer.before`."""
    torch.manual_seed(7)
    weight = torch.where(masks(96, 512)["2:4 and recovered"], torch.randn(96, 512) * 0.05, 0)
    made = SparseLinear.from_packed(request.param, (96, 512), FORMATS[request.param].nearest(weight), torch.randn(96))
    made.before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    made.to_native_format(Arena(1 << 20))
    assert made._tiles is not None
    return made


@torch.no_grad()
def test_parameters_are_those_of_the_file_and_the_next_product_packs_them_again(layer):
    product = layer(X)
    state = layer.state_dict()
    assert layer._tiles is None
    assert list(state) == list(layer.before)
    assert all(torch.equal(state[name], tensor) for name, tensor in layer.before.items())
    torch.testing.assert_close(layer(X), product, rtol=1e-3, atol=1e-4)
    assert layer._tiles is None  # someone holds them, and could change them
    del state
    assert torch.equal(layer(X), product)
    assert layer._tiles is not None
    assert {name: p.shape for name, p in layer.named_parameters()} == {n: t.shape for n, t in layer.before.items()}


def test_a_model_that_is_made_ready_has_all_its_layers_in_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "LIMIT", 4.0)  # of which an arena has the room
    weight = torch.where(masks(64, 64)["2:4 and recovered"], torch.randn(64, 64) * 0.05, 0).bfloat16()
    model = nn.Sequential(LlamaRMSNorm(64).bfloat16(), *(SparseLinear.from_dense(weight) for _ in range(3)))
    optimize(model)
    assert isinstance(model[0], NativeNorm)
    assert all(layer._tiles is not None for layer in model[1:])


@torch.no_grad()
def test_reading_the_weight_leaves_it_in_tiles(layer):
    dense = FORMATS[layer.format].unpack({n: t for n, t in layer.before.items() if n != "bias"}, layer.shape)
    assert torch.equal(layer.unpack(), dense)
    assert torch.equal(layer.weight, dense)
    assert torch.equal(layer.bias, layer.before["bias"])
    assert f"format={layer.format}, density=" in repr(layer)
    assert layer._tiles is not None


@torch.no_grad()
def test_copies_casts_and_pickles(layer):
    product = layer(X)
    twin = copy.deepcopy(layer)
    assert layer._tiles is not None
    assert torch.equal(twin(X), product)
    assert twin._tiles is not None
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(X), product)
    half = twin.to(torch.bfloat16)
    torch.testing.assert_close(half(X.bfloat16()).float(), product, rtol=0.05, atol=0.05)
    assert half._tiles is not None
    assert half.get_parameter(FORMATS[layer.format].typed).dtype == torch.bfloat16
    layer.load_state_dict(twin.float().state_dict())
    torch.testing.assert_close(layer(X), product, rtol=0.05, atol=0.05)


@torch.no_grad()
def test_changes_in_place_are_seen(layer):
    before = layer(X) - layer.bias
    name = "values" if layer.format == "bitmask" else "rec_values"
    tensor = layer.get_parameter(name)
    tensor.zero_()
    changed = layer(X) - layer.bias
    assert not torch.allclose(changed, before)
    tensor.copy_(layer.before[name])
    torch.testing.assert_close(layer(X) - layer.bias, before, rtol=1e-3, atol=1e-4)
    del tensor
    layer(X)
    assert layer._tiles is not None
    layer.bias.add_(1)
    torch.testing.assert_close(layer(X) - layer.bias, before, rtol=1e-3, atol=1e-4)
    assert layer._tiles is not None


def test_gradients_reach_the_input_and_the_bias(layer):
    x = torch.randn(5, 512, requires_grad=True)
    layer(x).square().sum().backward()
    assert layer._tiles is not None
    found, layer.bias.grad = (x.grad, layer.bias.grad.clone()), None
    dense, x.grad = layer.dequantize(), None
    dense(x).square().sum().backward()
    torch.testing.assert_close(found, (x.grad, dense.bias.grad), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_parameters_restored_in_inference_mode_can_be_used_outside_of_it(layer):
    with torch.inference_mode():
        assert layer.get_parameter("values") is not None
    assert not layer.get_parameter("values").is_inference()


@torch.no_grad()
def test_compiled_as_one_node(layer):
    model = nn.Sequential(layer, nn.ReLU())
    expected = model(X)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), expected, rtol=1e-3, atol=1e-3)
