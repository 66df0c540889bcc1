"""The command as a user runs it: the real entry point, with stdout and stderr apart."""

import json
import sys
from dataclasses import dataclass
from typing import Any

import pytest
from processes import start


@dataclass(frozen=True)
class Result:
    status: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Run a command in a process of its own, without access to the hub."""

    def invoke(*arguments: object) -> Result:
        folder = tmp_path_factory.mktemp("output")
        process = start(arguments, folder / "out", folder / "err")
        process.join(240)
        assert process.exitcode is not None, "the command did not end"
        return Result(process.exitcode, (folder / "out").read_text(), (folder / "err").read_text())

    return invoke


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
