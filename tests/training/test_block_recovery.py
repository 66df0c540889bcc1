"""The fit of one block: the published program's tensors, errors that fall, blocks that stay."""

import pytest
import reference
import torch

from budwood.checkpoints.source import open_source
from budwood.methods.magnitude import Magnitude
from budwood.stream.model import Model
from budwood.training import block_recovery
from budwood.training.block_recovery import BlockRecovery, outputs_of, recover_block
from budwood.training.descent import Descent
from budwood.training.move import parse_move

MOVES = {
    "bias_ln": "biases+norms",
    "bn+mask_lora": "biases+norms+masklora",
    "bn+lora_prune": "biases+norms+loraprune",
    "bn+scale_lora": "biases+norms+scalelora",
    "FullFT": "biases+norms+weights",
}
LIMIT = 2**30


def error(block, targets):
    """The mean squared error over all windows."""
    with torch.no_grad():
        pairs = [(block.run(batch), targets.read(batch, "cpu")) for batch in block.activations.indices()]
    return float(torch.cat([(one - other).square().flatten() for one, other in pairs]).mean())


@pytest.mark.parametrize("mode", MOVES)
@pytest.mark.parametrize("name", ["tiny-opt", "tiny-mha"])
def test_agrees_with_the_published_program(name, mode, monkeypatch):
    """Errors of every block, the last one before merging; for tiny-opt all tensors, but for the noise on key biases."""
    case = f"{name}.magnitude.2:4.{mode}.20"
    record = reference.record("perp/perp")["reconstruct"][case]
    held = reference.tensors("perp/perp")
    model = Model(open_source(reference.model(name)))
    descent = Descent(steps=20, rate=5e-3, clip=None)
    recovery = BlockRecovery(parse_move(MOVES[mode], rank=2, alpha=4), descent, batch=1, hold_out=False)
    before, trained, after, states = [], [], [], {}
    real = block_recovery.apply

    def apply(block, move, values):
        trainable = block_recovery.trainable_of(block, recovery)
        trainable.load(values)
        with trainable.attached():
            trained.append(error(block, block_targets[-1]))
        real(block, move, values)

    monkeypatch.setattr(block_recovery, "apply", apply)
    block_targets = []
    ids = reference.tokens() % (128 if name == "tiny-opt" else 256)
    for block in model.blocks(ids):
        targets = outputs_of(block, LIMIT)
        Magnitude("2:4")(block)
        zeros = {key: linear.stored == 0 for key, linear in block.linears.items()}

        block_targets.append(targets)
        before.append(error(block, targets))
        start = {}
        for key, value in held.items():
            found = key.removeprefix(f"reconstruct.{case}/initial_A/{block.index}.")
            if found != key:
                linear = found.removesuffix(".lora_layer.lora_A.default.weight")
                start[f"{block.name}.{linear}.weight:A"] = value
        recover_block(block, targets, recovery, start)
        after.append(error(block, targets))
        for key, linear in block.linears.items():
            assert torch.equal(linear.stored == 0, zeros[key])
            assert not torch.signbit(linear.stored[zeros[key]]).any()
        states |= {key: value.clone() for key, value in block.state(torch.float32).items()}
    for index, (first, last) in enumerate(record["losses_initial_final"]):
        assert before[index] == pytest.approx(first, rel=1e-4)
        assert trained[index] == pytest.approx(last, rel=1e-4)
        if mode != "bn+lora_prune":
            assert after[index] == pytest.approx(last, rel=1e-4)
        else:
            assert after[index] > 1.02 * last  # it jumps
    for key, total in record["weight_abs_sums"].items():
        if key in states and not key.endswith("k_proj.bias"):
            assert float(states[key].abs().sum()) == pytest.approx(total, rel=1e-4)
    expected = {
        key.partition("/after/")[2]: t for key, t in held.items() if key.startswith(f"reconstruct.{case}/after")
    }
    assert bool(expected) == (name == "tiny-opt" and mode in ("bias_ln", "bn+mask_lora"))
    for key, value in expected.items():
        if not key.endswith("k_proj.bias"):
            torch.testing.assert_close(states[key], value, rtol=1e-4, atol=1e-4)


def test_a_block_that_gets_no_better_stays():
    model = Model(open_source(reference.model("tiny-opt")))
    descent = Descent(steps=10, rate=1.0, clip=None)  # far too high
    for block in model.blocks(reference.tokens() % 128):
        targets = outputs_of(block, LIMIT)
        Magnitude("2:4")(block)
        before = {key: value.clone() for key, value in block.state(torch.float32).items()}
        curve, _ = recover_block(block, targets, BlockRecovery(parse_move("biases+norms+masklora"), descent))
        assert curve.best == 0
        assert all(torch.equal(value, before[key]) for key, value in block.state(torch.float32).items())
        break


def test_the_held_out_error_falls():
    model = Model(open_source(reference.model("tiny-mha")))
    for block in model.blocks(reference.tokens()):
        targets = outputs_of(block, LIMIT)
        Magnitude("2:4")(block)
        move = parse_move("biases+norms+masklora", rank=4)
        curve, count = recover_block(block, targets, BlockRecovery(move, Descent(30, 5e-3, clip=None), batch=2))
        losses = [loss for _, loss in curve.held]
        assert min(losses) < losses[0]
        assert count == 4 * 4 * 128 + 3 * 4 * 224 + 2 * 64
        break
