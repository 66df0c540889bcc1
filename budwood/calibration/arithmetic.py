"""In which type the products of the forward passes run; sums, criteria and solvers are float32 or better anyway."""

import time

import torch

from budwood.errors import UsageError

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
        device = torch.device(name or "cpu")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


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


def _operands(dtype: torch.dtype, device: torch.device, rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(rows, width, generator=generator).to(device, dtype)
    right = torch.randn(width, width, generator=generator).to(device, dtype)
    return left, right
