"""What a GGUF header says of the computation is in config.json afterwards, or the file is refused; it costs little."""

import json
import math
import struct

import numpy
import pytest
import torch
from test_gguf import CONTEXT, HEADS, HIDDEN, model, write  # noqa: F401
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, PhiConfig, Qwen2Config, StableLmConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from budwood.checkpoints.gguf_header import ENTRIES, NUMBERS, Header, check_costs
from budwood.checkpoints.gguf_rope import FREQUENCIES, LONG, SHORT
from budwood.checkpoints.gguf_settings import carry_over
from budwood.checkpoints.meta_model import build
from budwood.conversion import convert
from budwood.errors import RunError, UsageError

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
SAID = {"context_length": 4096, "block_count": 4, "embedding_length": 64, "attention.head_count": 4}


def carried(config, settings, tables=()):
    """The configuration after the header's settings; a model of it is built."""
    header = Header({**SAID, **settings}, dict(tables), "m.gguf")
    carry_over(header, config, lambda changed: build(changed, torch.float32))
    build(config, torch.float32)
    return config


def llama(**fields):
    return LlamaConfig(**{**SIZES, **fields})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope.freq_base": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 1024,
                "rope.scaling.yarn_beta_fast": 16.0,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "beta_fast": 16.0},
        ),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.attn_factor": 0.5},
            {"attention_factor": 0.5 * (0.1 * math.log(4) + 1)},
        ),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {"rope_type": "default"}),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}, {"rope_type": "default"}),
    ],
)
def test_stretched_positions_are_carried_over(settings, expected):
    assert carried(llama(), settings).rope_parameters.items() >= expected.items()


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_factors_of_frequencies_become_the_rule_that_made_them(factor):
    """The table is compared with what transformers computes by the rule that is found."""
    rule = {"rope_theta": 5e5, "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0}
    rule |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = llama(rope_parameters=rule, max_position_embeddings=131072)
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 5e5 ** (torch.arange(0, 16, 2) / 16)
    said = {"rope.freq_base": 5e5, "context_length": 131072}
    found = carried(llama(), said, {FREQUENCIES: (plain / stretched).numpy()})
    assert found.rope_parameters == rule
    assert carried(llama(), said, {FREQUENCIES: numpy.ones(8)}).rope_parameters["rope_type"] == "default"
    with pytest.raises(UsageError, match="follow no known rule"):
        carried(llama(), said, {FREQUENCIES: numpy.arange(1.0, 9.0)})


def test_factors_for_long_texts_are_carried_over():
    tables = {LONG: numpy.arange(1.0, 9.0), SHORT: numpy.ones(8)}
    said = {"rope.scaling.type": "longrope", "rope.scaling.original_context_length": 1024}
    rope = carried(llama(), said, tables).rope_parameters
    assert rope["rope_type"] == "longrope"
    assert rope["long_factor"] == tables[LONG].tolist()
    assert rope["original_max_position_embeddings"] == 1024
    unknown = {**said, "rope.scaling.original_context_length": 0}
    for settings, found in (({}, tables), (unknown, tables), (said, {})):
        with pytest.raises(UsageError, match="convert it with the program that wrote it"):
            carried(llama(), settings, found)


def test_windows_caps_and_scales_are_carried_over():
    said = {
        "attention.sliding_window": 512,
        "attention.sliding_window_pattern": [True, True, True, False],
        "attn_logit_softcapping": 20.0,
        "final_logit_softcapping": 0.0,
        "attention.scale": 0.125,
    }
    found = carried(Gemma2Config(**SIZES, head_dim=16), said)
    assert found.sliding_window == 512
    assert found.layer_types == ["sliding_attention"] * 3 + ["full_attention"]
    assert (found.attn_logit_softcapping, found.final_logit_softcapping) == (20.0, None)
    assert found.query_pre_attn_scalar == 64
    assert (
        carried(
            Gemma2Config(**SIZES), {"attention.sliding_window_pattern": 2, "attention.sliding_window": 8}
        ).layer_types
        == [
            "sliding_attention",
            "full_attention",
        ]
        * 2
    )


@pytest.mark.parametrize("dimensions", [4, 8, 16])
def test_the_rotated_part_of_a_head_is_carried_over(dimensions):
    """StableLM and Phi rotate a part, which transformers takes from no GGUF file; so too the base."""
    for config in (StableLmConfig(**SIZES), PhiConfig(**SIZES)):
        found = carried(config, {"rope.dimension_count": dimensions, "rope.freq_base": 2e4})
        tables = dict(build(found, torch.float32).named_buffers())
        assert {table.shape[-1] for name, table in tables.items() if name.endswith("inv_freq")} == {dimensions // 2}
        assert found.rope_parameters["rope_theta"] == 2e4


def test_epsilons_are_carried_over_whatever_they_are_called():
    assert carried(StableLmConfig(**SIZES), {"attention.layer_norm_epsilon": 1e-3}).layer_norm_eps == 1e-3
    assert carried(llama(), {"attention.layer_norm_rms_epsilon": 1e-3}).rms_norm_eps == 1e-3


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (llama, {"attention.sliding_window": 512}),
        (llama, {"attention.scale": 0.1}),
        (llama, {"attn_logit_softcapping": 30.0}),
        (llama, {"final_logit_softcapping": 30.0}),
        (llama, {"logit_scale": 0.25}),
        (llama, {"embedding_scale": 12.0}),
        (llama, {"residual_scale": 0.2}),
        (llama, {"attention.clamp_kqv": 8.0}),
        (llama, {"attention.max_alibi_bias": 8.0}),
        (llama, {"attention.causal": False}),
        (llama, {"attention.key_length": 32}),
        (llama, {"attention.value_length": 8}),
        (llama, {"attention.head_count": 8}),
        (llama, {"attention.head_count_kv": 4}),
        (llama, {"attention.head_count_kv": [2, 2, 1, 2]}),
        (llama, {"rope.dimension_count": 12345}),
        (llama, {"rope.dimension_sections": [2, 2, 2, 2]}),
        (llama, {"rope.scaling.type": "new"}),
        (llama, {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.yarn_log_multiplier": 0.1}),
        (llama, {"something.new": 3}),
        (lambda: Qwen2Config(**SIZES), {"attention.sliding_window": 512}),
        (lambda: Gemma2Config(**SIZES), {"attention.sliding_window": 8, "attention.sliding_window_pattern": [True]}),
    ],
)
def test_what_has_no_place_is_refused_by_name(config, said):
    with pytest.raises(UsageError, match=f"m.gguf says {'|'.join(said)}"):
        carried(config(), said)


@pytest.mark.parametrize(
    "said",
    [
        {"attention.sliding_window": 0},
        {"attention.sliding_window": 4096},
        {"attention.scale": 0.25},
        {"attn_logit_softcapping": 0.0},
        {"logit_scale": 1.0},
        {"attention.causal": True},
        {"attention.key_length": 16, "attention.value_length": 16},
        {"attention.head_count_kv": [2, 2, 2, 2]},
        {"expert_count": 0},
        {"tensor_data_layout": "Meta AI original pth"},
        {"rope.scaling.finetuned": True},
    ],
)
def test_settings_that_change_nothing_are_taken(said):
    before = llama().to_dict()
    assert carried(llama(), said).to_dict() == before


def test_a_file_is_converted_with_its_settings(tmp_path, model):  # noqa: F811
    said = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    folder = convert(write(tmp_path / "m.gguf", model, say=said), tmp_path / "m")
    assert json.loads((folder / "config.json").read_text())["rope_parameters"]["factor"] == 2.0
    found, ids = AutoModelForCausalLM.from_pretrained(folder), torch.arange(40)[None]
    with torch.no_grad():
        assert not torch.equal(found(ids).logits, model(ids).logits)
    with pytest.raises(UsageError, match=r"says attention\.sliding_window = 16"):
        convert(write(tmp_path / "o.gguf", model, say={"llama.attention.sliding_window": 16}), tmp_path / "o")
    assert not (tmp_path / "o").exists()


def header(*settings, tensors=0):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(settings)) + b"".join(settings)


def setting(name, kind, content):
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + content


@pytest.mark.parametrize(
    "content",
    [
        header(setting("x", 9, struct.pack("<IQ", 0, NUMBERS + 1) + bytes(NUMBERS + 1))),  # a list of bytes
        header(*[setting(f"x{i}", 9, struct.pack("<IQ", 7, NUMBERS // 2) + bytes(NUMBERS // 2)) for i in range(3)]),
        header(setting("x", 9, struct.pack("<IQ", 8, ENTRIES + 1) + bytes(8 * 64))),
        header(setting("x", 9, struct.pack("<IQ", 12, 1 << 60))),
        header(setting("x", 8, struct.pack("<Q", 1 << 62))),
        header(setting("x", 9, struct.pack("<IQ", 9, 4) + bytes(64))),
        header(setting("x", 99, bytes(64))),
        header(tensors=1 << 40),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 40),
        b"GGUF\x03",
    ],
)
def test_a_header_that_costs_much_is_refused_before_it_is_read(tmp_path, content):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(RunError, match="truncated or damaged"):
        check_costs(tmp_path / "m.gguf")
    with pytest.raises(RunError, match="truncated or damaged"):
        convert(tmp_path / "m.gguf", tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_the_header_of_a_model_is_walked_through(tmp_path, model):  # noqa: F811
    check_costs(write(tmp_path / "m.gguf", model))
    assert HIDDEN // HEADS == 16
    assert CONTEXT
