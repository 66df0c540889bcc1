"""The predictions of `plan`: the published sizes of pruned models."""

import json
import math

import pytest
import torch
from families import UNSPLIT, save_model, token_ids
from safetensors.torch import load_file, save_file

from budwood.errors import RunError, UsageError
from budwood.planning import plan
from budwood.pruning import prune

GIB = 2**30
OPT = {"1.3B": (2048, 24), "2.7B": (2560, 32), "6.7B": (4096, 32), "13B": (5120, 40), "30B": (7168, 48)}
# Table 3 of the WRP paper: dense, 2:4, WRP at alpha 0.25 (a density of 1.5 %), printed in GB.
TABLE_3 = {
    "1.3B": ("2.5", "1.5", "1.6"),
    "2.7B": ("5.0", "2.9", "3.2"),
    "6.7B": ("13", "7.2", "7.7"),
    "13B": ("24", "14", "15"),
    "30B": ("56", "32", "35"),
}
# Table 7: blocks of 32, nominal density 6.25 % and 12.5 %, one constant k a model.
TABLE_7 = {
    "1.3B": (4, "1.6", "1.7"),
    "2.7B": (5, "3.2", "3.4"),
    "6.7B": (8, "7.8", "8.3"),
    "13B": (10, "15", "16"),
    "30B": (14, "35", "37"),
}
# At the published density of alpha 0.25, 1.5408 %.
LLAMA_2 = {  # hidden, MLP, blocks, heads, key-value heads; parameters; GiB dense, WRP at 1.54 %, 2:4 alone
    "7B": ((4096, 11008, 32, 32, 32), 6_738_415_616, (12.551, 7.837, 7.274)),
    "13B": ((5120, 13824, 40, 40, 40), 13_015_864_320, (24.244, 15.005, 13.905)),
    "70B": ((8192, 28672, 80, 64, 8), 68_976_648_192, (128.479, 78.616, 72.698)),
}


@pytest.fixture(scope="module")
def opt_config(tmp_path_factory):
    from transformers import OPTConfig

    def write(size):
        hidden, blocks = OPT[size]
        config = OPTConfig(
            vocab_size=50272,
            hidden_size=hidden,
            num_hidden_layers=blocks,
            ffn_dim=4 * hidden,
            num_attention_heads=32,
            max_position_embeddings=2048,
            word_embed_proj_dim=hidden,
            dtype="float16",
        )
        file = tmp_path_factory.mktemp(f"opt-{size}") / "config.json"
        file.write_text(json.dumps(config.to_dict()))
        return file

    return write


def printed(nbytes):
    """Two digits, rounded up, in units of 2**30 bytes: as file listings and the paper's tables print."""
    size = nbytes / GIB
    return f"{math.ceil(size)}" if size > 10 else f"{math.ceil(size * 10) / 10:.1f}"


@pytest.mark.parametrize("size", OPT)
def test_table_3(opt_config, size):
    file = opt_config(size)
    wrp = plan(file, "wrp(density=0.015)", format="two_four_csr")
    two_four = plan(file, 'wanda("2:4")', format="two_four")
    assert (
        printed(wrp["bytes_dense"]),
        printed(two_four["bytes_after"]),
        printed(wrp["bytes_after"]),
    ) == TABLE_3[size]


@pytest.mark.parametrize("size", OPT)
def test_table_7(opt_config, size):
    k, sparse, dense = TABLE_7[size]
    file = opt_config(size)
    found = [plan(file, f"wrp(block=32, k={k * times})", format="two_four_ell")["bytes_after"] for times in (1, 2)]
    assert [printed(nbytes) for nbytes in found] == [sparse, dense]


@pytest.mark.parametrize("size", LLAMA_2)
def test_llama_2_sizes(tmp_path, size):
    from transformers import LlamaConfig

    (hidden, wide, blocks, heads, shared), parameters, (dense, wrp, two_four) = LLAMA_2[size]
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        dtype="float16",
        tie_word_embeddings=False,
    )
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    planned = plan(tmp_path / "config.json", "wrp(density=0.015408)", format="two_four_csr")
    assert planned["parameters"] == parameters
    alone = plan(tmp_path / "config.json", 'wanda("2:4")', format="two_four")
    sizes = (planned["bytes_dense"], planned["bytes_after"], alone["bytes_after"])
    assert [round(nbytes / GIB, 3) for nbytes in sizes] == pytest.approx([dense, wrp, two_four], abs=0.0006)


def test_a_format_that_cannot_hold_the_result_is_refused(opt_config):
    with pytest.raises(UsageError, match="two_four cannot hold"):
        plan(opt_config("1.3B"), "wrp(alpha=0.25)", format="two_four")


def test_a_width_that_the_group_does_not_divide_is_refused_with_the_layer(opt_config):
    with pytest.raises(UsageError, match=r"model\.decoder\.layers\.0\..*--skip"):
        plan(opt_config("1.3B"), 'magnitude("2:5")')


@pytest.mark.parametrize("where", ["folder", "config.json"])
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_quantised_sources_are_refused_as_prune_refuses_them(tmp_path, where, key):
    save_model("llama", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, key: {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(UsageError, match="is stored with 'gptq'"):
        plan(file if where == "config.json" else file.parent, "wanda()")
    with pytest.raises(UsageError, match="is stored with 'gptq'"):
        prune(file.parent, tmp_path / "out", 'magnitude("2:4")')


def change_tensors(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def test_sources_that_lack_tensors_or_hold_bytes_are_refused_as_prune_refuses_them(tmp_path):
    def without(tensors):
        del tensors["model.layers.2.mlp.down_proj.weight"]

    def narrow(tensors):
        tensors |= {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}

    for name, change, error, sentence in (
        ("without", without, RunError, "lacks model.layers.2.mlp.down_proj.weight"),
        ("narrow", narrow, UsageError, "holds weights in float8_e4m3fn"),
    ):
        save_model("llama", tmp_path / name)
        change_tensors(tmp_path / name, change)
        for verb in (
            lambda: plan(tmp_path / name, "wanda()"),  # noqa: B023
            lambda: prune(tmp_path / name, tmp_path / "out", 'magnitude("2:4")'),  # noqa: B023
        ):
            with pytest.raises(error, match=sentence):
                verb()


@pytest.mark.parametrize("name", UNSPLIT)
def test_experts_that_cannot_be_split_stay_dense_and_plan_says_so(tmp_path, name):
    """What plan accepts, prune does, with a forward pass."""
    save_model(name, tmp_path / "model", dtype=torch.bfloat16)
    predicted = plan(tmp_path / "model", "wanda('2:4')")
    options = {"num_samples": 2, "seq_length": 24, "compute_dtype": "float32"}
    report = prune(tmp_path / "model", tmp_path / "out", "wanda('2:4')", token_ids(1, 100) % 90 + 3, **options)
    assert any("experts that stay dense" in note for note in predicted["notes"])
    assert any("experts that stay dense" in note for note in report["notes"])
    assert "router" in predicted["skipped"]
    assert report["totals"]["bytes"] == pytest.approx(predicted["bytes_after"], rel=0.01)
