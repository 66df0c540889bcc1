"""The description of the machine, also where the system does not provide a figure."""

import json
import subprocess
import sys

import pytest

from budwood import environment
from budwood.environment import machine


def test_it_is_json_with_every_version():
    found = environment.environment()
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["torch"]
    assert set(found["versions"]) == {*environment.NEEDED, *environment.OPTIONAL}
    assert found["cores"] >= 1


def test_kernels_are_timed_on_request_only():
    names = {name for name in environment.environment(measure=True) if name.startswith("fastest in ")}
    assert names == {f"fastest in {dtype}" for dtype in environment.fastest_kernels()}
    assert not [name for name in environment.environment() if name.startswith("fastest in ")]


def test_the_version_of_a_missing_package_is_none():
    assert environment.installed("no-such-package-as-this") is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"avx2", "avx512f", "avx512_bf16"}, "AVX-512 bf16"),
        ({"avx2", "avx512f"}, "AVX-512"),
        ({"avx2"}, "AVX2"),
        ({"asimd", "bf16"}, "NEON bf16"),
        (set(), "baseline"),
    ],
)
def test_the_widest_instructions_are_named(flags, words, monkeypatch):
    monkeypatch.setattr(environment, "processor", lambda: ("a processor", frozenset(flags)))
    assert machine()["instructions"] == words


def test_the_plug_in_can_be_disabled(monkeypatch):
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    assert "off" in environment.plug_in() or "not registered" in environment.plug_in()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not separate the two")
def test_peak_memory_is_that_of_this_process_and_not_of_its_parent():
    ballast = bytearray(800_000_000)
    ballast[::4096] = b"x" * len(ballast[::4096])  # written to, so resident
    code = "from budwood.environment import peak_memory; print(peak_memory())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    own = environment.peak_memory()
    assert int(done.stdout) < len(ballast) < own
