"""The Triton kernels compile for real devices, with wide loads and no spills; no device is needed: `make gpu-check`."""

import os
import re
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed; `make gpu-check` installs it")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing: unset TRITON_INTERPRET", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from budwood.kernels import gpu_products

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
POINTERS = {
    "x": "*i16", "turned": "*i16", "values": "*i16", "index": "*i32", "entries": "*i32", "starts": "*i32",
    "bias": "*i16", "partial": "*fp32", "y": "*bf16", "dense": "*i16",
}  # fmt: skip
DEVICES = pytest.mark.parametrize("capability", [80, 90], ids=["sm_80", "sm_90"])
HALVES = pytest.mark.parametrize("half", [False, True], ids=["bf16", "fp16"])
ROWS = pytest.mark.parametrize("rows", [1, 2, 4])


def compiled(kernel, capability, constants, half=False):
    """The kernel as a launch with aligned tensors and a width that divides by 16 would compile it."""
    constants = dict(constants)
    warps = constants.pop("num_warps", 4)
    names, divisible = kernel.arg_names, [["tt.divisibility", 16]]
    types = POINTERS | dict.fromkeys(constants, "constexpr")
    if half:
        types["y"] = "*fp16"
    signature = {name: types.get(name, "i32") for name in names}
    aligned = [name for name in names if signature[name].startswith("*") or name == "width"]
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): divisible for name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def stack(kernel, folder):
    """Bytes of stack per thread: spilled registers."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([CUOBJDUMP, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\d+)", usage.stdout)[1])


@DEVICES
@HALVES
@ROWS
def test_two_four_rows(rows, half, capability, tmp_path):
    tile = gpu_products.rows_tile(rows, 128)
    kernel = compiled(gpu_products.two_four_rows, capability, {"HALF": half, "BIASED": True, "STRIDE": 8, **tile}, half)
    ptx = kernel.asm["ptx"]
    assert len(re.findall(r"ld\.global\.b64|ld\.global\.v2\.b32", ptx)) == 8 * rows  # x, four numbers at once
    assert stack(kernel, tmp_path) == 0


@DEVICES
@HALVES
@pytest.mark.parametrize("rows", [16, 32, 64])
def test_two_four_dot(rows, half, capability, tmp_path):
    constants = {"HALF": half, "WIDE": False, "STRIDE": 8, **gpu_products.dot_tile(rows, 64, 4096)}
    kernel = compiled(gpu_products.two_four_dot, capability, constants)
    assert re.search(r"mma\.sync|wgmma", kernel.asm["ptx"])
    assert stack(kernel, tmp_path) == 0


@DEVICES
def test_the_dense_matrix(capability, tmp_path):
    kernel = compiled(gpu_products.two_four_dense, capability, {"STRIDE": 8, "TALL": 4, "LANES": 128})
    assert re.search(r"st\.global\.b64|st\.global\.v2\.b32", kernel.asm["ptx"])  # four columns at once
    assert "bar.sync" in kernel.asm["ptx"]
    assert stack(kernel, tmp_path) == 0
