"""The native library, loaded and called through ctypes. The mathematics is in `native/*.cpp`.

The environment variable BUDWOOD_KERNELS chooses a path, the code for one instruction set: `auto` (the widest that the
CPU has), `amx`, `avx512`, `avx2`, `scalar`, or `reference` (unpack and multiply with torch, bit for bit as the dense
model).
"""

import ctypes
import os
import struct
import sysconfig
from contextlib import suppress
from ctypes import Structure, c_char_p, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from budwood.errors import UsageError

VARIABLE = "BUDWOOD_KERNELS"
LIBRARY = "BUDWOOD_LIBRARY"  # a library to open in place of the installed one, as `make sanitize` does
CHOICES = ("auto", "amx", "avx512", "avx2", "scalar", "reference")
NAME = "libbudwood.so"
INTERFACE = 9  # version of the library interface that this file calls
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
INT8 = TYPES[torch.int8]
INT4 = 4
BITMASK, NIBBLES, TILES, DENSE = 0, 1, 2, 3  # how the columns are coded
MAX_FEW_ROWS = 8  # rows of x that the kernel for few rows takes at a time

# Kernels: chosen by the number of rows, for few rows, sparse (skips zeros), in panels (multiplies zeros; bfloat16).
BY_ROWS, FEW_ROWS, SPARSE, PANELS = 0, 1, 2, 3


class Matrix(Structure):
    """One packed matrix, as `native/kernels.h` declares it."""

    _fields_ = [
        ("values", c_void_p),
        ("places", c_void_p),
        ("starts", c_void_p),
        ("scales", c_void_p),
        ("more_counts", c_void_p),
        ("more_columns", c_void_p),
        ("more_values", c_void_p),
        ("more_starts", c_void_p),
        ("out", c_int64),
        ("in_", c_int64),
        ("count", c_int64),
        ("stride", c_int64),
        ("type", c_int32),
        ("coding", c_int32),
        ("more_type", c_int32),
        ("group", c_int32),
    ]


# Where a product is written, as `native/kernels.h` declares it: y, bias or 0, stride, type. Packed into bytes, which
# takes less time than a ctypes structure does.
OUTPUT = "PPqi4x"
pack_output = struct.Struct(OUTPUT).pack


def file() -> Path | None:
    """The library that was built with the package: next to this file, or where an editable install puts it."""
    if os.environ.get(LIBRARY):
        return Path(os.environ[LIBRARY])
    places = (Path(__file__).parent, Path(sysconfig.get_path("platlib")) / "budwood" / "kernels")
    return next((place / NAME for place in places if (place / NAME).is_file()), None)


def library() -> ctypes.CDLL | None:
    """The library with its path set; None for the reference. Raises UsageError for an unknown or missing path."""
    global _chosen
    wanted = os.environ.get(VARIABLE, "auto").lower()
    native = opened(wanted)
    if native is not None and wanted != _chosen:
        native.budwood_choose(wanted.encode())
        _chosen = wanted
    return native


_chosen = ""


@cache
def opened(wanted: str) -> ctypes.CDLL | None:
    """The library, opened, with its path set to `wanted`."""
    if wanted not in CHOICES:
        raise UsageError(f"{VARIABLE} is '{wanted}'; set it to one of {', '.join(CHOICES)}")
    found = file()
    if wanted == "reference" or found is None:
        if wanted not in ("auto", "reference"):
            raise UsageError(
                f"{VARIABLE} asks for {wanted}, but the native library is not built; install a C++ compiler"
            )
        return None
    try:
        native = ctypes.CDLL(str(found))
        if native.budwood_interface() != INTERFACE:
            return None
    except (OSError, AttributeError):
        return None
    native.budwood_path.restype = c_char_p
    native.budwood_choose.argtypes = [c_char_p]
    native.budwood_starts.argtypes = [c_void_p, c_int64, c_int64, c_int64, c_int32, c_void_p]
    native.budwood_sound.argtypes = [c_void_p]
    native.budwood_linear.argtypes = [c_void_p, c_int32, c_void_p, c_int32, c_int64, c_void_p, c_int32, c_int32]
    native.budwood_has.argtypes = [c_int32]
    native.budwood_release.argtypes, native.budwood_release.restype = [c_int32], None
    native.budwood_read.argtypes = [c_void_p, c_int64, c_int32]
    native.budwood_read.restype = c_int64
    native.budwood_dense.argtypes = [c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_int32]
    native.budwood_attend.argtypes = [c_void_p, c_int32]
    native.budwood_norm.argtypes = [c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_float, c_int32, c_int32]
    if hasattr(native, "budwood_tiles_plan"):  # x86 only
        native.budwood_tiles_plan.argtypes, native.budwood_tiles_plan.restype = [c_void_p] * 3, c_int64
        native.budwood_tiles_pack.argtypes = [c_void_p, c_int32, c_void_p, c_void_p]
        native.budwood_tiles_unpack.argtypes, native.budwood_tiles_unpack.restype = [c_void_p] * 7, None
    if not native.budwood_choose(wanted.encode()):
        raise UsageError(f"{VARIABLE} asks for {wanted}, which this processor cannot run; set it to auto")
    return native


def active() -> str:
    """The path that runs: amx, avx512, avx2, scalar or reference."""
    native = library()
    return "reference" if native is None else native.budwood_path().decode()


def starts(places: Tensor, out: int, width: int, coding: int) -> Tensor | None:
    """int32 [out + 1]: the offset of each row in the values; None where it does not fit 32 bits."""
    native = library()
    assert native is not None
    result = torch.empty(out + 1, dtype=torch.int32)
    fits = native.budwood_starts(places.data_ptr(), out, width, places.shape[1], coding, result.data_ptr())
    return result if fits else None


def release() -> None:
    """Give back the memory that products keep for the next ones, and what the allocator has free."""
    native = library()
    if native is not None:
        native.budwood_release(torch.get_num_threads())
    with suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def has(kernel: int) -> bool:
    """Whether the path has this kernel, for some dtype."""
    native = library()
    return native is not None and bool(native.budwood_has(kernel))


def has_dense() -> bool:
    """Whether the path has a kernel for dense bfloat16 matrices."""
    native = library()
    return native is not None and bool(native.budwood_has_dense())


def has_attention() -> bool:
    """Whether the path has a kernel for the attention of one token."""
    native = library()
    return native is not None and bool(native.budwood_has_attention())


def has_norm() -> bool:
    """Whether the path has a kernel for the normalization by the root mean square."""
    native = library()
    return native is not None and bool(native.budwood_has_norm())


def has_tiles() -> bool:
    """Whether loaded weights are repacked into tiles for this path."""
    native = library()
    return native is not None and native.budwood_has_tiles() == 2


def has_int4_tiles() -> bool:
    """Whether the path multiplies matrices of 4-bit codes, which it does in tiles only."""
    native = library()
    return native is not None and native.budwood_has_tiles() > 0


def why() -> str:
    """Which kernels run and why, in one line."""
    wanted = os.environ.get(VARIABLE, "auto").lower()
    name = active()
    if name != "reference":
        if has_tiles():
            layout = "in tiles of eight rows, since AVX2 cannot expand a bitmask"
        else:
            layout = "as in the file" + (", 4-bit values in tiles" if has_int4_tiles() else "")
        return f"native, {name} path{f' ({VARIABLE}={wanted})' if wanted != 'auto' else ''}, weights {layout}"
    if wanted == "reference":
        return f"reference: unpack and multiply with torch ({VARIABLE}=reference)"
    found = file()
    if found is None:
        return (
            "reference: unpack and multiply with torch; the native library was not built (no C++ compiler at install)"
        )
    return f"reference: unpack and multiply with torch; {found.name} cannot be opened here, install budwood again"
