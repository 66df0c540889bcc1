"""matched: the error of a block falls, zeros and shapes stay, only what is asked for moves, and results repeat."""

import logging
import shutil

import pytest
import torch
from families import save_model, token_ids
from safetensors.torch import load_file

from budwood.checkpoints.loading import load
from budwood.checkpoints.source import open_source
from budwood.errors import UsageError
from budwood.methods import parse_method
from budwood.pruning import prune
from budwood.stream.model import Model
from budwood.training.move import norms

OPTIONS = {
    "seq_length": 24,
    "compute_dtype": "float32",
    "sparse_products": "off",
    "attention": "fused",
    "format": "dense",
}
IDS = token_ids(8) % 90 + 3
SPARSE, STRUCTURED = 'wanda("50%")', "llm_pruner(drop=0.5)"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for family in ("llama", "opt"):
        save_model(family, root / family)
    return root


def tensors(folder):
    """All tensors of the blocks of a folder, dense, by full name."""
    return {name: tensor.detach() for name, tensor in load(folder).state_dict().items() if "layers." in name}


def kind_of(name, weight):
    if "norm" in name:
        return "norm's bias" if name.endswith("bias") else "norms"
    return "weights" if weight.dim() == 2 else "biases"


@pytest.mark.parametrize("inner", [SPARSE, 'magnitude("2:4")', STRUCTURED])
def test_the_error_of_the_first_block_falls(folders, tmp_path, inner):
    """In later blocks the targets differ with what comes before."""
    errors = []
    for count, method in enumerate((inner, f"matched({inner}, steps=40, rate=0.01)")):
        report = prune(folders / "llama", tmp_path / str(count), method, IDS, **OPTIONS)
        errors.append(report["blocks"][0]["relative_error"])
    assert errors[0] is None or errors[1] < 0.8 * errors[0]
    assert errors[1] > 0


@pytest.mark.parametrize("inner", [SPARSE, "wrp(alpha=0.5)"])
def test_zeros_stay_zeros_and_kept_weights_move(folders, tmp_path, inner):
    before, after = (
        first_block(folders / "opt", tmp_path / name, method)
        for name, method in (("inner", inner), ("matched", f"matched({inner}, steps=4)"))
    )
    for name, weight in before.items():
        if weight.dim() == 2:
            assert torch.equal(after[name] != 0, weight != 0), name
            assert not torch.equal(after[name], weight)
            assert not after[name][after[name] == 0].signbit().any()  # no -0.0


def first_block(source, target, method, **options):
    prune(source, target, method, IDS, **{**OPTIONS, **options})
    return {name: tensor for name, tensor in tensors(target).items() if "layers.0." in name}


@pytest.mark.parametrize("move", ["weights", "biases", "norms", "weights+norms", "biases+norms"])
def test_only_what_is_asked_for_moves(folders, tmp_path, move):
    before = first_block(folders / "opt", tmp_path / "inner", SPARSE)
    after = first_block(folders / "opt", tmp_path / "matched", f'matched({SPARSE}, steps=3, move="{move}")')
    moved = {kind_of(name, weight) for name, weight in before.items() if not torch.equal(after[name], weight)}
    asked = set(move.split("+"))
    assert moved == asked | ({"norm's bias"} if asked & {"norms", "biases"} else set())


def test_biases_that_are_zero_move_too(tmp_path):
    def without(model):
        for name, parameter in model.named_parameters():
            if name.endswith("proj.bias"):
                parameter.data.zero_()

    save_model("opt", tmp_path / "dense", change=without)
    after = first_block(tmp_path / "dense", tmp_path / "out", f'matched({SPARSE}, steps=3, move="biases")')
    assert all(value.any() for name, value in after.items() if name.endswith("v_proj.bias"))


def test_nothing_to_move_changes_nothing_and_is_told(folders, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="budwood"):
        found = first_block(folders / "llama", tmp_path / "out", f'matched({SPARSE}, move="biases")')
    assert "has no biases, so nothing of it moves" in caplog.text
    inner = first_block(folders / "llama", tmp_path / "inner", SPARSE)
    assert all(torch.equal(found[name], value) for name, value in inner.items())


@pytest.mark.parametrize("move", ["weights+biases+norms", "norms"])
def test_sliced_blocks_keep_their_shapes(folders, tmp_path, move):
    alone = first_block(folders / "opt", tmp_path / "inner", STRUCTURED)
    found = first_block(folders / "opt", tmp_path / "out", f'matched({STRUCTURED}, steps=3, move="{move}")')
    dense = {name: tensor.shape for name, tensor in tensors(folders / "opt").items()}
    assert {name: value.shape for name, value in found.items()} == {n: value.shape for n, value in alone.items()}
    assert any(value.shape != dense[name] for name, value in found.items())
    assert any(not torch.equal(value, alone[name]) for name, value in found.items())


@pytest.mark.parametrize(
    ("inner", "target"),
    [(SPARSE, '"pruned"'), (SPARSE, "0.5"), (SPARSE, '"dense"'), (STRUCTURED, "0.5")],
)
def test_a_killed_run_continues_to_the_same_bytes(folders, tmp_path, inner, target):
    """Stored in bfloat16, so that norms and biases are rounded as well."""
    method, options = f"matched({inner}, steps=3, target={target})", {**OPTIONS, "dtype": "bfloat16", "format": "auto"}
    prune(folders / "opt", tmp_path / "whole", method, IDS, **options)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shards = sorted((tmp_path / "cut").glob("*.safetensors"))
    for shard in (shards[0], *shards[2:]):
        shard.unlink()
    for name in ("config.json", "report.json"):
        (tmp_path / "cut" / name).unlink()
    prune(folders / "opt", tmp_path / "cut", method, IDS, **options)
    for shard in shards:
        assert shard.read_bytes() == (tmp_path / "whole" / shard.name).read_bytes(), shard.name


def test_targets_are_the_same_in_the_first_block_only(folders, tmp_path):
    def weights(target):
        prune(folders / "llama", tmp_path / target, f'matched({SPARSE}, target="{target}")', IDS, **OPTIONS)
        return tensors(tmp_path / target)

    pruned, dense = weights("pruned"), weights("dense")
    for name, value in pruned.items():
        assert torch.equal(value, dense[name]) == ("layers.0." in name), name


def test_a_mix_lies_between_both_targets(folders):
    """The mixed target itself, for a block whose inputs differ from the dense ones."""
    ids = token_ids(4)
    steps = [
        parse_method(f'matched(magnitude("50%"), target={target})').prepare(
            Model(open_source(folders / "llama")), ids, None
        )
        for target in (0.0, 0.25, 1.0)
    ]
    for block in Model(open_source(folders / "llama")).blocks(ids):
        for step in steps:
            step.block_fit.before(block)
        own, mixed, dense = (step.block_fit._targets(block) for step in steps)
        torch.testing.assert_close(mixed, torch.lerp(own, dense, 0.25))
        assert torch.allclose(own, dense, atol=1e-5) == (block.index == 0)
        parse_method('magnitude("50%")')(block)


def test_graft_fits_by_the_same_code(folders, tmp_path):
    graft = 'graft(bits=9.75, allocate="uniform", rounds=4'
    one = first_block(folders / "llama", tmp_path / "one", f'{graft}, steps=3, rate=0.01, target="dense")')
    two = first_block(folders / "llama", tmp_path / "two", f'matched({graft}), steps=3, rate=0.01, target="dense")')
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_norms_are_found_without_names(folders):
    block = next(Model(open_source(folders / "opt")).blocks())
    assert list(norms(block.module)) == [
        f"{name}.{part}" for name in ("self_attn_layer_norm", "final_layer_norm") for part in ("weight", "bias")
    ]


def test_the_written_file_holds_what_moved(folders, tmp_path):
    prune(folders / "llama", tmp_path / "out", f'matched({SPARSE}, move="norms")', IDS, **OPTIONS)
    written = {
        name: value for file in (tmp_path / "out").glob("*.safetensors") for name, value in load_file(file).items()
    }
    dense = load_file(folders / "llama" / "model.safetensors")
    names = [name for name in dense if name.endswith("layernorm.weight")]
    assert names
    assert not any(torch.equal(written[name], dense[name]) for name in names)
    assert torch.equal(written["model.norm.weight"], dense["model.norm.weight"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("matched(3)", "matched needs a method such as"),
        ("matched", "matched needs inner"),
        ("matched(wanda(), steps=0)", "steps must be"),
        ("matched(wanda(), rate=2)", "rate must be"),
        ("matched(wanda(), target=2)", "target must be a number"),
        ('matched(wanda(), target="own")', "target must be one of 'pruned', 'dense'"),
        ('matched(wanda(), move="heads")', "move names some of weights, biases, norms"),
        ('matched(wanda(), move="norms+norms")', "move names some of"),
        ('matched(wanda(), move="")', "move names some of"),
        ('matched(wanda(), loss="cross")', "loss must be one of"),
        ("matched(wanda(), tokens=0)", "tokens must be"),
        ('graft(steps=2, move="heads")', "move names some of"),
    ],
)
def test_invalid_options_are_refused(text, reason):
    with pytest.raises(UsageError, match=reason):
        parse_method(text)
