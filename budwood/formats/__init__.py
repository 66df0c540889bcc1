"""Storage formats of one sparse matrix, without loss: a format reads the zeros and never prunes.

Formats with int8 values are lossless for matrices that are rounded already, and `store` rounds. A layout is the name of
a format, or "auto" or "auto_int8", which choose one for each matrix.
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
from budwood.formats.int8 import BitmaskInt8, TwoFourCompactInt8, TwoFourInt8
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
WITH_INT8: dict[str, type[Format]] = {  # by the lossless format with the same positions
    "two_four": TwoFourInt8,
    "bitmask": BitmaskInt8,
    "two_four_compact": TwoFourCompactInt8,
}
FORMATS: dict[str, type[Format]] = LOSSLESS | by_name(*WITH_INT8.values())

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
    return layout == "auto_int8" or FORMATS.get(layout) in WITH_INT8.values()


def candidates(layout: str, shape: tuple[int, int], forecast: Forecast) -> Mapping[str, type[Format]]:
    """The formats of which a layout chooses the smallest.

    With int8 values the recovered weights of a 2:4 part keep their dtype, although a bitmask would be smaller.
    """
    if layout == "auto":
        return LOSSLESS
    if layout == "auto_int8":
        formats = (TwoFourInt8, TwoFourCompactInt8) if has_base(shape, forecast) else (BitmaskInt8,)
        return {format.name: format for format in formats}
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
    """The layout for the name of a format or "auto", with `values` in the dtype of the model (None) or in "int8".

    Raises `UsageError` where there is none.
    """
    if values not in (None, "int8"):
        raise UsageError(f"there are no values '{values}'; choose int8, or leave it out to keep those of the model")
    if name in ("auto", "auto_int8"):
        return "auto" if name == "auto" and values is None else "auto_int8"
    format = named(name)
    if values is None or rounds(name):
        return format.name
    if name not in WITH_INT8:
        raise UsageError(f"{name} holds no int8 values; choose --format auto, or one of {', '.join(WITH_INT8)}")
    return WITH_INT8[name].name


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
