"""How one sparse matrix is stored, without loss: a format looks at the zeros and never decides about them."""

from collections.abc import Mapping
from difflib import get_close_matches

import torch
from torch import Tensor

from budwood.errors import UsageError
from budwood.formats.bitmask import Bitmask
from budwood.formats.bits import slabs, stored
from budwood.formats.dense import Dense
from budwood.formats.format import Format, Refusal
from budwood.formats.two_four import TwoFour
from budwood.formats.two_four_compact import TwoFourCompact
from budwood.formats.two_four_csr import TwoFourCsr
from budwood.formats.two_four_ell import TwoFourEll, smallest_block
from budwood.sparsity.outlook import Outlook

# Of equal sizes the earlier wins.
FORMATS: dict[str, type[Format]] = {
    "dense": Dense,
    "two_four": TwoFour,
    "bitmask": Bitmask,
    "two_four_compact": TwoFourCompact,
    "two_four_csr": TwoFourCsr,
    "two_four_ell": TwoFourEll,
}


def choose(weight: Tensor, formats: Mapping[str, type[Format]] = FORMATS) -> tuple[str, dict[str, Tensor]]:
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


def predict(shape: tuple[int, int], outlook: Outlook, itemsize: int, format: str = "auto") -> tuple[str, int]:
    """Name and bytes a matrix will take, from shapes alone; "auto" takes the smallest.

    Raises `UsageError` where the format cannot hold such a matrix.
    """
    return smallest(shape, outlook, itemsize, FORMATS if format == "auto" else {format: named(format)})


def named(name: str) -> type[Format]:
    """The format of that name; raises `UsageError` with the list and the nearest."""
    if name not in FORMATS:
        nearest = get_close_matches(name, FORMATS, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise UsageError(f"there is no format '{name}'; choose one of {', '.join(FORMATS)}{hint}")
    return FORMATS[name]


def known_layout(name: str) -> str:
    """`name` itself where it is a format's or "auto", the smallest for each matrix; raises `UsageError` if not."""
    return name if name == "auto" else named(name).name


def smallest(
    shape: tuple[int, int], outlook: Outlook, itemsize: int, formats: Mapping[str, type[Format]]
) -> tuple[str, int]:
    """Name and bytes of the smallest of the formats; raises `UsageError` where none holds such a matrix."""
    sizes = {name: format.nbytes(shape, outlook, itemsize) for name, format in formats.items()}
    fitting = {name: size for name, size in sizes.items() if size is not None}
    if not fitting:
        raise UsageError(
            f"{', '.join(formats)} cannot hold a {shape[0]} x {shape[1]} matrix pruned like this; "
            f"choose --format auto, or another of {', '.join(FORMATS)}"
        )
    return min(fitting.items(), key=lambda item: item[1])


def count(weight: Tensor) -> Outlook:
    """What a matrix holds, exactly: its outlook once it is here."""
    width = weight.shape[1]
    if width % 4:
        return Outlook(nonzeros=sum(int(stored(weight[rows]).sum()) for rows in slabs(weight.shape)))
    groups = torch.cat(
        [stored(weight[rows]).reshape(-1, width // 4, 4).sum(2, dtype=torch.uint8) for rows in slabs(weight.shape)]
    )  # [out, in/4], stored weights in each
    return Outlook(
        nonzeros=int(groups.sum()),
        recovered=int((groups.clamp(min=2) - 2).sum()),
        block=smallest_block(groups > 2, weight.element_size()),
    )
