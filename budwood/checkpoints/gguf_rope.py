"""Rotary positions of a GGUF file: base, rotated part of a head, and how they are stretched."""

import math
from collections.abc import Callable
from typing import Any

import numpy
from torch import nn
from transformers import PretrainedConfig

from budwood.checkpoints.gguf_header import Header

SCALING = "rope.scaling."
READ = (
    *("rope.dimension_count", "rope.freq_base", "rope.scale_linear"),
    *(SCALING + name for name in ("type", "factor", "original_context_length", "attn_factor", "finetuned")),
    *(SCALING + name for name in ("yarn_beta_fast", "yarn_beta_slow", "yarn_attn_factor", "yarn_ext_factor")),
)
FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
# Bounds and former contexts of published models whose files hold the resulting factors alone (Llama 3.1).
LOW, HIGH, FORMER = 1.0, 4.0, (8192, 4096, 16384)


def rope_of(header: Header, config: PretrainedConfig, build: Callable[[PretrainedConfig], nn.Module]) -> None:
    """Puts what the header says of rotary positions into `config`. Raises UsageError for what has no place there.

    build: the model of a configuration, whose tables show how much of a head is rotated.
    """
    for name in header.settings:
        if name.startswith("rope.") and name not in READ and header.settings[name] not in (0, False):
            raise header.refusal(name, "which is not read here")
    found = scaling_of(header)
    base = header.settings.get("rope.freq_base")
    parameters = getattr(config, "rope_parameters", None)
    size = header.settings.get("rope.dimension_count")
    if not isinstance(parameters, dict):
        if found or base or size:
            raise header.refusal("rope.freq_base", f"and a {type(config).__name__} has no rotary positions")
        return
    nested = isinstance(parameters.get("full_attention"), dict)
    rope = parameters["full_attention"] if nested else parameters
    if base:
        rope["rope_theta"] = base
    if found is not None:
        rope.update(found)
    carry_frequencies(header, rope, size)
    if size:
        carry_rotated_part(header, config, rope, size, build)


def scaling_of(header: Header) -> dict[str, Any] | None:
    """The fields of `rope_parameters` that stretch positions; None where they are not stretched."""
    settings = header.settings
    kind = settings.get(f"{SCALING}type", "linear")
    factor = settings.get(f"{SCALING}factor") or settings.get("rope.scale_linear") or 1.0
    former = settings.get(f"{SCALING}original_context_length")
    attention = settings.get(f"{SCALING}attn_factor") or settings.get(f"{SCALING}yarn_attn_factor")
    if kind == "none" or (kind == "linear" and factor == 1):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": float(factor)}
    if kind == "yarn":
        if settings.get(f"{SCALING}yarn_ext_factor", 1) not in (1, -1):
            raise header.refusal(f"{SCALING}yarn_ext_factor", "which transformers has no field for")
        yarn: dict[str, Any] = {"rope_type": "yarn", "factor": float(factor)}
        yarn["original_max_position_embeddings"] = former or settings.get("context_length")
        if attention and attention != 1:  # in GGUF a factor of the usual one (Peng et al., "YaRN", equation 22)
            yarn["attention_factor"] = attention * (0.1 * math.log(factor) + 1)
        names = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
        return yarn | {new: settings[SCALING + old] for old, new in names.items() if SCALING + old in settings}
    if kind == "longrope" and {LONG, SHORT} <= header.tables.keys() and former:
        return longrope(header, former, attention)
    raise header.refusal(f"{SCALING}type", "which cannot be carried over")


def longrope(header: Header, former: int, attention: float | None) -> dict[str, Any]:
    """Factors by frequency for short and long texts (Ding et al., "LongRoPE")."""
    context = header.settings.get("context_length") or former
    rope: dict[str, Any] = {
        "rope_type": "longrope",
        "long_factor": [float(factor) for factor in header.tables[LONG]],
        "short_factor": [float(factor) for factor in header.tables[SHORT]],
        "original_max_position_embeddings": former,
        "factor": context / former,
    }
    return rope | ({"attention_factor": float(attention)} if attention else {})


def carry_frequencies(header: Header, rope: dict[str, Any], size: int | None) -> None:
    """A table of factors by frequency, as Llama 3.1 has them, as the bounds that it was made from."""
    if rope.get("rope_type") != "longrope" and {LONG, SHORT} & header.tables.keys():
        scales = numpy.concatenate([header.tables[name] for name in (LONG, SHORT) if name in header.tables])
        if not numpy.allclose(scales, 1):
            raise header.refusal(f"{SCALING}type", f"and has the table {LONG}")
    factors = header.tables.get(FREQUENCIES)
    if factors is None or numpy.allclose(factors, 1):
        return
    factor, theta = float(numpy.max(factors)), float(rope.get("rope_theta", 10000.0))
    written = header.settings.get(f"{SCALING}original_context_length")
    for former in (*((written,) if written else ()), *FORMER):
        expected = llama3_factors(len(factors), theta, factor, former)
        if rope.get("rope_type", "default") == "default" and numpy.allclose(factors, expected, rtol=1e-3):
            rope.update(
                rope_type="llama3",
                factor=factor,
                low_freq_factor=LOW,
                high_freq_factor=HIGH,
                original_max_position_embeddings=former,
            )
            return
    raise header.refusal(f"{SCALING}type", f"and has the table {FREQUENCIES}, whose factors follow no known rule")


def llama3_factors(count: int, theta: float, factor: float, former: int) -> Any:
    """What each of `count` frequencies is divided by.

    1 from `HIGH` turns in the former context on, `factor` up to `LOW`, between them a mean (Llama 3.1, `rope_scaling`).
    """
    wavelengths = 2 * math.pi * theta ** (numpy.arange(count) / count)
    turns = former / wavelengths
    smooth = numpy.clip((turns - LOW) / (HIGH - LOW), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def carry_rotated_part(
    header: Header,
    config: PretrainedConfig,
    rope: dict[str, Any],
    size: int,
    build: Callable[[PretrainedConfig], nn.Module],
) -> None:
    """How many dimensions of a head are rotated, compared with the tables of the model."""
    if size in rotated(build(config)):
        return
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope["partial_rotary_factor"] = size / head
    if hasattr(config, "partial_rotary_factor"):
        config.partial_rotary_factor = size / head
    found = rotated(build(config))
    if size not in found:
        raise header.refusal("rope.dimension_count", f"and the model rotates {sorted(found)} dimensions of a head")


def rotated(model: nn.Module) -> set[int]:
    """Dimensions of a head that a model rotates."""
    return {2 * table.shape[-1] for name, table in model.named_buffers() if name.endswith("inv_freq")}
