"""How one sparse matrix is stored, without loss: a format looks at the zeros and never decides about them.

Formats with int8 values lose nothing of a matrix that is rounded already, and `store` rounds it. A layout is the name
of a format, or "auto" or "auto_int8", which choose one for each matrix.
"""

from collections.abc import Mapping
from difflib import get_close_matches

import torch
from torch import Tensor

from budwood.errors import UsageError
from budwood.formats.bitmask import Bitmask
from budwood.formats.bits import slabs, stored
from budwood.formats.dense import Dense
from budwood.formats.format import Format, Refusal
from budwood.formats.int8 import BitmaskInt8, TwoFourCompactInt8, TwoFourInt8
from budwood.formats.two_four import TwoFour
from budwood.formats.two_four_compact import TwoFourCompact
from budwood.formats.two_four_csr import TwoFourCsr
from budwood.formats.two_four_ell import TwoFourEll, smallest_block
from budwood.sparsity.forecast import Forecast

# Of equal sizes the earlier wins.
LOSSLESS: dict[str, type[Format]] = {
    "dense": Dense,
    "two_four": TwoFour,
    "bitmask": Bitmask,
    "two_four_compact": TwoFourCompact,
    "two_four_csr": TwoFourCsr,
    "two_four_ell": TwoFourEll,
}
WITH_INT8: dict[str, type[Format]] = {  # by the lossless format they follow
    "two_four": TwoFourInt8,
    "bitmask": BitmaskInt8,
    "two_four_compact": TwoFourCompactInt8,
}
FORMATS: dict[str, type[Format]] = LOSSLESS | {format.name: format for format in WITH_INT8.values()}

FULL = 0.99  # the share of two in every group that a 2:4 part has at least: a model may hold a few zeros of its own
FEW = 1 / 8  # the share of weights beyond it that 16 bits are worth


def store(weight: Tensor, layout: str) -> tuple[str, dict[str, Tensor]]:
    """The matrix as a layout keeps it, its values rounded where that is the layout's: format, tensors by suffix.

    Raises `UsageError` where the layout cannot hold such a matrix.
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
    """The formats among which a layout takes the smallest.

    With int8 values the recovered weights of a 2:4 part keep their own dtype, although a bitmask is smaller.
    """
    if layout == "auto":
        return LOSSLESS
    if layout == "auto_int8":
        formats = (TwoFourInt8, TwoFourCompactInt8) if has_base(shape, forecast) else (BitmaskInt8,)
        return {format.name: format for format in formats}
    return {layout: named(layout)}


def has_base(shape: tuple[int, int], forecast: Forecast) -> bool:
    """Whether a matrix is 2:4 with perhaps a few recovered weights, and no free pattern."""
    if forecast.recovered is None or shape[1] % 4:
        return False
    weights = shape[0] * shape[1]
    return forecast.nonzeros - forecast.recovered >= FULL * weights / 2 and forecast.recovered <= FEW * weights


def choose(weight: Tensor, formats: Mapping[str, type[Format]] = LOSSLESS) -> tuple[str, dict[str, Tensor]]:
    """The smallest of the formats that holds the matrix, and the matrix in it: name, tensors by suffix.

    Raises `UsageError` where none of the formats can (with `dense` among them, one always can).
    """
    name, _ = smallest((weight.shape[0], weight.shape[1]), count(weight), weight.element_size(), formats)
    return name, formats[name].pack(weight)


def pack_as(name: str, weight: Tensor, base: Tensor | None = None) -> dict[str, Tensor]:
    """The matrix in the named format; raises `UsageError` where the format would lose anything."""
    try:
        return named(name).pack(weight, base)
    except Refusal as refusal:
        raise UsageError(str(refusal)) from refusal


def predict(shape: tuple[int, int], forecast: Forecast, itemsize: int, layout: str = "auto") -> tuple[str, int]:
    """Format and bytes that a layout will take for a matrix, from shapes alone.

    Raises `UsageError` where the layout cannot hold such a matrix.
    """
    return smallest(shape, forecast, itemsize, candidates(layout, shape, forecast))


def named(name: str) -> type[Format]:
    """The format of that name; raises `UsageError` with the list and the nearest."""
    if name not in FORMATS:
        nearest = get_close_matches(name, FORMATS, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise UsageError(f"there is no format '{name}'; choose one of {', '.join(FORMATS)}{hint}")
    return FORMATS[name]


def known_layout(name: str, values: str | None = None) -> str:
    """The layout of a format's name or "auto", with `values` of their own dtype (None) or "int8".

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
    """Name and bytes of the smallest of the formats; raises `UsageError` where none holds such a matrix."""
    sizes = {name: format.nbytes(shape, forecast, itemsize) for name, format in formats.items()}
    fitting = {name: size for name, size in sizes.items() if size is not None}
    if not fitting:
        raise UsageError(
            f"{', '.join(formats)} cannot hold a {shape[0]} x {shape[1]} matrix pruned like this; "
            f"choose --format auto, or another of {', '.join(FORMATS)}"
        )
    return min(fitting.items(), key=lambda item: item[1])


def count(weight: Tensor) -> Forecast:
    """What a matrix holds, exactly: its forecast once it is here."""
    width = weight.shape[1]
    if width % 4:
        return Forecast(nonzeros=sum(int(stored(weight[rows]).sum()) for rows in slabs(weight.shape)))
    groups = torch.cat(
        [stored(weight[rows]).reshape(-1, width // 4, 4).sum(2, dtype=torch.uint8) for rows in slabs(weight.shape)]
    )  # [out, in/4], stored weights in each
    return Forecast(
        nonzeros=int(groups.sum()),
        recovered=int((groups.clamp(min=2) - 2).sum()),
        block=smallest_block(groups > 2, weight.element_size()),
    )
