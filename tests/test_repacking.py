"""A pruned folder in another layout is the same model, or the same rounded; what was not pruned is refused."""

import json

import pytest
import torch
from families import save_model, token_ids
from transformers import AutoModelForCausalLM

from budwood.errors import UsageError
from budwood.inspection import inspect
from budwood.pruning import prune
from budwood.repacking import repack

IDS = token_ids(1, 400) % 90 + 3
CALIBRATION = {
    "num_samples": 4,
    "seq_length": 24,
    "compute_dtype": "float32",
    "sparse_products": "off",
    "attention": "fused",
}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_model("llama", folder / "dense")
    prune(folder / "dense", folder / "pruned", "wrp(alpha=0.5)", IDS, skip=["down_proj"], **CALIBRATION)
    return folder / "pruned"


def weights(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.dequantize()
    return model.state_dict()


@pytest.mark.parametrize("layout", ["bitmask", "two_four_csr", "auto"])
def test_another_format_holds_the_same_weights(pruned, tmp_path, layout):
    report = repack(pruned, tmp_path / "out", layout)
    assert report["method"] == "wrp(alpha=0.5)"
    before, after = weights(pruned), weights(tmp_path / "out")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_rounded_it_is_near_and_what_was_skipped_stays(pruned, tmp_path):
    report = repack(pruned, tmp_path / "out", values="int8")
    before, after = weights(pruned), weights(tmp_path / "out")
    for name, tensor in before.items():
        linear = name.removesuffix(".weight")
        if linear in report["linears"]:
            error = ((after[name] - tensor).norm() / tensor.norm()).item()
            assert error == pytest.approx(report["linears"][linear]["rounding_error"], rel=1e-5)
            assert 0 < error < 0.02
        else:
            assert torch.equal(after[name], tensor)
    assert not any("down_proj" in name for name in report["linears"])
    found = inspect(tmp_path / "out")
    made = json.loads((pruned / "report.json").read_text())
    for name, matrix in found["linears"].items():
        assert matrix["format"] == "two_four_compact_int8"
        assert matrix["recovered"] == pytest.approx(report["linears"][name]["recovered"], rel=0.02)
        assert matrix["recovered"] == pytest.approx(made["linears"][name]["recovered"], rel=0.02)
    assert not found["totals"]["broken"]


def test_it_is_the_same_rounding_as_while_pruning(pruned, tmp_path):
    """Only the first block: later ones are chosen by other inputs."""
    dense = pruned.parent / "dense"
    prune(dense, tmp_path / "once", "wrp(alpha=0.5)", IDS, skip=["down_proj"], values="int8", **CALIBRATION)
    repack(pruned, tmp_path / "later", values="int8")
    once, later = weights(tmp_path / "once"), weights(tmp_path / "later")
    for name, tensor in once.items():
        if "layers.0." in name:
            assert torch.equal(later[name], tensor), name


def test_refusals(pruned, tmp_path):
    with pytest.raises(UsageError, match="holds nothing that budwood pruned"):
        repack(pruned.parent / "dense", tmp_path / "out", values="int8")
    with pytest.raises(UsageError, match="give another folder"):
        repack(pruned, pruned, values="int8")
    with pytest.raises(UsageError, match="holds no int8 values"):
        repack(pruned, tmp_path / "out", "dense", values="int8")
    assert not (tmp_path / "out").exists()
    repack(pruned, tmp_path / "out", values="int8")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    repack(pruned, tmp_path / "out", values="int8")
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    with pytest.raises(UsageError, match="holds another run: its format"):
        repack(pruned, tmp_path / "out", "bitmask")
    with pytest.raises(UsageError, match="int8 already"):
        repack(tmp_path / "out", tmp_path / "twice", values="int8")
    repack(tmp_path / "out", tmp_path / "lossless")
    first, second = weights(tmp_path / "out"), weights(tmp_path / "lossless")
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
