"""One fault after the other: the world is set up, a process meets the fault, and what is left is judged."""

import errno
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fault_kinds import TAKES_SPACE, Wire, do_at, fail_at, kill_at, limit_file_size, limit_handles
from fault_processes import Done, Process, finished, loaded
from fault_verbs import CHANGED, Verb, content, left_alone, put, result

NOTES = "notes.txt"  # of the user, in a folder that is overwritten
KINDS = ("SIGKILL", "SIGTERM", "SIGINT", "disk full", "disk error", "few handles", "source lost", "source changed")
KINDS = (*KINDS, "two at once")


@dataclass(frozen=True)
class Undisturbed:
    """What a verb does without a fault: kinds of its file operations, seconds, its result, what that loads as."""

    kinds: list[str]
    seconds: float
    new: Any
    changed: Any  # the result with a changed source
    loads: frozenset[str]  # digests of logits: former and new
    loads_changed: frozenset[str]

    @property
    def operations(self) -> int:
        return len(self.kinds)

    def that_take_space(self) -> list[int]:
        """The numbers of these operations; all where there are none."""
        found = [number for number, kind in enumerate(self.kinds, start=1) if kind in TAKES_SPACE]
        return found or [*range(1, self.operations + 1)]


class Campaign:
    """world: a folder with the prepared models, `source` and `target`."""

    def __init__(self, world: Path):
        self.world = world
        self.known: dict[str, Undisturbed] = {}

    def reset(self, verb: Verb, ending: str = "") -> None:
        shutil.rmtree(self.world / "target", ignore_errors=True)
        shutil.rmtree(self.world / "source", ignore_errors=True)
        if verb.source is not None:
            put(self.world, verb.source + ending, "source")
        if verb.former is not None:
            (put(self.world, verb.former, "target") / NOTES).write_text("mine")

    def start(self, verb: Verb, arm: Callable[[], object] = lambda: None) -> Process:
        return Process(verb.command(self.world), arm)

    def again(self, verb: Verb) -> Done:
        return finished(self.start(verb))

    def undisturbed(self, verb: Verb) -> Undisturbed:
        if verb.name not in self.known:
            results, loads, seconds, kinds = [], [], 0.0, [""]
            for ending in (CHANGED, "") if verb.source is not None else ("",):
                self.reset(verb, ending)
                former = loaded(self.world / "target")
                handle = os.open(self.world / "operations", os.O_CREAT | os.O_TRUNC | os.O_RDWR | os.O_APPEND)
                start = time.monotonic()
                done = finished(self.start(verb, partial(count, handle, self.world)))
                seconds = time.monotonic() - start
                os.close(handle)
                kinds = (self.world / "operations").read_text().split()
                if done.status != 0:
                    sys.exit(f"{verb.name} fails without a fault: {done.errors}")
                results.append(result(verb, self.world, done.printed))
                loads.append(frozenset({former, loaded(self.world / "target")} - {""}))
            self.known[verb.name] = Undisturbed(kinds, seconds, results[-1], results[0], loads[-1], loads[0])
        return self.known[verb.name]

    def inject(self, verb: Verb, kind: str, chance: random.Random) -> tuple[str, str]:
        """One fault: outcome, and what was seen."""
        known = self.undisturbed(verb)
        self.reset(verb)
        source = left_alone(verb, self.world / "source")
        if kind == "two at once":
            return self.two_at_once(verb, known, chance)
        if kind in ("source lost", "source changed"):
            return self.bad_source(verb, known, kind, chance)
        process, what = self.disturbed(verb, known, kind, chance)
        sent = signal.Signals[kind] if kind.startswith("SIG") else None
        done = finished(process)
        ended = self.ended(verb, known, done, sent)
        if ended is not None:
            return ended[0], f"{what}: {ended[1]}"
        if left_alone(verb, self.world / "source") != source:
            return "lost", f"{what}: the source changed"
        outcome, seen = self.completes(verb, known)
        if outcome != "survived":
            return outcome, f"{what}: after {done}: {seen}"
        return "refused" if done.status else "survived", what

    def disturbed(self, verb: Verb, known: Undisturbed, kind: str, chance: random.Random) -> tuple[Process, str]:
        """A process that meets the fault, and the fault in words."""
        moment = chance.randint(1, known.operations)
        if kind.startswith("SIG"):
            sent = signal.Signals[kind]
            if chance.random() < 0.5:
                seconds = chance.uniform(0, known.seconds)
                process = self.start(verb)
                process.send_after(seconds, sent)
                return process, f"{kind} after {seconds:.3f} s"
            act, what = kill_at(moment, sent), f"{kind} at operation {moment}"
        elif kind == "few handles":
            more = chance.randint(0, 4)
            return self.start(verb, lambda: limit_handles(more)), f"{more} file handles more"
        elif kind == "disk full" and chance.random() < 0.3:
            most = int(4096 * 1.5 ** chance.uniform(0, 6))
            return self.start(verb, lambda: limit_file_size(most)), f"files of at most {most} bytes"
        else:
            lasting = chance.random() < 0.5
            code = errno.ENOSPC if kind == "disk full" else errno.EIO
            moment = chance.choice(known.that_take_space()) if kind == "disk full" else moment
            act = fail_at(moment, code, lasting)
            what = f"{errno.errorcode[code]} {'from' if lasting else 'at'} operation {moment}"
        return self.start(verb, lambda: Wire(act).lay(self.world)), what

    def ended(
        self, verb: Verb, known: Undisturbed, done: Done, sent: signal.Signals | None, changed: bool = False
    ) -> tuple[str, str] | None:
        """What is lost or wrong after a process ended; None if nothing."""
        if done.signal is not None and done.signal != sent:
            return "lost", f"it {done}"
        if done.status and not done.is_sentence():
            return "lost", f"no sentence: {done}"
        notes = self.world / "target" / NOTES
        if verb.former is not None and not (notes.is_file() and notes.read_text() == "mine"):
            return "lost", "a file of the user"
        found, loads = loaded(self.world / "target"), known.loads | (known.loads_changed if changed else set())
        if found and found not in loads:
            return "wrong", f"after {done}: it loads, with other weights"
        if not found and (self.world / "target" / "config.json").is_file() and not verb.prints:
            return "lost", f"after {done}: a finished folder that does not load"
        allowed = [known.new, known.changed] if changed else [known.new]
        if done.status == 0 and result(verb, self.world, done.printed) not in allowed:
            return "wrong", f"success with {self.difference(verb, known, done.printed)}"
        return None

    def completes(self, verb: Verb, known: Undisturbed, may_refuse: bool = False) -> tuple[str, str]:
        """Whether the same command, undisturbed, leaves what it always leaves.

        may_refuse: what was read of a source that changed meanwhile cannot be continued, and a sentence may say so.
        """
        done = self.again(verb)
        wrong = self.ended(verb, known, done, None)
        if wrong is not None:
            return wrong[0], f"the same command: {wrong[1]}"
        if done.status and may_refuse:
            return "survived", ""
        if done.status and (verb.prints or result(verb, self.world, done.printed) != known.new):
            return "lost", f"the same command: {done}"
        return "survived", ""

    def bad_source(self, verb: Verb, known: Undisturbed, kind: str, chance: random.Random) -> tuple[str, str]:
        source = self.world / "source"
        moment = chance.randint(1, known.operations)
        before, other = content(source), content(self.world / "prepared" / f"{verb.source}{CHANGED}")
        names = [name for name in before if before[name] != other[name]]
        weights = [name for name in before if name.endswith((".safetensors", ".gguf"))]
        chosen = chance.choice(weights)
        ways: dict[str, Callable[[], object]] = {
            "the folder is away": lambda: source.rename(self.world / "away"),
            f"{chosen} is deleted": lambda: (source / chosen).unlink(),
            f"{chosen} is truncated": lambda: os.truncate(source / chosen, len(before[chosen]) // 2),
        }
        if kind == "source changed":
            ways = {
                "it is written over": lambda: [overwrite(source / name, other[name]) for name in names],
                "it is replaced": lambda: [replace(source / name, other[name]) for name in names],
            }
        way = chance.choice(sorted(ways))
        what = f"{way} at operation {moment}"
        done = finished(self.start(verb, lambda: Wire(do_at(moment, ways[way])).lay(self.world)))
        shutil.rmtree(self.world / "away", ignore_errors=True)
        changed = kind == "source changed"
        ended = self.ended(verb, known, done, None, changed)
        if ended is not None:
            return ended[0], f"{what}: {ended[1]}"
        taken = done.status == 0 and changed and result(verb, self.world, done.printed) == known.changed
        if taken or (changed and content(source) != before):
            second = self.again(verb)
            ended = self.ended(verb, known, second, None, changed)
            if ended is not None:
                return ended[0], f"{what}: after {done}, with the changed source: {ended[1]}"
            if second.status == 0 and result(verb, self.world, second.printed) != known.changed:
                return "wrong", f"{what}: after {done}, success with the changed source leaves the former result"
            if taken or second.status == 0:
                return "refused" if done.status else "survived", what
        put(self.world, str(verb.source), "source")
        outcome, seen = self.completes(verb, known, may_refuse=changed)
        return (outcome, f"{what}: after {done}: {seen}") if seen else ("refused" if done.status else "survived", what)

    def two_at_once(self, verb: Verb, known: Undisturbed, chance: random.Random) -> tuple[str, str]:
        seconds = chance.uniform(0, known.seconds)
        first = self.start(verb)
        time.sleep(seconds)
        second = self.start(verb)
        ends = [finished(second), finished(first)]
        what = f"the second after {seconds:.3f} s"
        for done in ends:
            if done.signal is not None or (done.status and not done.is_sentence()):
                return "lost", f"{what}: no sentence: {done}"
        if all(done.status for done in ends):
            return "lost", f"{what}: none finished: {ends[0]}; {ends[1]}"
        best = next(done for done in ends if done.status == 0)
        ended = self.ended(verb, known, best, None)
        if ended is not None:
            return ended[0], f"{what}: {ended[1]}"
        outcome, seen = self.completes(verb, known)
        if seen:
            return outcome, f"{what}: {seen}"
        return "refused" if any(done.status for done in ends) else "survived", what

    def difference(self, verb: Verb, known: Undisturbed, printed: str) -> str:
        found = result(verb, self.world, printed)
        if not isinstance(found, dict):
            return "another result"
        names = sorted(name for name in found.keys() | known.new.keys() if found.get(name) != known.new.get(name))
        return f"other bytes in {', '.join(names[:4])}"


def count(handle: int, world: Path) -> None:
    """Writes the kind of every file operation of this process from now on, a line each."""
    Wire(lambda number, kind: os.write(handle, f"{kind}\n".encode()) and None).lay(world)


def overwrite(file: Path, data: bytes) -> None:
    """As `cp` does it: the same file, new bytes."""
    descriptor = os.open(file, os.O_WRONLY | os.O_TRUNC)
    os.write(descriptor, data)
    os.close(descriptor)


def replace(file: Path, data: bytes) -> None:
    """As a download does it: another file of the same name."""
    overwrite(shutil.copy(file, file.with_name("new")), data)
    os.rename(file.with_name("new"), file)
