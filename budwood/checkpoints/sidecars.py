"""The small JSON files beside the weights, read in one way: bounded, whole, an object, of the right types."""

import json
from pathlib import Path
from typing import Any

from budwood.checkpoints.schema import (
    COUNT,
    FILE_NAME,
    MATRIX,
    NONE,
    NUMBER,
    PAIR,
    POSITIVE,
    SHAPE,
    Each,
    fault,
    shown,
)
from budwood.errors import BudwoodError, RunError, UsageError

LARGEST_FILE = 256 * 2**20  # bytes; an index of a very large model with experts one by one has some 30 MB
FORMAT_VERSION = 1  # of `quantization_config`
SIZES = ("_heads", "n_head", "head_dim", "hidden_size", "n_embd")  # what names of heads and widths end with
# How many experts a block has, and how many of them a token chooses.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k")
# What the kinds of `layer_types` that see a part of the text need: its size.
WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
LAYERS = 2_000  # more than any model has; transformers makes lists of this length before a file is looked at

INDEX = {
    "weight_map": Each(FILE_NAME),
    "metadata?": {"sha256?": Each(str), "total_size?": NUMBER},
}
MANIFEST = {"files": [FILE_NAME]}
SWAP = {"move": [FILE_NAME], "remove": [FILE_NAME]}
ENTRIES = Each({"format": str, "shape": MATRIX})
PACKED = {
    "quant_method": str,
    "format_version?": POSITIVE,
    "linears?": (ENTRIES, NONE),
    "shapes?": (Each(SHAPE), NONE),
    "index?": (FILE_NAME, NONE),
    "recipe?": (str, NONE),
}
CONFIG = {
    "model_type?": (str, NONE),
    "architectures?": ([str], NONE),
    "quantization_config?": (dict, NONE),
    "auto_map?": (dict, NONE),
    "text_config?": (dict, NONE),
}
# What the header of a shard says under `budwood`, and the notes of a block in it.
SHARD = {"run?": (str, NONE), "packed?": ENTRIES, "shapes?": Each(SHAPE), "notes?": dict}
BLOCK_NOTES = {
    "relative_error": (NUMBER, NONE),
    "linears": Each(
        {"shape": MATRIX, "nonzeros": COUNT, "recovered": (COUNT, NONE), "rounding_error?": (NUMBER, NONE)}
    ),
    "units?": Each(PAIR),
}


def parse(text: str | bytes) -> Any:
    """JSON as data. Raises ValueError for anything else, however deep it is nested."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def read_object(
    file: Path, schema: Any, advice: str, error: type[BudwoodError] = RunError, most: int = LARGEST_FILE
) -> dict[str, Any] | None:
    """The object in a JSON file that is as the schema says (see `fault`); None where there is no such file.

    Raises `error` where it cannot be read, is larger than `most` bytes, is no JSON, or not as the schema says.
    """
    try:
        with open(file, "rb") as stream:
            content = stream.read(most + 1)
        if len(content) > most:
            raise ValueError(f"it has more than {most} bytes")
        value = parse(content.decode("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as problem:
        raise error(f"{file} is damaged: {problem}; {advice}") from problem
    if type(value) is not dict:
        raise error(f"{file} is damaged: it holds {shown(value)} where an object should be; {advice}")
    found = fault(value, schema)
    if found:
        raise error(f"{file} is damaged: {found}; {advice}")
    return value


def read_config_json(file: Path) -> dict[str, Any]:
    """config.json of a model, as far as it is not transformers' to check. Raises UsageError where it is none."""
    advice = "fetch or write it again"
    content = read_object(file, CONFIG, advice, UsageError)
    if content is None:
        raise UsageError(f"there is no {file}; give the folder of a model")
    settings = content.get("quantization_config")
    if settings is not None and settings.get("quant_method") == "budwood":
        newer = type(settings.get("format_version")) is int and settings["format_version"] > FORMAT_VERSION
        found = None if newer else fault(settings, PACKED, "quantization_config")  # a newer one is refused as such
        if found:
            raise RunError(f"{file} is damaged: {found}; {advice}")
    check_layers(content, LAYERS, file)
    check_sizes(content, file)
    check_experts(content, file)
    check_windows(content, file)
    return content


def configurations(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The content of config.json and those inside it, as of the text model of a larger one."""
    return [content, *(value for value in content.values() if isinstance(value, dict))]


def check_layers(content: dict[str, Any], most: int, file: Path, names: tuple[str, ...] = ("layer", "layers")) -> None:
    """UsageError where a number of layers is above `most`, before lists or modules of that length are made.

    names: what the names of the fields end with.
    """
    for inside in configurations(content):
        for name, value in inside.items():
            if name.endswith(names) and type(value) in (int, float) and value > most:
                raise UsageError(f"{file} gives {name} as {shown(value)}, which is more than {most}; correct it")


def check_sizes(content: dict[str, Any], file: Path) -> None:
    """UsageError where a number of heads or a width is negative: two of them may have the product that tensors have."""
    for inside in configurations(content):
        for name, value in inside.items():
            if name.endswith(SIZES) and type(value) in (int, float) and value < 0:
                raise UsageError(f"{file} gives {name} as {shown(value)}; correct it")


def check_experts(content: dict[str, Any], file: Path) -> None:
    """UsageError where a token would choose more experts than a block has, or less than none."""
    for inside in configurations(content):
        numbers = {name: value for name, value in inside.items() if type(value) is int}
        count = max((numbers[name] for name in EXPERTS if name in numbers), default=0)
        for name in PER_TOKEN:
            if count and not 0 <= numbers.get(name, 0) <= count:
                raise UsageError(f"{file} gives {name} as {numbers[name]}, of {count} experts; correct it")


def check_windows(content: dict[str, Any], file: Path) -> None:
    """UsageError where layers attend to a window that has no size: transformers finds out in the first forward pass."""
    for inside in configurations(content):
        types = inside.get("layer_types")
        for kind, name in WINDOWS.items():
            if name in inside and isinstance(types, list) and kind in types:
                size = inside[name]
                if type(size) is not int or size <= 0:
                    raise UsageError(
                        f"{file} gives {name} as {shown(size)}, and {kind} layers that need it; correct it"
                    )


def check_blocks(content: dict[str, Any], tensors: int, file: Path) -> None:
    """UsageError where a model would have more decoder blocks than its files have tensors."""
    check_layers(content, tensors, file, ("num_hidden_layers", "n_layer", "num_layers", "n_layers"))
