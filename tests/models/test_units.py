"""Units of every family: found, verified, and cut out with the answers of the masked model, streamed and loaded."""

from dataclasses import dataclass

import pytest
import torch
from families import FAMILIES, MOE, save_model, token_ids
from transformers import AutoModelForCausalLM

from budwood.checkpoints.source import open_source
from budwood.evaluation.perplexity import evaluate
from budwood.methods.method import Method
from budwood.methods.option import option
from budwood.pruning import prune
from budwood.sparsity.forecast import Forecast
from budwood.sparsity.units import places, removed
from budwood.stream.model import Model

IDS = token_ids(1, 400) % 90 + 3
CALIBRATION = {"num_samples": 4, "seq_length": 24, "compute_dtype": "float32", "sparse_products": "off"}
WITHOUT_HEADS = {
    "olmo2": "depends on others",  # a norm spans the queries of all heads
    "olmoe": "depends on others",
    "bloom": "once others are gone",  # ALiBi: the slope follows from the number of the head
}
GROUPS = {"gpt2": 4, "opt": 4, "gpt_neox": 4, "phi": 4, "falcon": 1}  # of the others: 2


@dataclass(frozen=True)
class Odd(Method):
    """Removes every second unit."""

    mask: bool = option(False, "mask the units instead")

    def forecast(self, structure):
        return {name: Forecast(shape[0] * shape[1]) for name, shape in structure.shapes.items()}

    def __call__(self, block):
        kept = {name: torch.arange(0, len(units), 2) for name, units in block.units.items()}
        if not self.mask:
            return block.keep(kept)
        with torch.no_grad():
            for name, units in block.units.items():
                for producer, rows in units.rows.items():
                    linear, gone = block.linears[producer], places(rows, removed(len(units), kept[name]))
                    if linear.bias is not None:
                        linear.bias = linear.bias.index_fill(0, gone, 0)
                    linear.weight = linear.weight.index_fill(0, gone, 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_units_of_every_family(name, tmp_path):
    save_model(name, tmp_path)
    model = Model(open_source(tmp_path))
    for block in model.blocks(IDS[:, :48].view(2, 24)):
        kinds = [units.kind for units in block.units.values()]
        heads = [units for units in block.units.values() if units.kind == "attention"]
        if name in WITHOUT_HEADS:
            assert not heads
            assert WITHOUT_HEADS[name] in " ".join(block.refused.values())
        else:
            assert len(heads) == 1
            assert len(heads[0]) == GROUPS.get(name, 2)
            assert not block.refused
        assert kinds.count("mlp") == (4 if name in MOE else 1)
        for consumer, units in block.units.items():
            weights = {linear: block.linears[linear].shape for linear in units.linears}
            assert sorted(units.columns.flatten().tolist()) == list(range(weights[consumer][1]))
            for producer, rows in units.rows.items():
                assert sorted(rows.flatten().tolist()) == list(range(weights[producer][0]))
            parameters = sum(rows * columns for rows, columns in weights.values())
            biases = sum(
                len(block.linears[producer].bias) for producer in units.rows if block.linears[producer].bias is not None
            )
            entries = sum(places.numel() for places in units.entries.values())
            assert units.cost * len(units) == parameters + biases + entries
    expected = model.structure.units
    assert all(
        set(block.units) | set(block.refused) == set(expected[block.name]) for block in model.blocks(IDS[:, :24])
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sliced_model_gives_the_answers_of_the_masked_one(name, tmp_path):
    """In the stream, loaded by plain transformers, with caches, with padding, and saved again."""
    save_model(name, tmp_path / "dense")
    report = prune(tmp_path / "dense", tmp_path / "sliced", Odd(), IDS, **CALIBRATION)
    prune(tmp_path / "dense", tmp_path / "masked", Odd(mask=True), IDS, **CALIBRATION)
    sliced = AutoModelForCausalLM.from_pretrained(tmp_path / "sliced").eval()
    masked = AutoModelForCausalLM.from_pretrained(tmp_path / "masked").eval()
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert sum(p.numel() for p in sliced.parameters()) < sum(p.numel() for p in dense.parameters())
    ids = token_ids(2, 20) % 90 + 3
    with torch.no_grad():
        expected = masked(ids).logits
        torch.testing.assert_close(sliced(ids).logits, expected, rtol=1e-4, atol=1e-4)
        padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
        mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(ids)], dim=1)
        both = [model(padded, attention_mask=mask).logits[:, 3:] for model in (sliced, masked)]
        torch.testing.assert_close(*both, rtol=1e-4, atol=1e-4)
    assert report["totals"]["density"] < 1
    again = [evaluate(str(tmp_path / "sliced"), IDS, seq_length=24, limit=3, stream=stream) for stream in (True, False)]
    assert again[0]["losses"] == pytest.approx(again[1]["losses"], rel=1e-6)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    uncached = sliced.generate(ids, use_cache=False, **options)
    assert torch.equal(sliced.generate(ids, **options), uncached)
    if name not in ("bloom", "falcon"):  # these do not take a static cache
        assert torch.equal(sliced.generate(ids, cache_implementation="static", **options), uncached)
    sliced.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(saved(ids).logits, sliced(ids).logits)
