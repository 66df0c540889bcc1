"""The pictures of a page: each a function of the models that yields what their data allows, or nothing."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from budwood.pages.pictures.alpha import alpha
from budwood.pages.pictures.density import density_maps
from budwood.pages.pictures.drawing import Picture, check_matplotlib, drawing
from budwood.pages.pictures.errors import errors_by_block, errors_by_kind
from budwood.pages.pictures.front import front
from budwood.pages.pictures.groups import groups
from budwood.pages.pictures.speed import decoding, products
from budwood.pages.pictures.training import training
from budwood.pages.pictures.units import units
from budwood.pages.shown import Shown

PICTURES: tuple[Callable[[Sequence[Shown]], Iterator[Picture]], ...] = (
    front,
    alpha,
    errors_by_block,
    errors_by_kind,
    units,
    training,
    groups,
    decoding,
    products,
    density_maps,
)

DRAWN, MOST = 200, 12  # models in all pictures, and pictures of one kind


def pictures(models: Sequence[Shown]) -> list[Picture]:
    """All pictures that the data of the models allows. Raises UsageError where matplotlib is not installed."""
    check_matplotlib()
    done = [model for model in models if model.status == "done"][:DRAWN]
    with drawing():
        return [picture for draw in PICTURES for picture in islice(draw(done), MOST)]
