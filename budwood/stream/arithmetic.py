"""How the forward passes compute here: what is fastest on this machine, tried at the start and then kept.

Sums, criteria and solvers are float32 or better anyway.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from budwood.errors import UsageError
from budwood.formats import pack_as
from budwood.kernels import native
from budwood.kernels.native_matrix import prepare
from budwood.stream.attention import blocked_attention
from budwood.timing import interleaved, ratio

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_named(name: str) -> torch.dtype:
    """The torch type called `name`; UsageError for any other."""
    if name not in TYPES:
        raise UsageError(f"no such type {name!r}; choose one of {', '.join(TYPES)}")
    return TYPES[name]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def known_device(name: str | None) -> torch.device:
    """The device of that name, the CPU by default; UsageError where it cannot be used."""
    try:
        device = torch.device("cpu" if name in (None, "auto") else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


@dataclass(frozen=True)
class Arithmetic:
    """compute: type of the products. sparse_products: what was pruned is multiplied by the native kernels when a block
    runs on. blocked_attention: see `attend_in_blocks`.
    """

    compute: torch.dtype = torch.float32
    sparse_products: bool = False
    blocked_attention: bool = False

    def record(self) -> dict[str, Any]:
        """As a recipe keeps it, so that a resumed run goes on as it began."""
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


def fastest(compute: torch.dtype, device: torch.device, published: bool) -> Arithmetic:
    """What is fastest here for products in type `compute`; torch's own products where published figures are to be met.

    Each choice needs a tenth more of speed, so that two runs on one machine decide alike.
    """
    if device.type != "cpu":
        return Arithmetic(compute)
    if compute == torch.bfloat16:  # torch's products are about as fast as ours
        return Arithmetic(compute, blocked_attention=blocked_attention_gain(compute) > 1.1)
    if compute != torch.float32 or published:
        return Arithmetic(compute)
    return Arithmetic(
        compute,
        sparse_products=native.has(native.AS_SPARSE) and sparse_product_gain() > 1.1,
        blocked_attention=blocked_attention_gain(compute) > 1.1,
    )


@torch.no_grad()
def sparse_product_gain(width: int = 1024, rows: int = 1024, rounds: int = 5) -> float:
    """How many times as fast as torch the native kernel multiplies a matrix [width, width] pruned to half, float32."""
    x, weight = _operands(torch.float32, torch.device("cpu"), rows, width)
    weight = weight * (torch.arange(width * width).view(width, width) % 4 < 2)
    kernel = prepare("bitmask", (width, width), pack_as("bitmask", weight))
    if kernel is None:
        return 0.0
    times = interleaved(
        {
            "torch": lambda turn: linear(x, weight),
            "native": lambda turn: kernel.linear(x, way=native.AS_SPARSE),
        },
        rounds,
    )
    return ratio(times["torch"], times["native"])


@torch.no_grad()
def blocked_attention_gain(compute: torch.dtype, tokens: int = 512, rounds: int = 5) -> float:
    """How many times as fast as torch's fused attention ours by blocks of queries is."""
    own = torch.Generator().manual_seed(0)  # the caller's random numbers are not ours to draw
    q, k, v = (torch.randn(4, heads, tokens, 64, dtype=compute, generator=own) for heads in (8, 4, 4))
    times = interleaved(
        {
            "torch": lambda turn: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
            "blocked": lambda turn: blocked_attention(q, k, v),
        },
        rounds,
    )
    return ratio(times["torch"], times["blocked"])


def faster_dtype(device: torch.device, width: int, rows: int = 512, rounds: int = 5) -> tuple[torch.dtype, str]:
    """float32 or bfloat16, whichever multiplies [rows, width] x [width, width] sooner here, and a sentence about it.

    Timed in alternation, the best of each: a processor without bfloat16 instructions is several times slower with it.
    """
    best: dict[torch.dtype, float] = {}
    operands = {dtype: _operands(dtype, device, rows, width) for dtype in (torch.float32, torch.bfloat16)}
    for _ in range(rounds):
        for dtype, (left, right) in operands.items():
            start = time.perf_counter()
            (left @ right).flatten()[0].item()  # the item waits for the device
            best[dtype] = min(best.get(dtype, float("inf")), time.perf_counter() - start)
    ratio = best[torch.float32] / best[torch.bfloat16]
    chosen = torch.bfloat16 if ratio > 1.1 else torch.float32
    return chosen, f"products run in {name_of(chosen)}: here bfloat16 is {ratio:.2f} times as fast as float32"


def _operands(dtype: torch.dtype, device: torch.device, rows: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(rows, width, generator=generator).to(device, dtype)
    right = torch.randn(width, width, generator=generator).to(device, dtype)
    return left, right


def choose_arithmetic(
    compute_dtype: str, sparse_products: str, attention: str, device: torch.device, widest: int, published: bool
) -> tuple[Arithmetic, list[str]]:
    notes = []
    if compute_dtype == "auto":
        compute, sentence = faster_dtype(device, widest)
        notes.append(sentence)
    else:
        compute = dtype_named(compute_dtype)
    return fastest(compute, device, published), notes
