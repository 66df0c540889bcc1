"""Methods that fit 4-bit values: the grid, the mask, the budget, the format that follows, and what is refused."""

import pytest
import torch
from families import FAMILIES, GROUPED, save_model, token_ids
from safetensors.torch import load_file

from budwood.errors import UsageError
from budwood.methods import parse_method
from budwood.planning import plan
from budwood.pruning import prune
from budwood.repacking import repack
from budwood.sparsity.codes import dequantise4, quantise4

OPTIONS = {"seq_length": 24, "compute_dtype": "float32", "sparse_products": "off", "attention": "fused"}
IDS = token_ids(4) % 90 + 3
FREE = 'graft(bits=4.0, pattern="free", allocate="uniform", rounds=4, values="int4")'
METHODS = {
    FREE: "bitmask_int4",
    'graft(bits=4.3, allocate="uniform", rounds=4, values="int4")': "bitmask_int4",
    'alps("50%", rounds=4, values="int4")': "bitmask_int4",
    'refit(wrp(alpha=0.25), values="int4")': "bitmask_int4",
    'refit(wanda("2:4"), values="int4")': "bitmask_int4",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_model("llama", folder / "llama")
    return folder


def error_of(report):
    return [block["relative_error"] for block in report["blocks"]]


@pytest.mark.parametrize("method", METHODS)
def test_values_are_codes_and_the_format_follows(root, method, tmp_path):
    report = prune(root / "llama", tmp_path / "fitted", method, IDS, **OPTIONS)
    assert {linear["format"] for linear in report["linears"].values()} == {METHODS[method]}
    assert all(linear["rounding_error"] == 0 for linear in report["linears"].values())  # fitted, not rounded after it
    repack(tmp_path / "fitted", tmp_path / "dense", "dense")
    for file in (tmp_path / "dense").glob("*.safetensors"):
        for name, weight in load_file(file).items():
            if name.removesuffix(".weight") in report["linears"]:
                codes, scales = quantise4(weight, weight != 0)
                assert torch.equal(dequantise4(codes, scales, weight.dtype), weight)


def test_a_budget_counts_codes_scales_and_places(root):
    found = plan(root / "llama", FREE, dtype="bfloat16")
    assert found["chosen"] == "bitmask_int4"
    assert 3.9 < found["bits_per_weight"] <= 4.0
    wide = plan(root / "llama", FREE.replace("4.0", "3.0"), dtype="bfloat16")
    assert wide["bits_per_weight"] <= 3.0


@pytest.mark.parametrize(("bits", "group", "stored"), [(4.2, 128, 4.125), (4.3, 64, 4.25)])
def test_a_budget_for_all_weights_drops_none_and_has_the_finest_scales(bits, group, stored, tmp_path, monkeypatch):
    monkeypatch.setitem(
        FAMILIES, "wide", ("llama", {**GROUPED, "hidden_size": 128, "intermediate_size": 256, "head_dim": 32})
    )
    save_model("wide", tmp_path / "wide")
    method = f'graft(bits={bits}, pattern="free", values="int4")'
    planned = plan(tmp_path / "wide", method, dtype="bfloat16")
    report = prune(tmp_path / "wide", tmp_path / "out", method, IDS, dtype="bfloat16", **OPTIONS)
    assert {linear["format"] for linear in report["linears"].values()} == {"dense_int4"} == {planned["chosen"]}
    assert report["totals"]["bits_per_weight"] == pytest.approx(stored, rel=1e-3)
    assert report["totals"]["bits_per_weight"] == pytest.approx(planned["bits_per_weight"], rel=1e-6)
    for file in (tmp_path / "out").glob("*.safetensors"):
        for name, scales in load_file(file).items():
            if name.endswith(".scales"):
                width = report["linears"][name.removesuffix(".scales").removesuffix(".weight")]["shape"][1]
                assert scales.shape[1] == width // group


def test_what_is_written_is_what_plan_says(root, tmp_path):
    report = prune(root / "llama", tmp_path / "out", FREE, IDS, **OPTIONS)
    planned = plan(root / "llama", FREE)
    assert report["totals"]["bits_per_weight"] == pytest.approx(planned["bits_per_weight"], rel=0.03)  # codes of 0


def test_the_fit_is_better_than_rounding_the_same_method(root, tmp_path):
    fitted = prune(root / "llama", tmp_path / "fitted", 'alps("50%", rounds=4, values="int4")', IDS, **OPTIONS)
    rounded = prune(root / "llama", tmp_path / "rounded", 'alps("50%", rounds=4)', IDS, values="int4", **OPTIONS)
    assert fitted["totals"]["bytes"] <= rounded["totals"]["bytes"]
    assert error_of(fitted)[0] < error_of(rounded)[0]  # the same inputs and the same mask


@pytest.mark.parametrize(
    ("method", "values", "words"),
    [
        (FREE, "int8", "fits its weights to int4 values, and --values asks for int8"),
        ('matched(alps("50%", values="int4"))', None, "changes the values that"),
        ('refit(alps("50%", values="int4"))', None, "changes the values that"),
    ],
)
def test_contradictions_are_refused(root, tmp_path, method, values, words):
    for verb in (
        lambda: prune(root / "llama", tmp_path / "out", method, IDS, values=values, **OPTIONS),
        lambda: plan(root / "llama", method, values=values),
    ):
        with pytest.raises(UsageError, match=words):
            verb()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "method",
    [
        'graft(bits=3.25, values="int3")',
        'graft(bits=3.25, values="int4", fit=False)',
        'graft(bits=3.25, values="int4", steps=4)',
        'alps(values="int8")',
    ],
)
def test_options_that_cannot_be(method):
    with pytest.raises(UsageError, match="values"):
        parse_method(method)
