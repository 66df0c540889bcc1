"""Storage formats of one sparse matrix, without loss: a format reads the zeros and never prunes.

Formats with int8 or int4 values are lossless for matrices that are rounded already, and `store` rounds. A layout is the
name of a format, or "auto", "auto_int8" or "auto_int4", which choose one for each matrix.
"""

from collections.abc import Mapping
from difflib import get_close_matches

import torch
from torch import Tensor

from budwood.errors import UsageError
from budwood.formats.bitmask import Bitmask
from budwood.formats.bits import slabs, stored
from budwood.formats.dense import Dense
from budwood.formats.format import Format, Refusal, by_name
from budwood.formats.int4 import BitmaskInt4, DenseInt4, TwoFourCompactInt4, TwoFourInt4
from budwood.formats.int8 import BitmaskInt8, TwoFourCompactInt8, TwoFourInt8
from budwood.formats.rounded import Rounded
from budwood.formats.two_four import TwoFour
from budwood.formats.two_four_compact import TwoFourCompact
from budwood.formats.two_four_csr import TwoFourCsr
from budwood.formats.two_four_ell import TwoFourEll, smallest_block
from budwood.sparsity.forecast import Forecast

# Of equal sizes the earlier is chosen.
LOSSLESS: dict[str, type[Format]] = by_name(
    Dense,
    TwoFour,
    Bitmask,
    TwoFourCompact,
    TwoFourCsr,
    TwoFourEll,
)
ROUNDED: dict[str, dict[str, type[Rounded]]] = {  # by kind of values, and by the lossless format of the same positions
    "int8": {"two_four": TwoFourInt8, "bitmask": BitmaskInt8, "two_four_compact": TwoFourCompactInt8},
    "int4": {
        "two_four": TwoFourInt4,
        "bitmask": BitmaskInt4,
        "two_four_compact": TwoFourCompactInt4,
        "dense": DenseInt4,
    },
}
FORMATS: dict[str, type[Format]] = LOSSLESS | by_name(
    *(format for kind in ROUNDED.values() for format in kind.values())
)
AUTO = {f"auto_{kind}": kind for kind in ROUNDED}  # layouts that choose among the formats of one kind

FULL = 0.99  # least share of a 2:4 part's positions with a nonzero weight: a model may have a few zeros of its own
FEW = 1 / 8  # largest share of recovered weights that are kept in 16 bits


def store(weight: Tensor, layout: str) -> tuple[str, dict[str, Tensor]]:
    """The matrix in a layout, its values rounded if the layout does so: format, tensors by suffix.

    Raises `UsageError` where the layout cannot store such a matrix.
    """
    name = layout
    if layout not in FORMATS:
        shape, forecast = (weight.shape[0], weight.shape[1]), count(weight)
        name, _ = smallest(shape, forecast, weight.element_size(), candidates(layout, shape, forecast))
    try:
        return name, FORMATS[name].nearest(weight)
    except Refusal as refusal:
        raise UsageError(str(refusal)) from refusal


def rounds(layout: str) -> bool:
    """Whether a layout changes the values that it stores."""
    return values_of(layout) is not None


def values_of(layout: str) -> str | None:
    """The kind of values of a layout that rounds them, "int8" or "int4"; None of others."""
    format = FORMATS.get(layout)
    return AUTO.get(layout) or (format.kind if format is not None and issubclass(format, Rounded) else None)


def candidates(layout: str, shape: tuple[int, int], forecast: Forecast) -> Mapping[str, type[Format]]:
    """The formats of which a layout chooses the smallest.

    With rounded values the recovered weights of a 2:4 part keep their dtype, although a bitmask would be smaller.
    """
    if layout == "auto":
        return LOSSLESS
    if layout in AUTO:
        kind = ROUNDED[AUTO[layout]]
        names = ("two_four", "two_four_compact") if has_base(shape, forecast) else ("bitmask", "dense")
        return {kind[name].name: kind[name] for name in names if name in kind}
    return {layout: named(layout)}


def has_base(shape: tuple[int, int], forecast: Forecast) -> bool:
    """Whether a matrix is 2:4 with at most a few recovered weights, and not unstructured."""
    if forecast.recovered is None or shape[1] % 4:
        return False
    weights = shape[0] * shape[1]
    return forecast.nonzeros - forecast.recovered >= FULL * weights / 2 and forecast.recovered <= FEW * weights


def choose(weight: Tensor, formats: Mapping[str, type[Format]] = LOSSLESS) -> tuple[str, dict[str, Tensor]]:
    """The smallest of the formats that can store the matrix, and the matrix in it: name, tensors by suffix.

    Raises `UsageError` where none of the formats can (`dense` always can).
    """
    name, _ = smallest((weight.shape[0], weight.shape[1]), count(weight), weight.element_size(), formats)
    return name, formats[name].pack(weight)


def pack_as(name: str, weight: Tensor, base: Tensor | None = None) -> dict[str, Tensor]:
    """The matrix in the named format; raises `UsageError` where the format cannot store it without loss."""
    try:
        return named(name).pack(weight, base)
    except Refusal as refusal:
        raise UsageError(str(refusal)) from refusal


def predict(shape: tuple[int, int], forecast: Forecast, itemsize: int, layout: str = "auto") -> tuple[str, int]:
    """Format and bytes of a matrix in a layout, from shape and forecast alone.

    Raises `UsageError` where the layout cannot store such a matrix.
    """
    return smallest(shape, forecast, itemsize, candidates(layout, shape, forecast))


def named(name: str) -> type[Format]:
    """The format of that name; raises `UsageError` with the known names."""
    if name not in FORMATS:
        nearest = get_close_matches(name, FORMATS, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise UsageError(f"there is no format '{name}'; choose one of {', '.join(FORMATS)}{hint}")
    return FORMATS[name]


def known_layout(name: str, values: str | None = None) -> str:
    """The layout for the name of a format or "auto", with `values` in the dtype of the model (None), "int8" or "int4".

    Raises `UsageError` where there is none.
    """
    if values is not None and values not in ROUNDED:
        raise UsageError(
            f"there are no values '{values}'; choose {' or '.join(ROUNDED)}, or leave it out to keep those of the model"
        )
    if name == "auto" or name in AUTO:
        own = AUTO.get(name)
        found = name if values is None else f"auto_{values}"
    else:
        format = named(name)
        own = values_of(name)
        if values is None or own is not None:
            found = name
        elif format.name in ROUNDED[values]:
            found = ROUNDED[values][format.name].name
        else:
            others = ", ".join(ROUNDED[values])
            raise UsageError(f"{name} holds no {values} values; choose --format auto, or one of {others}")
    if own is not None and values not in (None, own):
        raise UsageError(f"{name} has {own} values; leave --values out, or choose --format auto")
    return found


def smallest(
    shape: tuple[int, int], forecast: Forecast, itemsize: int, formats: Mapping[str, type[Format]]
) -> tuple[str, int]:
    """Name and bytes of the smallest of the formats; raises `UsageError` where none can store such a matrix."""
    sizes = {name: format.nbytes(shape, forecast, itemsize) for name, format in formats.items()}
    fitting = {name: size for name, size in sizes.items() if size is not None}
    if not fitting:
        raise UsageError(
            f"{', '.join(formats)} cannot hold a {shape[0]} x {shape[1]} matrix pruned like this; "
            f"choose --format auto, or another of {', '.join(FORMATS)}"
        )
    return min(fitting.items(), key=lambda item: item[1])


def count(weight: Tensor) -> Forecast:
    """The exact counts of a matrix [out, in], in the form of a forecast."""
    width = weight.shape[1]
    if width % 4:
        return Forecast(nonzeros=sum(int(stored(weight[rows]).sum()) for rows in slabs(weight.shape)))
    groups = torch.cat(
        [stored(weight[rows]).reshape(-1, width // 4, 4).sum(2, dtype=torch.uint8) for rows in slabs(weight.shape)]
    )  # [out, in/4], nonzero weights in each
    return Forecast(
        nonzeros=int(groups.sum()),
        recovered=int((groups.clamp(min=2) - 2).sum()),
        block=smallest_block(groups > 2, weight.element_size()),
    )
