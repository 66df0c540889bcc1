"""Packed tensors with small damage, for products that must be refused, or right and inside their memory.

    python tests/kernels/mutants.py [COUNT] [SEED]

Every mutant goes the way of a file (`SparseLinear.from_packed`), and every second one also that of a change in place
after a first product. What is accepted is multiplied by all kernels of all paths and equals the unpacked matrix;
`make sanitize` runs it under AddressSanitizer and UBSan.
"""

import contextlib
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor

from budwood.errors import RunError, UsageError
from budwood.formats import FORMATS
from budwood.formats.bits import raw
from budwood.kernels import native, tiles
from budwood.kernels.linear import SparseLinear
from budwood.kernels.native import FEW_ROWS, PANELS, SPARSE
from budwood.kernels.native_matrix import IN_TILES_ONLY, NativeMatrix, native_matrix

SHAPES = [(9, 64), (8, 260), (3, 520), (5, 36), (16, 256), (4, 4)]
ROWS = (1, 3, 8, 17)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPARSE_FORMATS = sorted(set(FORMATS) - {"dense"})


def honest(format: str, shape: tuple[int, int], dtype: torch.dtype, random: random.Random) -> dict[str, Tensor]:
    """A packed matrix: 2:4, for most formats with recovered weights, many of them in some rows."""
    generator = torch.Generator().manual_seed(random.getrandbits(32))
    out, width = shape
    weight = torch.randn(shape, generator=generator) * 0.1
    keep = torch.rand(out, width // 4, 4, generator=generator).argsort(-1).argsort(-1).view(shape) < 2
    if format not in ("two_four", "two_four_int8", "two_four_int4"):
        keep |= torch.rand(shape, generator=generator) < random.choice((0.02, 0.3))
        keep[random.randrange(out)] |= random.random() < 0.5
    return FORMATS[format].nearest(torch.where(keep, weight, 0).to(dtype))


def mutated(tensors: dict[str, Tensor], random: random.Random, same_sizes: bool) -> dict[str, Tensor]:
    """One to three changes of positions, counts, scales, values; with `same_sizes` no other sizes and dtypes."""
    found = {suffix: tensor.clone() for suffix, tensor in tensors.items()}
    for _ in range(random.randint(1, 3)):
        suffix = random.choice([name for name, tensor in found.items() if tensor.numel()])
        flat = raw(found[suffix]).view(-1) if found[suffix].dtype != torch.uint8 else found[suffix].view(-1)
        i = random.randrange(flat.numel())
        j = min(i + 1, flat.numel() - 1)
        change = random.randrange(8 if same_sizes else 10)
        if change == 0:
            flat[i] ^= 1 << random.randrange(8 * flat.element_size() - 1)
        elif change == 1:
            flat[j] = flat[i].clone()  # repeated
        elif change == 2:
            flat[i], flat[j] = flat[j].clone(), flat[i].clone()  # out of order
        elif change == 3:
            flat[i:] = flat[i].clone()
        elif change == 4:
            flat[i] = random.choice((0, 1, 127))
        elif change == 5:
            flat[i] += 1
            flat[random.randrange(flat.numel())] -= 1  # the sum stays
        elif change == 6:
            flat[i : i + 100] = flat[i : i + 100].flip(0)
        elif change == 7:
            flat[i] = flat[random.randrange(flat.numel())].clone()
        elif change == 8:
            found[suffix] = found[suffix][: found[suffix].shape[0] - 1].clone()
        else:
            found[suffix] = found[suffix].to(random.choice((torch.float64, torch.float8_e4m3fn, torch.int32)))
    return found


def error(product: Tensor, x: Tensor, weight: Tensor) -> float:
    """Largest difference to the product in float64, relative to the sum of the magnitudes that were added.

    Activations count as their mean at least: with int8 values they are integers with a common scale. Subnormal numbers
    have a common spacing, so they count as the smallest normal one.
    """
    magnitude = x.double().abs()
    magnitude = magnitude.maximum(magnitude.mean(1, keepdim=True))
    exact, size = x.double() @ weight.double().T, magnitude @ weight.double().abs().T
    usable = (size < 1e30) & size.isfinite()
    return (
        float(
            ((product.double() - exact).abs() / size.clamp(min=torch.finfo(product.dtype).tiny))[usable]
            .max()
            .nan_to_num(1e9)
        )
        if bool(usable.any())
        else 0.0
    )


def products(matrix: NativeMatrix, width: int, dtype: torch.dtype, kernels: tuple[int, ...]) -> Iterator[tuple]:
    for rows in ROWS:
        x = torch.randn(rows, width).to(dtype)
        for kernel in kernels:
            found = matrix.linear(x, None, kernel)
            if found is not None:
                yield x, found


def multiply_all(format: str, shape: tuple[int, int], tensors: dict[str, Tensor], accepted: bool) -> None:
    """With every path; what was accepted has the right products, in the layout of the file and in tiles."""
    weight = FORMATS[format].unpack(tensors, shape) if accepted else None
    dtype = tensors[FORMATS[format].typed].dtype
    for path in paths():
        os.environ[native.VARIABLE] = path
        matrices = []
        with contextlib.suppress(RunError):
            matrices = [native_matrix(format, shape, tensors)]
            if format in IN_TILES_ONLY or (native.has_tiles() and matrices[0] is not None):
                packed = tiles.pack(format, shape, tensors)
                if packed is not None:
                    back = packed.unpack()
                    assert all(torch.equal(raw_bits(back[name]), raw_bits(tensors[name])) for name in tensors)
                    matrices.append(packed.matrix)
        assert matrices or not accepted, f"the {path} path refuses a {format} matrix that is sound"
        for matrix in filter(None, matrices):
            for x, product in products(matrix, shape[1], dtype, (FEW_ROWS, SPARSE, PANELS)):
                if weight is not None:
                    assert error(product, x, weight) < 2e-4 + 2 * torch.finfo(dtype).eps, (format, shape, path)


def raw_bits(tensor: Tensor) -> Tensor:
    return tensor if not tensor.is_floating_point() else raw(tensor)


def paths() -> list[str]:
    """The paths of the library that this machine can run."""
    library = native.opened("auto") if native.file() else None
    found = [
        p for p in ("scalar", "avx2", "avx512", "amx") if library is not None and library.budwood_choose(p.encode())
    ]
    if library is not None:
        library.budwood_choose(native._chosen.encode() or b"auto")
    return found


def campaign(count: int, seed: int = 0) -> Counter:
    """Tries `count` mutants; returns how many were accepted and refused. Raises `AssertionError` for wrong products."""
    chance, before, done = random.Random(seed), os.environ.get(native.VARIABLE), Counter()
    torch.manual_seed(seed)
    limit, tiles.LIMIT = tiles.LIMIT, float("inf")  # in tiles, small as they are
    try:
        for turn in range(count):
            format, shape = SPARSE_FORMATS[turn % len(SPARSE_FORMATS)], chance.choice(SHAPES)
            if format == "two_four_ell" and shape[0] % 4:
                shape = SHAPES[4]
            os.environ[native.VARIABLE] = "auto"
            tensors = honest(format, shape, chance.choice(DTYPES), chance)
            done[try_one(format, shape, tensors, chance, in_place=turn // len(SPARSE_FORMATS) % 2 == 1)] += 1
    finally:
        tiles.LIMIT = limit
        os.environ.pop(native.VARIABLE)
        if before is not None:
            os.environ[native.VARIABLE] = before
    return done


def try_one(
    format: str, shape: tuple[int, int], tensors: dict[str, Tensor], chance: random.Random, in_place: bool
) -> str:
    mutant = mutated(tensors, chance, same_sizes=in_place)
    try:
        SparseLinear.from_packed(format, shape, mutant)
        verdict = "accepted"
    except RunError:
        verdict = "refused"
    if in_place:
        layer = SparseLinear.from_packed(format, shape, {suffix: tensor.clone() for suffix, tensor in tensors.items()})
        x = torch.randn(3, shape[1]).to(tensors[FORMATS[format].typed].dtype)
        with torch.no_grad():
            layer(x)
            for suffix, tensor in mutant.items():
                layer.get_parameter(suffix).copy_(tensor)
            if verdict == "accepted":
                assert error(layer(x), x, layer.unpack()) < 2e-4 + 2 * torch.finfo(x.dtype).eps, format
            else:
                with contextlib.suppress(RuntimeError, KeyError, IndexError, ValueError, UsageError):
                    layer(x)
    consistent = all(tensor.is_floating_point() == tensors[name].is_floating_point() for name, tensor in mutant.items())
    if consistent:
        multiply_all(format, shape, mutant, verdict == "accepted")
    return verdict


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:]] or [30_000]
    result = campaign(*numbers)
    print(f"{sum(result.values())} mutants: {', '.join(f'{n} {verdict}' for verdict, n in sorted(result.items()))}")
