"""The Triton kernels compile for real devices, with wide loads and no spills; no device is needed: `make gpu-check`."""

import os
import re
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed; `make gpu-check` brings it")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing: unset TRITON_INTERPRET", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from budwood.kernels import gpu_products

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
POINTERS = {
    "x": "*i16", "values": "*i16", "index": "*i32", "entries": "*i32", "order": "*i32", "bias": "*i16", "y": "*bf16",
    "mask": "*i64",
}  # fmt: skip
DEVICES = pytest.mark.parametrize("capability", [80, 90], ids=["sm_80", "sm_90"])
HALVES = pytest.mark.parametrize("half", [False, True], ids=["bf16", "fp16"])


def compiled(kernel, capability, constants):
    """The kernel as a launch with aligned tensors and a width that divides by 16 would compile it."""
    names, divisible = kernel.arg_names, [["tt.divisibility", 16]]
    starts = "*i32" if kernel is gpu_products.bitmask_rows else "*i64"
    types = POINTERS | {"starts": starts} | dict.fromkeys(constants, "constexpr")
    if constants["HALF"]:
        types["y"] = "*fp16"
    signature = {name: types.get(name, "i32") for name in names}
    aligned = [name for name in names if signature[name].startswith("*") or name == "width"]
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): divisible for name in aligned},
    )
    options = {"num_warps": gpu_products.WARPS}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def stack(kernel, folder):
    """Bytes of stack that a thread needs: registers that did not suffice."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    told = subprocess.run([CUOBJDUMP, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\d+)", told.stdout)[1])


@DEVICES
@HALVES
@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16])
def test_two_four_rows(rows, half, capability, tmp_path):
    constants = {"HALF": half, "BIASED": True, **gpu_products.rows_tile(rows)}
    kernel = compiled(gpu_products.two_four_rows, capability, constants)
    lanes = constants["SLAB"] * constants["HALVES"] // (32 * gpu_products.WARPS)
    assert kernel.asm["ptx"].count("ld.global.v4.b32") == lanes  # each lane's eight values are one load
    assert stack(kernel, tmp_path) == 0


@DEVICES
@HALVES
@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16])
def test_bitmask_rows(rows, half, capability, tmp_path):
    constants = {"HALF": half, "BIASED": True, **gpu_products.bitmask_tile(rows)}
    kernel = compiled(gpu_products.bitmask_rows, capability, constants)
    lanes = constants["SLAB"] * constants["BYTES"] // (32 * gpu_products.WARPS)
    assert kernel.asm["ptx"].count("ld.global.v4.b32") == lanes * rows  # x is what is read widely here
    assert stack(kernel, tmp_path) == 0


@DEVICES
@HALVES
@pytest.mark.parametrize("rows", [16, 32, 64])
def test_two_four_dot(rows, half, capability, tmp_path):
    constants = {"HALF": half, "BIASED": True, "WIDE": False, **gpu_products.dot_tile(rows)}
    kernel = compiled(gpu_products.two_four_dot, capability, constants)
    ptx = kernel.asm["ptx"]
    assert re.search(r"cp\.async\.c[ag]\.shared\.global .*0x10", ptx)  # 16 bytes of values straight to shared memory
    assert "mma.sync" in ptx
    assert stack(kernel, tmp_path) == 0
