"""The command as a user runs it: the real entry point, with stdout and stderr apart."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Result:
    status: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


def budwood(*arguments: object, **environment: str) -> Result:
    """Run `budwood` with these arguments in a process of its own, without access to the hub."""
    done = subprocess.run(
        [sys.executable, "-m", "budwood", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)} | environment,
        timeout=240,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def run():
    return budwood


@pytest.fixture
def run_here(monkeypatch, capfd):
    """Run a command in this process, which saves the seconds that a new one needs for its imports."""

    def invoke(*arguments: object) -> Result:
        from budwood.cli import main

        monkeypatch.setattr(sys, "argv", ["budwood", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        out, err = capfd.readouterr()
        return Result(int(exit_.value.code or 0), out, err)

    return invoke
