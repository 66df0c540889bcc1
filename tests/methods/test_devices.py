"""Every method on an accelerator: no tensor is on the wrong device, and the result is that of the CPU.

The accelerator is emulated (`accelerator.py`), so only where tensors are is tested, not what a GPU computes.
"""

import pytest
import torch
from accelerator import accelerator
from families import save_model, token_ids

from budwood.checkpoints.loading import load
from budwood.pruning import prune
from budwood.retraining import retrain

OPTIONS = {
    "num_samples": 4,
    "seq_length": 16,
    "compute_dtype": "float32",
    "sparse_products": "off",
    "attention": "fused",
    "format": "dense",
}
IDS = token_ids(4) % 90 + 3
EXPRESSIONS = (
    'refit(sparsegpt("2:4"), target=1.0)',
    'graft(bits=9.75, steps=2, target="dense", rounds=4, iterations=3)',
    "gblm()",
    "matched(wrp(alpha=0.5), steps=2)",
    'sds(wanda("50%"), data="dense", adjust="dynamic", steps=9, growth=2)',
    'flap(drop=0.3, bias="recentred")',
    'tyr(drop=0.5, preset="test", generations=1, children=2)',
    "perp(llm_pruner(drop=0.3), steps=2, rank=2)",
    'perp(magnitude("2:4"), steps=2, rank=2, reconstruct="block")',
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Of two blocks: one that is first, and one whose inputs come from a block that was pruned."""

    def shorten(model):
        model.model.layers, model.config.num_hidden_layers = model.model.layers[:2], 2

    folder = tmp_path_factory.mktemp("llama")
    save_model("llama", folder, change=shorten)
    return folder


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_no_tensor_is_on_the_wrong_device(llama, tmp_path, expression):
    with accelerator() as device:
        report = prune(llama, tmp_path / "there", expression, IDS, device=device, **OPTIONS)
    assert all(torch.isfinite(value).all() for value in load(tmp_path / "there").state_dict().values())
    assert report["blocks"][0]["name"] == "model.layers.0"


def test_the_result_is_that_of_the_cpu(llama, tmp_path):
    prune(llama, tmp_path / "here", 'magnitude("2:4")', **{**OPTIONS, "format": "auto"})
    options = {"seq_length": 16, "steps": 3, "batch": 2, "compute_dtype": "float32", "rank": 2}
    retrain(tmp_path / "here", tmp_path / "retrained here", IDS, device="cpu", **options)
    with accelerator() as device:
        retrain(tmp_path / "here", tmp_path / "retrained there", IDS, device=device, **options)
    found, expected = (load(tmp_path / f"retrained {place}").dequantize().state_dict() for place in ("there", "here"))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


def test_the_accelerator_refuses_tensors_of_two_devices():
    with accelerator() as device:
        there = torch.ones(2, 3, device=device)
        assert (there + there).sum().item() == 12
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(2, 3)
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
