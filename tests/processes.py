"""`budwood` in processes of their own, forked from one that has imported everything already."""

import multiprocessing
import os
import sys
from collections.abc import Mapping
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

OFFLINE = {"HF_HUB_OFFLINE": "1"}


@cache
def server() -> ForkServerContext:
    """Started here, since it looks for modules in PYTHONPATH alone, and passes over those that it does not find."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warm"])
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        for name, value in OFFLINE.items():  # which is read on import
            patched.setenv(name, value)
        forkserver.ensure_running()
    return context


def start(arguments: tuple[object, ...], out: Path, err: Path, environment: Mapping[str, str] = OFFLINE) -> BaseProcess:
    """Runs `budwood ARGUMENTS`; stdout and stderr go to files."""
    words = [str(argument) for argument in arguments]
    process = server().Process(target=run, args=(words, str(out), str(err), dict(environment)))
    process.start()
    return process


def run(arguments: list[str], out: str, err: str, environment: dict[str, str]) -> None:
    for file, descriptor in ((out, 1), (err, 2)):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, descriptor)
    os.environ.update(environment)
    sys.argv = ["budwood", *arguments]
    from budwood.cli import main

    main()
