"""Every choice of arithmetic, in a whole run: what computes, what the recipe records, what a resumed run repeats."""

import json

import pytest
import torch
from families import save_model, token_ids
from safetensors.torch import load_file

from budwood.checkpoints.source import open_source
from budwood.kernels import native
from budwood.kernels.native_matrix import NativeMatrix
from budwood.pruning import prune
from budwood.stream import arithmetic, attention
from budwood.stream.arithmetic import Arithmetic, multiplies_sparse
from budwood.stream.model import Model

IDS = token_ids(1, 400) % 90 + 3
CPU = torch.device("cpu")
WINDOWS = {"num_samples": 4, "seq_length": 24}
PLAIN = {"compute_dtype": "float32", "sparse_products": "off", "attention": "fused", **WINDOWS}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save_model("llama", folder)
    return folder


@pytest.fixture
def library(monkeypatch):
    """The native library in use."""
    if native.file() is None:
        pytest.skip("the native library is not built")
    monkeypatch.setenv(native.VARIABLE, "auto")


@pytest.fixture
def products(monkeypatch):
    """The products that native kernels computed, by kernel; the trials of `choose_arithmetic` are not counted."""
    calls, real = [], NativeMatrix.linear

    def counted(self, input, bias=None, kernel=native.FEW_ROWS):
        calls.append(kernel)
        return real(self, input, bias, kernel)

    monkeypatch.setattr(arithmetic, "sparse_product_gain", lambda: 10.0)
    monkeypatch.setattr(arithmetic, "multiplies_sparse", lambda *_: True)
    monkeypatch.setattr(NativeMatrix, "linear", counted)
    return calls


@pytest.fixture
def blocked(monkeypatch):
    """The calls of attention in blocks."""
    calls, real = [], attention.blocked_attention
    monkeypatch.setattr(arithmetic, "blocked_attention_gain", lambda _: 10.0)
    monkeypatch.setattr(attention, "blocked_attention", lambda *args: calls.append(args[0].dtype) or real(*args))
    return calls


def recorded(folder):
    return json.loads((folder / "recipe.json").read_text())["arithmetic"]


def shards(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def weights(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def outputs(folder, chosen):
    """The hidden states after the last block, when every second pair of weights is dropped from every linear."""
    model = Model(open_source(folder), arithmetic=chosen)
    for block in model.blocks(token_ids()):
        for linear in block.linears.values():
            linear.weight = linear.weight * (torch.arange(linear.shape[1]) % 4 < 2)
    assert not [name for name, module in model.module.named_modules() if "forward" in module.__dict__]
    return model.activations.hidden.float()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)], ids=str)
def test_sparse_products_are_torchs_but_for_rounding(llama, library, dtype, tolerance, monkeypatch):
    if not multiplies_sparse(dtype, CPU):
        pytest.skip(f"no sparse kernel for {dtype} here")
    calls, real = [], NativeMatrix.linear
    monkeypatch.setattr(NativeMatrix, "linear", lambda *args, **kwargs: calls.append(kwargs) or real(*args, **kwargs))
    torch_only = outputs(llama, Arithmetic(dtype))
    assert not calls
    sparse = outputs(llama, Arithmetic(dtype, sparse_products=True))
    assert len(calls) == 28  # 7 linears in each of 4 blocks, one batch
    assert {call["kernel"] for call in calls} == {native.SPARSE}
    assert (sparse - torch_only).norm() <= tolerance * torch_only.norm()


def test_a_run_with_sparse_products(llama, library, products, tmp_path):
    options = {**PLAIN, "sparse_products": "on"}
    report = prune(llama, tmp_path / "on", 'wanda("50%")', IDS, **options)
    assert set(products) == {native.SPARSE}
    assert recorded(tmp_path / "on")["sparse_products"] is True
    plain = prune(llama, tmp_path / "off", 'wanda("50%")', IDS, **PLAIN)
    assert recorded(tmp_path / "off")["sparse_products"] is False
    for found, expected in zip(report["blocks"], plain["blocks"], strict=True):
        assert found["relative_error"] == pytest.approx(expected["relative_error"], rel=1e-3)
    first = "sparse-00002-of-00005.safetensors"  # of the block whose inputs no sparse product made
    on, off = load_file(tmp_path / "on" / first), load_file(tmp_path / "off" / first)
    assert all(torch.equal(on[name], off[name]) for name in off)


def test_published_methods_use_torchs_products_and_attention(llama, library, products, blocked, tmp_path):
    """Where both would otherwise be faster here."""
    options = {"compute_dtype": "float32", **WINDOWS}
    plain = {"computed_in": "float32", "sparse_products": False, "blocked_attention": False, "device": "cpu"}
    for expression in ('wanda("50%", published=True)', 'refit(sparsegpt("50%", published=True))'):
        folder = tmp_path / expression.partition("(")[0]
        prune(llama, folder, expression, IDS, device="cpu", **options)
        assert recorded(folder) == plain
        assert (products, blocked) == ([], [])
    prune(llama, tmp_path / "other", 'wanda("50%")', IDS, device="cpu", **options)
    assert recorded(tmp_path / "other") == {**plain, "sparse_products": True, "blocked_attention": True}
    assert products
    assert blocked


@pytest.mark.parametrize("faster", [None, "float32", "bfloat16"])
def test_an_automatic_dtype_is_recorded_and_is_the_run_of_that_dtype(llama, tmp_path, monkeypatch, faster):
    """faster: what the trial finds; None: whatever it finds here."""
    if faster:
        monkeypatch.setattr(arithmetic, "faster_dtype", lambda *_: (getattr(torch, faster), f"a note on {faster}"))
    options = {**PLAIN, "compute_dtype": "auto"}
    report = prune(llama, tmp_path / "auto", 'wanda("2:4")', IDS, **options)
    chosen = recorded(tmp_path / "auto")["computed_in"]
    assert chosen == (faster or chosen) == report["compute_dtype"]
    assert any(chosen in note for note in report["notes"])
    prune(llama, tmp_path / "asked", 'wanda("2:4")', IDS, **{**PLAIN, "compute_dtype": chosen})
    one, other = weights(tmp_path / "auto"), weights(tmp_path / "asked")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_resumed_run_computes_as_it_began(llama, tmp_path, monkeypatch):
    """Even where the trial would choose another dtype by then."""
    options = {**PLAIN, "compute_dtype": "auto"}
    monkeypatch.setattr(arithmetic, "faster_dtype", lambda *_: (torch.bfloat16, "a note"))
    prune(llama, tmp_path / "out", 'wanda("2:4")', IDS, **options)
    whole = shards(tmp_path / "out")
    for name in (*list(whole)[2:], "config.json", "report.json"):
        (tmp_path / "out" / name).unlink()
    monkeypatch.setattr(arithmetic, "faster_dtype", lambda *_: (torch.float32, "another note"))
    prune(llama, tmp_path / "out", 'wanda("2:4")', IDS, **options)
    assert recorded(tmp_path / "out")["computed_in"] == "bfloat16"
    assert shards(tmp_path / "out") == whole


def test_a_run_with_blocked_attention(llama, blocked, tmp_path):
    report = prune(llama, tmp_path / "blocked", 'wanda("50%")', IDS, **{**PLAIN, "attention": "blocked"})
    assert set(blocked) == {torch.float32}
    assert recorded(tmp_path / "blocked")["blocked_attention"] is True
    before = len(blocked)
    plain = prune(llama, tmp_path / "fused", 'wanda("50%")', IDS, **PLAIN)
    assert len(blocked) == before
    assert recorded(tmp_path / "fused")["blocked_attention"] is False
    for found, expected in zip(report["blocks"], plain["blocks"], strict=True):
        assert found["relative_error"] == pytest.approx(expected["relative_error"], rel=1e-3)
