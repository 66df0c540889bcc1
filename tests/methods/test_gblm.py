"""GBLM-Pruner: the worked examples, the invariants, agreement with the published program."""

import logging
import math

import numpy as np
import pytest
import reference
import torch
from families import save_model, token_ids

from budwood.checkpoints.source import open_source
from budwood.checkpoints.work import Work
from budwood.errors import RunError, UsageError
from budwood.methods import gblm, parse_method
from budwood.sparsity import scores
from budwood.sparsity.patterns import parse_pattern
from budwood.stream.model import Model

W = [[-0.5, 2, -1.5, 1, 1, 1, 1.5, 1], [-2, -1, 1, 2, 3, -1.5, -1.5, -3]]
X = [1, 2, 0.5, 0.5, 1, 1, 4, 0.5]
SAMPLES = [
    [[0.04, -0.02, -0.03, 0.03, 0.02, -0.03, -0.04, -0.01], [-0.04, 0.02, -0.02, -0.03, 0.01, -0.02, 0.04, 0.03]],
    [[0, 0, -0.03, -0.03, -0.01, -0.02, -0.02, 0.02], [-0.03, 0.04, 0.02, -0.03, 0.02, -0.03, -0.03, -0.04]],
]
SCORES = {
    "l1": [[2.5, 8, 9.75, 6.5, 4, 6, 15, 3.5], [16, 8, 4.5, 13, 12, 9, 16.5, 22.5]],
    "l2": [
        [2.5, 8, 7.1140, 4.7426, 3.2361, 4.6056, 12.7082, 2.7361],
        [12, 6.4721, 3.3284, 9.4853, 9.7082, 6.9083, 13.5, 16.5],
    ],
}
REMOVED = {
    ("l1", "50%"): [[0, 4, 5, 7], [1, 2, 4, 5]],
    ("l2", "50%"): [[0, 4, 5, 7], [1, 2, 3, 5]],
    ("l1", "2:4"): [[0, 3, 4, 7], [1, 2, 4, 5]],
    ("l2", "2:4"): [[0, 3, 4, 7], [1, 2, 4, 5]],
}


@pytest.mark.parametrize(("norm", "pattern"), REMOVED)
def test_the_worked_example(norm, pattern):
    gradients = torch.tensor(SAMPLES)
    total = gradients.abs().sum(0) if norm == "l1" else gradients.square().sum(0).sqrt()
    found = scores.gblm(torch.tensor(W), torch.tensor(X), total, 100)
    torch.testing.assert_close(found, torch.tensor(SCORES[norm]), rtol=1e-4, atol=1e-4)
    keep = parse_pattern(pattern).keep(found)
    assert [row.logical_not().nonzero().flatten().tolist() for row in keep] == REMOVED[norm, pattern]


def test_without_gradients_it_is_wanda():
    weight, norms, gradients = torch.randn(8, 16), torch.rand(16), torch.rand(8, 16)
    assert torch.equal(scores.gblm(weight, norms, gradients, 0), scores.wanda(weight, norms))
    far = parse_pattern("50%").keep(scores.gblm(weight, norms, gradients, 1e9))
    assert torch.equal(far, parse_pattern("50%").keep(weight.abs() * gradients))


def run(folder, expression, ids, work, batch=None):
    """The masks (True: kept) and the input norms after `gblm` has pruned a model, by name of the linear."""
    model = Model(open_source(folder))
    step = parse_method(expression).prepare(model, ids, Work(work))
    masks = {}
    for block in model.blocks(ids, batch=batch):
        step(block)
        masks |= {linear.name: linear.weight != 0 for linear in block.linears.values()}
    return masks


CASES = [
    (model, norm, pattern, share)
    for model in ("tiny-mha", "tiny-gqa")
    for norm in ("l1", "l2")
    for pattern, share in (("unstructured", 0.5), ("unstructured", 0.3), ("2:4", 0.5), ("4:8", 0.5))
]


@pytest.mark.parametrize(("model", "norm", "pattern", "share"), CASES)
def test_the_masks_are_those_of_the_published_program(model, norm, pattern, share, tmp_path):
    """A few bits may differ: the smallest gap between scores at the cut is 2e-6 of them."""
    text = f"{100 * share:g}%" if pattern == "unstructured" else pattern
    masks = run(reference.model(model), f'gblm("{text}", norm="{norm}", published=True)', reference.tokens(), tmp_path)
    bits = np.concatenate([mask.logical_not().flatten().numpy() for mask in masks.values()])
    case = f"gblm.{norm}.{pattern}.{share}"
    expected = np.unpackbits(reference.tensors(f"gblm/gblm_{model}")[f"{case}/mask_bits"].numpy())[: len(bits)]
    assert list(masks) == [
        linear["name"].removesuffix(".weight") for linear in reference.record("gblm/gblm")["models"][model]["linears"]
    ]
    assert int((bits != expected).sum()) <= 5


@pytest.mark.parametrize("model", ["tiny-mha", "tiny-gqa"])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_gradients_are_those_of_the_published_program(model, norm, tmp_path):
    windows, streamed = reference.tokens(), Model(open_source(reference.model(model)))
    gblm.save_gradients(streamed, windows, Work(tmp_path), norm)
    stored = [Work(tmp_path).tensors(f"gradients-model.layers.{index}", dict) for index in range(len(streamed))]
    factor = 100 * (8 if norm == "l1" else math.sqrt(8))
    found = [factor * stored[int(name.split(".")[2])][name] for name in streamed.linears]
    expected = reference.tensors(f"gblm/gblm_{model}")
    for part, summed in (("rowsum", [g.sum(1) for g in found]), ("colsum", [g.sum(0) for g in found])):
        torch.testing.assert_close(torch.cat(summed), expected[f"grad_{norm}.{part}"], rtol=1e-5, atol=1e-5)
    first = expected[f"grad_{norm}.first_row"]
    torch.testing.assert_close(torch.cat([g[0] for g in found]), first, rtol=1e-5, atol=1e-5 * float(first.max()))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save_model("llama", folder)
    return folder


def equal(ours, theirs):
    return all(torch.equal(mask, theirs[name]) for name, mask in ours.items())


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_number_and_order_of_windows_do_not_matter(llama, norm, tmp_path):
    ids, expression = token_ids(3), f'gblm("50%", norm="{norm}")'
    once = run(llama, expression, ids, tmp_path / "once")
    assert equal(once, run(llama, expression, torch.cat([ids, ids]), tmp_path / "twice", batch=3))
    assert equal(once, run(llama, expression, ids[[2, 0, 1]], tmp_path / "order"))
    sums = f'gblm("50%", norm="{norm}", published=True)'
    doubled = run(llama, sums, torch.cat([ids, ids]), tmp_path / "sums_twice")
    assert not equal(run(llama, sums, ids, tmp_path / "sums"), doubled)


def test_gradients_that_were_not_all_stored_are_computed_again(llama, tmp_path, monkeypatch):
    ids, real, saved = token_ids(3), Work.save, []

    def killed(self, name, tensors):
        if len(saved) == 2:
            raise RunError("killed")
        saved.append(name)
        real(self, name, tensors)

    with monkeypatch.context() as patched:
        patched.setattr(Work, "save", killed)
        with pytest.raises(RunError, match="killed"):
            run(llama, "gblm()", ids, tmp_path / "cut")
    assert len(saved) == 2
    assert equal(run(llama, "gblm()", ids, tmp_path / "cut"), run(llama, "gblm()", ids, tmp_path / "whole"))


def test_alpha_0_is_wanda(llama, tmp_path):
    ids = token_ids(3)
    assert equal(run(llama, 'gblm("2:4", alpha=0)', ids, tmp_path / "a"), run(llama, 'wanda("2:4")', ids, tmp_path))


def test_one_term_without_effect_causes_a_warning(llama, tmp_path, caplog):
    model, ids = Model(open_source(llama)), token_ids(3)
    step = parse_method("gblm(alpha=1e-9)").prepare(model, ids, Work(tmp_path))
    for block in model.blocks(ids):
        step(block)
    with caplog.at_level(logging.WARNING, logger="budwood"):
        step.finish(None)
    assert "gradients change almost nothing" in caplog.text


@pytest.mark.parametrize(
    "expression", ['gblm(norm="l3")', "gblm(alpha=-1)", "gblm(alpha=1e999)", 'gblm("x")', "allocate(gblm())"]
)
def test_options_that_cannot_be_are_refused(expression):
    with pytest.raises(UsageError):
        parse_method(expression)
