"""Runs in processes of their own, so that memory and time are their own, and a crash is that of one run only."""

import contextlib
import multiprocessing
import os
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from budwood.checkpoints.files import write_json
from budwood.comparison.execute import ERROR, execute
from budwood.comparison.task import Task
from budwood.progress import Progress, Silent

PATIENCE = 10.0  # seconds that interrupted workers have to end
Ended = Callable[[Task, str | None], None]  # a run and the sentence of its failure


def run_all(tasks: Sequence[Task], jobs: int, speed: bool, progress: Progress, ended: Ended) -> None:
    """Carries out all tasks, `jobs` at a time; 0 carries them out in this process, one after the other.

    ended: called for each when it has ended. Raises KeyboardInterrupt after all workers have ended.
    """
    if jobs == 0:
        for task in tasks:
            ended(task, execute(task, progress, speed))
        return
    Workers(jobs, speed, progress if jobs == 1 else Silent()).run(tasks, ended)


class Workers:
    """A number of processes, each for one run."""

    def __init__(self, jobs: int, speed: bool, progress: Progress):
        methods = multiprocessing.get_all_start_methods()
        # A server imports torch once and forks before anything was computed; fork itself would copy running threads.
        self.context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:
            self.context.set_forkserver_preload(["budwood.comparison.execute"])
        self.jobs, self.speed, self.progress = jobs, speed, progress
        self.running: dict[Connection, tuple[Any, Task]] = {}

    def run(self, tasks: Sequence[Task], ended: Ended) -> None:
        waiting = list(tasks)
        try:
            while waiting or self.running:
                while waiting and len(self.running) < self.jobs:
                    self.start(waiting.pop(0))
                for connection in wait(list(self.running)):
                    self.listen(connection, ended)  # type: ignore[arg-type]
        except BaseException:
            self.stop()
            raise

    def start(self, task: Task) -> None:
        ours, theirs = self.context.Pipe(duplex=False)
        process = self.context.Process(target=work, args=(task, self.speed, theirs, threads(self.jobs)), name=task.name)
        process.start()
        theirs.close()
        self.running[ours] = (process, task)

    def listen(self, connection: Connection, ended: Ended) -> None:
        """One event of a worker: progress, its result, or the end of its process."""
        process, task = self.running[connection]
        try:
            what, arguments = connection.recv()
        except (EOFError, OSError):
            process.join()
            del self.running[connection]
            failed = f"its process ended with status {process.exitcode}" + (
                f" (signal {-process.exitcode}; there may be too little memory)" if process.exitcode < 0 else ""
            )
            if task.folder.is_dir():
                write_json(task.folder / ERROR, {"error": failed})
            ended(task, failed)
            return
        if what == "ended":
            process.join()
            del self.running[connection]
            ended(task, *arguments)
        else:
            getattr(self.progress, what)(*arguments)

    def stop(self) -> None:
        """Ends all workers: Ctrl-C has reached them too, others are told to."""
        for process, _ in self.running.values():
            process.terminate()
        for process, _ in self.running.values():
            process.join(PATIENCE)
            if process.is_alive():
                process.kill()
                process.join()


def threads(jobs: int) -> int | None:
    """Threads of each worker; None leaves torch's choice, which one worker and OMP_NUM_THREADS have."""
    if jobs == 1 or "OMP_NUM_THREADS" in os.environ:
        return None
    return max(1, len(os.sched_getaffinity(0)) // jobs if hasattr(os, "sched_getaffinity") else 1)


def work(task: Task, speed: bool, connection: Connection, count: int | None) -> None:
    """The body of a worker process."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore")
    if count is not None:
        import torch

        torch.set_num_threads(count)
    with contextlib.redirect_stdout(sys.stderr):
        try:
            sentence = execute(task, Relay(connection), speed)
        except KeyboardInterrupt:
            os._exit(130)  # the command itself says what to do
        connection.send(("ended", (sentence,)))


def end_with_parent() -> None:
    """Ends this process when the one that started it is gone, however that ended: nobody would note the result."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class Relay:
    """Progress that is told to the process that shows it."""

    def __init__(self, connection: Connection):
        self.connection = connection

    def start(self, total: int, what: str) -> None:
        self.connection.send(("start", (total, what)))

    def block(
        self,
        index: int,
        name: str,
        seconds: float,
        relative_error: float | None = None,
        loss: float | None = None,
    ) -> None:
        self.connection.send(("block", (index, name, seconds, relative_error, loss)))

    def note(self, sentence: str) -> None:
        self.connection.send(("note", (sentence,)))

    def finish(self) -> None:
        self.connection.send(("finish", ()))
