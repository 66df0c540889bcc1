"""How much of a file is read: no more than what was asked for can need, and no more than text can be packed."""

import logging
import math

from budwood.errors import UsageError

logger = logging.getLogger(__name__)

LEAST = 256 * 2**20  # characters that are read in any case, so that windows are drawn from the whole of usual files
SPARE = 8  # times the text that was asked for
SMALL = 64 * 2**20  # characters up to which a packed file may unpack to any multiple of its size
PACKED = 100  # times its size that packed text may have; prose has 3 to 6


class Budget:
    """What may still be read of one source of texts. needed: characters that were asked for; None or infinite: all."""

    def __init__(self, needed: float | None = None):
        self.most = math.inf if needed is None else max(LEAST, SPARE * needed)
        self.held = 0

    @property
    def left(self) -> float:
        return max(0, self.most - self.held)

    def take(self, characters: int, name: str, cut: bool = False) -> bool:
        """Counts text that was read; whether there is room for more. Says so where there is none, or text was cut."""
        self.held += characters
        if self.left and not cut:
            return True
        self.most = self.held
        logger.warning("%s holds more text than is needed: its first %d characters are used", name, self.held)
        return False


class Unpacked:
    """Counts what a packed file of `size` bytes unpacks to."""

    def __init__(self, size: int, name: str):
        self.most, self.name, self.held = max(SMALL, PACKED * size), name, 0

    def add(self, amount: int) -> None:
        """Raises UsageError where it is more than text is ever packed."""
        self.held += amount
        if self.held > self.most:
            raise UsageError(
                f"{self.name} unpacks to more than {PACKED} times its size, which text does not; unpack it, look at "
                "it, and give the unpacked file"
            )
