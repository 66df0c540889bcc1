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
class Ended:
    status: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


def budwood(*arguments: object, **environment: str) -> Ended:
    """Run `budwood` with these arguments in a process of its own, away from any hub."""
    done = subprocess.run(
        [sys.executable, "-m", "budwood", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)} | environment,
        timeout=240,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def run():
    return budwood


@pytest.fixture
def told(monkeypatch, capfd):
    """Run a command in this process, which spares the second that a new one needs to import everything."""

    def invoke(*arguments: object) -> Ended:
        from budwood.cli import main

        monkeypatch.setattr(sys, "argv", ["budwood", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return Ended(int(ended.value.code or 0), out, err)

    return invoke
