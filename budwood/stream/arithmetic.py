"""How the forward passes compute: dtype, sparse products, attention. Chosen by the user, or by short timings.

Statistics, scores and solvers use float32 or better in any case.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from budwood.errors import UsageError
from budwood.formats import pack_as
from budwood.kernels import native
from budwood.kernels.native_matrix import NativeMatrix, native_matrix
from budwood.stream.attention import DTYPES as BLOCKED_DTYPES
from budwood.stream.attention import blocked_attention
from budwood.stream.trial import HOPELESS, Run, speed_ratio, tried_once

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLEARLY = 1.1  # times as fast: a smaller gain would be decided by noise


def dtype_named(name: str) -> torch.dtype:
    """The torch dtype called `name`; UsageError for any other."""
    if name not in TYPES:
        raise UsageError(f"no such dtype {name!r}; choose one of {', '.join(TYPES)}")
    return TYPES[name]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def known_device(name: str | None) -> torch.device:
    """The device of that name. None and "auto": a CUDA GPU if there is one, else the CPU.

    Raises UsageError where the device cannot be used.
    """
    if name in (None, "auto"):
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(str(name))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


@dataclass(frozen=True)
class Arithmetic:
    """compute: dtype of the matmuls. sparse_products: native kernels multiply the pruned matrices when the outputs of a
    block are computed. blocked_attention: see `attend_in_blocks`.
    """

    compute: torch.dtype = torch.float32
    sparse_products: bool = False
    blocked_attention: bool = False

    def record(self) -> dict[str, Any]:
        """As stored in the recipe, so that a resumed run computes in the same way."""
        return {
            "computed_in": name_of(self.compute),
            "sparse_products": self.sparse_products,
            "blocked_attention": self.blocked_attention,
        }

    @classmethod
    def recorded(cls, record: Mapping[str, Any]) -> "Arithmetic":
        flags = (bool(record.get(name)) for name in ("sparse_products", "blocked_attention"))
        return cls(dtype_named(record["computed_in"]), *flags)


FLOAT32 = Arithmetic()


def choose_arithmetic(
    compute_dtype: str, sparse_products: str, attention: str, device: torch.device, widest: int, published: bool
) -> tuple[Arithmetic, list[str]]:
    """The arithmetic of a run, and one note for the user on each choice made here.

    compute_dtype: auto, float32, bfloat16 or float16. sparse_products: auto, on or off. attention: auto, fused or
    blocked. widest: input features of the widest linear. published: results must match the published programs, so
    "auto" takes torch's matmul and torch's attention. Only options that are "auto" are timed, once in a process and in
    under a second in all.

    Raises UsageError for any other value, and for what this machine, device or dtype cannot compute.
    """
    check_arithmetic(compute_dtype, sparse_products, attention)
    notes = []
    if compute_dtype == "auto":
        compute, note = faster_dtype(device, widest)
        notes.append(note)
    else:
        compute = dtype_named(compute_dtype)

    sparse, blocked = sparse_products == "on", attention == "blocked"
    if sparse and not multiplies_sparse(compute, device):
        raise UsageError(
            f"sparse_products='on' needs a native sparse kernel for {name_of(compute)} on {device.type}, and none is "
            f"available ({native.why()}); use sparse_products='off'"
        )
    if blocked and (device.type != "cpu" or compute not in BLOCKED_DTYPES):
        raise UsageError(
            f"attention='blocked' computes in {' or '.join(map(name_of, BLOCKED_DTYPES))} on the CPU, not in "
            f"{name_of(compute)} on {device.type}; use attention='fused'"
        )
    tried = device.type == "cpu" and not published
    # torch's own bfloat16 products are about as fast as the sparse ones
    if sparse_products == "auto" and tried and compute == torch.float32 and multiplies_sparse(compute, device):
        gain = sparse_product_gain()
        if sparse := gain > CLEARLY:
            notes.append(f"multiplying pruned matrices with sparse kernels: {gain:.1f} times as fast here")
    if attention == "auto" and tried and compute in BLOCKED_DTYPES:
        gain = blocked_attention_gain(compute)
        if blocked := gain > CLEARLY:
            notes.append(f"computing attention in blocks of queries: {gain:.1f} times as fast here")
    return Arithmetic(compute, sparse, blocked), notes


def check_arithmetic(compute_dtype: str, sparse_products: str, attention: str) -> None:
    """Raises UsageError for a value that `choose_arithmetic` does not accept."""
    _one_of("compute_dtype", compute_dtype, ("auto", *TYPES))
    _one_of("sparse_products", sparse_products, ("auto", "on", "off"))
    _one_of("attention", attention, ("auto", "fused", "blocked"))


def multiplies_sparse(compute: torch.dtype, device: torch.device) -> bool:
    """Whether the native library multiplies pruned matrices by inputs of this dtype here."""
    if device.type != "cpu" or not native.has(native.SPARSE):
        return False
    x, _, kernel = _pruned(compute, 16, 64)
    return kernel is not None and kernel.linear(x, kernel=native.SPARSE) is not None


@tried_once
@torch.no_grad()
def sparse_product_gain(width: int = 1024, rows: int = 256) -> float:
    """How many times as fast as torch the native kernel multiplies [rows, width] by a pruned matrix, in float32."""

    def size(part: int) -> tuple[Run, Run]:
        x, weight, kernel = _pruned(torch.float32, max(1, rows // part), max(16, width // part))
        assert kernel is not None
        return lambda: linear(x, weight), lambda: kernel.linear(x, kernel=native.SPARSE)

    return speed_ratio([partial(size, part) for part in (4, 2, 1)])


@tried_once
@torch.no_grad()
def blocked_attention_gain(compute: torch.dtype, tokens: int = 512) -> float:
    """How many times as fast attention in blocks of queries is as torch's fused attention."""
    generator = torch.Generator().manual_seed(0)  # leaves the caller's random state alone

    def size(part: int) -> tuple[Run, Run]:
        shape = (max(1, 4 // part), max(1, tokens // part), 64)
        q, k, v = (torch.randn(shape[0], heads, *shape[1:], dtype=compute, generator=generator) for heads in (8, 4, 4))
        fused = partial(scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)
        return fused, lambda: blocked_attention(q, k, v)

    return speed_ratio([partial(size, part) for part in (4, 2, 1)])


@tried_once
@torch.no_grad()
def faster_dtype(device: torch.device, width: int) -> tuple[torch.dtype, str]:
    """float32 or bfloat16, whichever multiplies matrices of up to `width` faster here, and a note for the user.

    A processor without bfloat16 instructions is up to a thousand times slower with it.
    """

    def size(rows: int, width: int) -> tuple[Run, Run]:
        def product(dtype: torch.dtype) -> Run:
            left, right = _operands(dtype, device, rows, width)
            return lambda: linear(left, right).flatten()[0].item()  # the item waits for the device

        return product(torch.float32), product(torch.bfloat16)

    gain = speed_ratio([partial(size, rows, min(4 * rows, width)) for rows in (64, 128, 256)])
    if gain > CLEARLY:
        return torch.bfloat16, f"computing in bfloat16: {gain:.1f} times as fast here as float32"
    if gain < 1 / HOPELESS:  # the timing may have ended at a small size, where the factor is smallest
        return torch.float32, f"computing in float32: bfloat16 is at least {1 / gain:.0f} times slower here"
    if gain < 1 / CLEARLY:
        return torch.float32, f"computing in float32: bfloat16 is {1 / gain:.1f} times slower here"
    return torch.float32, "computing in float32: bfloat16 is no faster here"


def _one_of(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{option} is {value!r}; choose one of {', '.join(choices)}")


def _operands(dtype: torch.dtype, device: torch.device, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """[rows, width] and [width, width]."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(rows, width, generator=generator).to(device, dtype)
    right = torch.randn(width, width, generator=generator).to(device, dtype)
    return left, right


def _pruned(dtype: torch.dtype, rows: int, width: int) -> tuple[Tensor, Tensor, NativeMatrix | None]:
    """[rows, width], [width, width] with every second pair of weights zero, and the latter for the native library."""
    x, weight = _operands(dtype, torch.device("cpu"), rows, width)
    weight = weight * (torch.arange(width * width).view(width, width) % 4 < 2)
    return x, weight, native_matrix("bitmask", (width, width), pack_as("bitmask", weight))
