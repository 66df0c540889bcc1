"""A packed folder with native layers: close to the dense model, and still an ordinary transformers model."""

import copy

import pytest
import torch
from folders import logits, write_packed
from transformers import AutoModelForCausalLM

from budwood.checkpoints.quantizer import register
from budwood.kernels import native
from budwood.kernels.head import DenseLinear
from budwood.kernels.linear import SparseLinear

LINEAR = "model.layers.1.mlp.up_proj"
register()


@pytest.fixture(autouse=True)
def fastest(monkeypatch):
    if native.file() is None:
        pytest.skip("the native library is not built")
    monkeypatch.setenv(native.VARIABLE, "auto")


@pytest.fixture(params=["two_four_compact", "two_four_csr", "bitmask", "two_four_compact_int8"])
def written(tmp_path, request):
    folder, model = write_packed(tmp_path / "packed", format=request.param)
    # Int8 layers multiply with values that are not rounded to bfloat16 first, as the dense model's are.
    return folder, model.float(), 0.08 if "int8" in request.param else 1e-3


def opened(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options})


def close(found, expected, tolerance) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_logits_are_close_and_every_layer_is_native(written):
    packed = opened(written[0])
    close(logits(packed), logits(written[1]), written[2])
    layers = [module for module in packed.modules() if isinstance(module, SparseLinear)]
    assert layers
    assert all(layer.native_matrix() is not None for layer in layers)
    assert type(packed.get_output_embeddings()) is DenseLinear


def test_resident_weights_are_those_of_the_file_and_where_rows_begin(written):
    packed = opened(written[0], dtype="auto")
    layers = [module for module in packed.modules() if isinstance(module, SparseLinear)]
    for layer in layers:
        pieces = {
            tensor.data_ptr(): tensor.nbytes for tensor in (*layer.packed().values(), *layer.native_matrix().held)
        }
        beside = 8 * (layer.out_features + 1)  # beginnings of rows, for values and for what is recovered beside int8
        assert sum(pieces.values()) <= sum(tensor.nbytes for tensor in layer.packed().values()) + beside


def test_saved_again_copied_and_cast(written, tmp_path):
    packed = opened(written[0])
    expected = logits(packed)
    packed.save_pretrained(tmp_path / "again")
    close(logits(opened(tmp_path / "again")), expected, written[2])
    assert torch.equal(logits(copy.deepcopy(packed)), expected)
    half = copy.deepcopy(packed).to(torch.bfloat16)
    torch.testing.assert_close(logits(half).float(), expected, rtol=0.1, atol=0.1)
    plain = copy.deepcopy(packed).dequantize()
    assert not any(isinstance(module, SparseLinear) for module in plain.modules())
    close(logits(plain), expected, written[2])


def test_generation_is_that_of_the_dense_model(written):
    ids = torch.tensor([[1, 20, 30], [4, 5, 6]])
    found = opened(written[0]).generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(found, written[1].generate(ids, max_new_tokens=5, do_sample=False))


def test_offloaded_to_disk(written, tmp_path):
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= {f"model.layers.{layer}": "disk" if layer else "cpu" for layer in range(4)}
    packed = opened(written[0], device_map=places, offload_folder=tmp_path / "offload")
    assert packed.get_submodule(LINEAR).get_parameter("values").is_meta
    close(logits(packed), logits(written[1]), written[2])


def test_adapters_train_on_top(written):
    peft = pytest.importorskip("peft")
    packed = opened(written[0])
    adapted = peft.get_peft_model(packed, peft.LoraConfig(r=2, target_modules=["up_proj", "q_proj"]))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    ids = torch.arange(3, 35).view(2, 16)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = adapted(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_compiled(written):
    packed = opened(written[0])
    packed.model.layers, packed.config.num_hidden_layers = packed.model.layers[:1], 1  # all blocks are traced alike
    expected = logits(packed)
    packed.forward = torch.compile(packed.forward, backend="eager")
    close(logits(packed), expected, written[2])
