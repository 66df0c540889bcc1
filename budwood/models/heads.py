"""The numbers of heads that an attention module keeps as attributes, and in its configuration, follow its matrices.

Most modules read the number of heads off their tensors; some keep it, or the sizes that follow from it. After heads
were removed these must be corrected: a module may run without complaint with a wrong number and compute something else.
"""

from typing import Any

from torch import nn

QUERY_HEADS = ("num_heads", "num_attention_heads", "n_head", "n_heads")
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads")
GROUPS = ("num_key_value_groups",)  # query heads for each KV head
SIZES = ("split_size", "hidden_size", "embed_dim", "hidden_dim")  # heads times head size, in some modules
HEAD_SIZES = ("head_dim", "head_size")


class HeadCounts:
    """The configuration of a model as one attention module reads it, with numbers of heads of its own."""

    def __init__(self, config: Any, counts: dict[str, int]):
        self.__dict__.update(counts, original=config)

    def __getattr__(self, name: str) -> Any:
        if name == "original" or name.startswith("__"):
            raise AttributeError(name)  # being copied, or asked for what the class does not have
        return getattr(self.original, name)


def head_size(attention: nn.Module) -> int | None:
    """Channels of one head; None for modules that are not attention."""
    sizes = [getattr(attention, name, None) for name in HEAD_SIZES]
    return next((size for size in sizes if isinstance(size, int) and size > 0), None)


def set_heads(attention: nn.Module, heads: int, key_value_heads: int) -> None:
    """Corrects the numbers of query and KV heads that an attention module and its configuration hold."""
    size, config = head_size(attention), getattr(attention, "config", None)
    known = [getattr(attention, name, None) or getattr(config, name, None) for name in QUERY_HEADS]
    before = next((count for count in known if isinstance(count, int)), heads)
    numbers = dict.fromkeys(QUERY_HEADS, heads) | dict.fromkeys(KEY_VALUE_HEADS, key_value_heads)
    for name, count in {**numbers, **dict.fromkeys(GROUPS, heads // key_value_heads)}.items():
        if isinstance(getattr(attention, name, None), int):
            setattr(attention, name, count)
    for name in SIZES:
        if size is not None and before != heads and getattr(attention, name, None) == before * size:
            setattr(attention, name, heads * size)
    if config is not None:
        original = config.original if isinstance(config, HeadCounts) else config
        present = {name: getattr(original, name, None) for name in numbers}
        other = {name: numbers[name] for name, count in present.items() if isinstance(count, int)}
        changed = any(present[name] != count for name, count in other.items())
        attention.__dict__["config"] = HeadCounts(original, other) if changed else original
