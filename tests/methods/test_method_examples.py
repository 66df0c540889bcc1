"""Every method on a block made of tensors: the worked examples, and the promises of each text."""

import logging
from types import SimpleNamespace

import pytest
import torch
from stand_in import Block, random_block

from budwood.checkpoints.work import Work
from budwood.errors import RunError, UsageError
from budwood.methods import METHODS, parse_method
from budwood.sparsity import scores
from budwood.sparsity.patterns import NM
from budwood.sparsity.second_order import factorise, sparsegpt

WEIGHT = torch.tensor(
    [
        [0.75, -0.125, 0.5, 0.375, -0.375, 0.875, -0.625, 0.5],
        [-0.5, 0.3125, 0.75, -0.625, 0.125, -0.875, 0.375, 1.0],
    ]
)
SEQUENCES = [
    torch.tensor([[1.0, 4, 2, 3, 5, 1, 2, 3], [0.0] * 8]),
    torch.tensor([[0.0, 0, 0, 0, 4, 1, 0, 3], [1, 4, 2, 3, 3, 0, 2, 0]]),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TEXTS = [
    "magnitude",
    'magnitude("2:4")',
    "wanda",
    'wanda("4:8")',
    'wanda("2:4", tie="low-prunes")',
    "wanda(variant=True)",
]
TEXTS += ["sparsegpt", 'sparsegpt("2:4")', "sparsegpt(published=True, block=16)", "sparsegpt(mask=wrp())"]
TEXTS += [
    "wrp",
    "wrp(alpha=0.5)",
    'wrp(metric="obs")',
    'wrp(metric="magnitude")',
    'wrp(scope="matrix")',
    "wrp(density=0.02)",
]
TEXTS += [
    'wrp(density=0.03, scope="matrix")',
    'wrp(alpha=0.4, budget="row")',
    "wrp(block=8, k=1)",
    "wrp(block=8, density=0.5)",
]
TEXTS += ['wrp(pattern="4:8", alpha=0.4)', "wrp(block=24, k=1, pad=True)"]
FITTED = ["refit(wrp(alpha=0.4))", 'alps("2:4")', 'alps("40%")', 'graft(allocate="uniform")']
TEXTS += [*FITTED, 'graft(bits=9, pattern="free", allocate="uniform")']
CHANGING = ("sparsegpt", "refit", "alps", "graft")  # change the weights that stay


def example(dtype):
    return Block({"fc": WEIGHT.to(dtype)}, {"fc": SEQUENCES})


def kept(linear):
    return [row.nonzero().flatten().tolist() for row in linear.stored]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('wanda("2:4")', [[2, 3, 4, 7], [2, 3, 5, 7]]),
        ('wanda("4:8")', [[3, 4, 6, 7], [1, 2, 3, 7]]),
        ("wanda", [[3, 4, 6, 7], [1, 2, 3, 7]]),
        ('magnitude("2:4")', [[0, 2, 5, 6], [2, 3, 5, 7]]),
        ("magnitude", [[0, 2, 5, 6], [2, 3, 5, 7]]),
        ('magnitude(scope="row")', [[0, 2, 5, 6], [2, 3, 5, 7]]),
        ("wrp(alpha=0)", [[2, 3, 4, 7], [2, 3, 5, 7]]),
        ("wrp(alpha=0.25)", [[2, 3, 4, 7], [2, 3, 5, 7]]),
        ("wrp(alpha=0.375)", [[2, 3, 4, 6, 7], [2, 3, 5, 7]]),
        ("wrp(alpha=0.5)", [[2, 3, 4, 6, 7], [1, 2, 3, 5, 7]]),
        ("wrp(alpha=0.75)", [[2, 3, 4, 5, 6, 7], [1, 2, 3, 5, 6, 7]]),
        ("wrp(alpha=1)", [list(range(8))] * 2),
    ],
)
def test_the_worked_masks_in_every_dtype(dtype, text, expected):
    block = example(dtype)
    parse_method(text)(block)
    linear = block.linears["fc"]
    assert kept(linear) == expected
    assert linear.stored.dtype == dtype
    assert torch.equal(linear.stored[linear.stored != 0], WEIGHT.to(dtype)[linear.stored != 0])  # values are copies
    if text.startswith("wrp"):
        assert linear.recovered == sum(map(len, expected)) - 8


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_forecast_is_what_remains(text, dtype):
    method, block = parse_method(text), random_block(dtype)
    shapes = {linear.name: linear.shape for linear in block.linears.values()}
    method.check(shapes)
    forecasts = method.forecast(SimpleNamespace(shapes=shapes))
    method(block)
    for linear in block.linears.values():
        forecast, size = forecasts[linear.name], linear.stored.numel()
        count = int((linear.stored != 0).sum())
        # Exact where the method fixes a number, else a law of chance or a search. A weight may round to 0.
        assert count == pytest.approx(forecast.nonzeros, abs=0.05 * size if "wrp" in text or "variant" in text else 2)
        assert linear.stored.isfinite().all()
        if text.startswith("wrp") and "4:8" not in text:
            assert linear.recovered == count - size // 2
    assert block.passes == (0 if "magnitude" in text else 1)


@pytest.mark.parametrize(
    "text", ['wrp(density=0.03, scope="matrix")', 'wrp(alpha=0.4, budget="row")', "wrp(block=8, k=1)"]
)
def test_fixed_counts_are_forecast_exactly(text):
    method, block = parse_method(text), random_block()
    method(block)
    for linear in block.linears.values():
        assert int((linear.stored != 0).sum()) == method.forecast_matrix(linear.shape).nonzeros
        assert linear.recovered == method.forecast_matrix(linear.shape).recovered


@pytest.mark.parametrize("name", METHODS)
def test_only_magnitude_methods_need_no_text(name):
    assert METHODS[name].calibrated == (name not in ("magnitude", "magnitude_sp", "dense"))
    assert not parse_method('wrp(metric="magnitude")').calibrated


@pytest.mark.parametrize("text", [text for text in TEXTS if not text.startswith(CHANGING)])
def test_kept_weights_are_unchanged_and_no_zero_is_negative(text):
    block, dense = random_block(torch.bfloat16), random_block(torch.bfloat16)
    parse_method(text)(block)
    for name, linear in block.linears.items():
        stays = linear.stored != 0
        assert torch.equal(linear.stored[stays], dense.linears[name].stored[stays])
        assert not torch.signbit(linear.stored[~stays]).any()


@pytest.mark.parametrize("text", ["wanda", "sparsegpt"])
def test_linears_in_one_sweep_equal_each_alone(text):
    block = random_block()
    parse_method(f'{text}("2:4")')(block)
    for name in block.linears:
        alone = random_block()
        alone.linears = {name: alone.linears[name]}
        parse_method(f'{text}("2:4")')(alone)
        torch.testing.assert_close(block.linears[name].stored, alone.linears[name].stored)


def test_sparsegpt_is_the_sweep_over_the_second_moments():
    block, dense = random_block(), random_block()
    parse_method("sparsegpt(block=16)")(block)
    x = torch.cat(dense.inputs["down"]).double()
    swept = sparsegpt(
        dense.linears["down"].stored,
        factorise(x.T @ x, 0.01),
        parse_method("sparsegpt").pattern_for((1, 1), ""),
        16,
    )
    torch.testing.assert_close(block.linears["down"].stored, swept.weight.float(), rtol=1e-4, atol=1e-5)


def test_a_mask_from_another_method_is_kept_and_repaired(tmp_path):
    chosen, repaired, dense = random_block(), random_block(), random_block()
    parse_method("wrp(alpha=0.4)")(chosen)
    method = parse_method("sparsegpt(mask=wrp(alpha=0.4))")
    method.prepare(None, None, Work(tmp_path))(repaired)
    for name, linear in repaired.linears.items():
        assert torch.equal(linear.stored != 0, chosen.linears[name].stored != 0)
        assert linear.recovered == chosen.linears[name].recovered
        x, original = torch.cat(dense.inputs[name]), dense.linears[name].stored
        error = lambda weight, x=x, original=original: float((x @ (weight - original).T).norm())
        assert error(linear.stored) < error(chosen.linears[name].stored)


@pytest.mark.parametrize(
    "text", ["wanda", 'wanda("2:4")', "sparsegpt", 'sparsegpt("2:4")', "sparsegpt(mask=wanda())", "wrp"]
)
def test_an_expert_without_tokens_is_pruned_by_magnitude(text, caplog):
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    block = Block({"experts.3": weight, "experts.4": weight}, {"experts.3": [], "experts.4": [torch.randn(30, 16)]})
    by_magnitude = Block({"experts.3": weight}, {"experts.3": []})
    with caplog.at_level(logging.WARNING):
        parse_method(text)(block)
    assert "model.layers.7.experts.3: no calibration token reached it" in caplog.text
    assert "experts.4" not in caplog.text
    method = parse_method(text)
    pattern = (getattr(method, "mask", None) or method).pattern_for((6, 16), "")
    by_magnitude.linears["experts.3"].weight = weight * pattern.keep(scores.magnitude(weight))
    assert torch.equal(block.linears["experts.3"].stored, by_magnitude.linears["experts.3"].stored)


@pytest.mark.parametrize("text", ["wanda", "sparsegpt", "wrp", 'wrp(metric="obs")'])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_calibration_that_is_not_finite_names_the_linear(text, value):
    block = random_block()
    block.inputs["o"][1][5, 3] = value
    with pytest.raises(RunError, match=r"model\.layers\.7\.o: 1 of 32 input features"):
        parse_method(text)(block)


def test_scores_that_cannot_be_ranked_name_the_linear():
    block = random_block()
    block.linears["k"].stored[2, 2] = float("nan")
    for text in ("magnitude", "wanda", "wrp", 'sparsegpt("2:4")', "sparsegpt"):
        with pytest.raises(RunError, match=r"model\.layers\.7\..*k"):
            parse_method(text)(block)


@pytest.mark.parametrize(
    "text", ['magnitude("2:4")', 'wanda("2:4")', 'sparsegpt("2:4")', "wrp", 'sparsegpt(mask=wanda("2:4"))']
)
def test_widths_are_checked_by_name_beforehand(text):
    method = parse_method(text)
    method.check({"model.layers.0.q_proj": (6, 8)})
    with pytest.raises(
        UsageError, match=r"model\.layers\.0\.fc: 2:4 needs the inputs to divide by 4, got 10; .*--skip"
    ):
        method.check({"model.layers.0.q_proj": (6, 8), "model.layers.0.fc": (8, 10)})
    parse_method("sparsegpt").check({"model.layers.0.fc": (8, 10)})


def test_block_sides_are_checked_beforehand():
    with pytest.raises(UsageError, match="use block=32"):
        parse_method("wrp(block=64, k=2)").check({"model.layers.0.q": (288, 288)})
    parse_method("wrp(block=64, k=2, pad=True)").check({"model.layers.0.q": (288, 288)})


def test_alphas_by_name():
    method = parse_method("wrp(alpha={'down': 0.5, 'q|k': 0})")
    block = random_block()
    method.check({linear.name: linear.shape for linear in block.linears.values()})
    method(block)
    reference = {name: random_block() for name in ("0.5", "0", "0.25")}
    for alpha, other in reference.items():
        parse_method(f"wrp(alpha={alpha})")(other)
    for name, alpha in {"down": "0.5", "q": "0", "k": "0", "v": "0.25", "o": "0.25"}.items():
        assert torch.equal(block.linears[name].stored, reference[alpha].linears[name].stored)
    assert (
        method.forecast_matrix((64, 64), "model.layers.0.down").nonzeros
        > method.forecast_matrix((64, 64), "model.layers.0.q").nonzeros
    )
    with pytest.raises(UsageError, match="'down' is found in no linear's name"):
        method.check({"model.layers.0.q": (8, 8)})


def test_sparsegpt_warns_when_damping_grows(caplog):
    batches = [torch.ones(4, 8)]  # one direction only: singular without damping
    block = Block({"fc": torch.randn(4, 8)}, {"fc": batches})
    with caplog.at_level(logging.WARNING):
        parse_method("sparsegpt(damp=0)")(block)
    assert "model.layers.7.fc: damping 0 was too small; 0.1 was used" in caplog.text
    assert block.linears["fc"].stored.isfinite().all()


def test_magnitude_is_idempotent_and_blind_to_sign():
    for text in ("magnitude", 'magnitude("2:4")', 'magnitude(scope="row")'):
        once, turned = random_block(), random_block()
        for linear in turned.linears.values():
            linear.stored = -linear.stored
        parse_method(text)(once)
        parse_method(text)(turned)
        first = {name: linear.stored for name, linear in once.linears.items()}
        parse_method(text)(once)
        for name in first:
            assert torch.equal(once.linears[name].stored, first[name])
            assert torch.equal(turned.linears[name].stored, -first[name])


def test_any_batches_give_the_same_masks():
    whole, parts = random_block(), random_block()
    for key in ("q", "o", "down"):
        merged = [torch.cat(whole.inputs[key])]
        same = [name for name, batches in whole.inputs.items() if batches is whole.inputs[key]]
        whole.inputs |= dict.fromkeys(same, merged)
    for text in ('wanda("2:4")', "wrp(alpha=0.4)"):
        parse_method(text)(whole)
        parse_method(text)(parts)
        for name, linear in whole.linears.items():
            assert torch.equal(linear.stored, parts.linears[name].stored)
            assert isinstance(parse_method('wanda("2:4")').pattern_for(linear.shape, name), NM)
