"""Gives mutated inputs to everything that reads files and expressions, in processes that may crash.

    python tests/fuzz/fuzz_campaign.py [--count 100000] [--seed 0] [--target packed] [--only NUMBER] [--keep FOLDER]

An input is accepted, refused with a sentence of budwood, or a finding: an exception of another kind, a process that
ends, 20 seconds without an answer, memory beyond 2 GiB above what the process has at its start, or what is accepted
and is not what it says. Every input is determined by the seed and its number. The status is 1 if there are findings;
each kind is shown once, with its first input. `--only` runs one input in this process, with the traceback; `--keep`
leaves its files in a folder.
"""

import argparse
import contextlib
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for families.py
sys.path.insert(0, str(Path(__file__).parents[2]))  # for budwood, where it is not installed

import torch
from fuzz_folders import Unsound
from fuzz_seeds import FAMILIES, LAYOUTS, Seeds
from fuzz_targets import TARGETS, Target

from budwood.errors import BudwoodError

HANG = 20.0  # seconds of computing, or of waiting for something
MEMORY = 2 << 30  # bytes beyond those of the process at its start
BATCH = 400  # inputs per process: what one leaves behind does not add up
EACH = 2000  # inputs from one line of progress to the next
OUTCOMES = ("accepted", "refused", "crash", "hang", "memory", "unsound")


def target_of(chance: random.Random, targets: Sequence[Target]) -> Target:
    return chance.choices(targets, [target.share for target in targets])[0]


def answer(number: int, seed: int, targets: Sequence[Target], seeds: Seeds, folder: Path) -> tuple[str, str, str]:
    """Name of the target, outcome, and what tells one finding from others."""
    chance = random.Random(f"{seed} {number}")
    target = target_of(chance, targets)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        target.run(chance, seeds, folder)
    except BudwoodError:
        return target.name, "refused", ""
    except Unsound as found:
        return target.name, "unsound", str(found)
    except MemoryError:
        return target.name, "memory", "MemoryError"
    except BaseException as error:  # a panic of a library in Rust is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        outcome = "memory" if "allocate memory" in str(error) or "alloc" in type(error).__name__ else "crash"
        return target.name, outcome, f"{type(error).__name__} in {frame_of(error)} | {str(error)[:90]!r}"
    return target.name, "accepted", ""


def frame_of(error: BaseException) -> str:
    """The innermost line of budwood in the traceback."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/budwood/" in frame.filename]
    return f"{frames[-1].filename.rpartition('/budwood/')[2]}:{frames[-1].lineno}" if frames else "the target"


def quiet() -> None:
    """One thread; nothing of other libraries on the terminal; no network."""
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")
    os.environ.setdefault("BUDWOOD_KERNELS", "auto")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    import transformers

    transformers.logging.set_verbosity(transformers.logging.CRITICAL)


def work(numbers: range, asked: argparse.Namespace, targets: Sequence[Target], seeds: Seeds, pipe: int) -> None:
    """Answers in a process of its own, a line each; never returns."""
    status = 1
    try:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        pages = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (pages + MEMORY, pages + MEMORY))
        for number in numbers:
            found = answer(number, asked.seed, targets, seeds, seeds.folder / "input")
            line = "\t".join([str(number), *(part.replace("\t", " ").replace("\n", " ") for part in found)])
            os.write(pipe, line.encode(errors="replace")[:4000] + b"\n")
        status = 0
    finally:
        os._exit(status)


def answers(asked: argparse.Namespace, targets: Sequence[Target], seeds: Seeds) -> Iterator[tuple[int, str, str, str]]:
    """All answers, those of processes that crashed or hung included."""
    following = 0
    while following < asked.count:
        numbers = range(following, min(asked.count, following + BATCH))
        end, inner = os.pipe()
        child = os.fork()
        if child == 0:
            work(numbers, asked, targets, seeds, inner)
        os.close(inner)
        rest, hung, watch = b"", False, Watch(child)
        while True:
            while not select.select([end], [], [], 1.0)[0]:
                if not hung and watch.hangs():
                    hung = True
                    os.kill(child, signal.SIGKILL)
            part = os.read(end, 1 << 16)
            watch = Watch(child)
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                number, *found = line.decode(errors="replace").split("\t")
                yield int(number), found[0], found[1], found[2]
                following = int(number) + 1
            if not part:
                break
        os.close(end)
        _, code = os.waitpid(child, 0)
        if code:
            name = target_of(random.Random(f"{asked.seed} {following}"), targets).name
            how = f"signal {signal.Signals(code & 127).name}" if code & 127 else f"status {code >> 8}"
            yield following, name, "hang" if hung else "crash", "no answer" if hung else f"the process ended: {how}"
            following += 1


class Watch:
    """What a process does since it was looked at first. On a busy machine seconds that pass say nothing."""

    def __init__(self, process: int):
        self.process, self.waited = process, 0
        self.begin, _ = self.used()

    def used(self) -> tuple[float, bool]:
        """Seconds of computing of the process so far, and whether it waits."""
        try:
            fields = Path(f"/proc/{self.process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0, False  # it has ended
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), fields[0] == "S"

    def hangs(self) -> bool:
        """To be asked every second."""
        seconds, waits = self.used()
        self.waited = self.waited + 1 if waits else 0
        return seconds - self.begin > HANG or self.waited > HANG


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", help="only targets whose name begins so")
    parser.add_argument("--only", type=int)
    parser.add_argument("--keep", type=Path)
    asked = parser.parse_args()
    targets = [target for target in TARGETS if target.name.startswith(asked.target or "")]
    if not targets:
        parser.error(f"there is no target {asked.target}; there are {', '.join(target.name for target in TARGETS)}")
    quiet()
    with tempfile.TemporaryDirectory(prefix="budwood-fuzz-") as folder:
        seeds = Seeds(Path(folder))
        make(seeds)
        if asked.only is not None:
            alone(asked, targets, seeds)
            return
        sys.exit(campaign(asked, targets, seeds))


def make(seeds: Seeds) -> None:
    """All seeds, before the processes that use them are forked."""
    with contextlib.redirect_stdout(sys.stderr):
        for name in FAMILIES:
            seeds.family(name)
        for layout in LAYOUTS:
            seeds.packed(layout)
        assert seeds.gguf
        assert seeds.compared
        assert seeds.measured
        assert seeds.interrupted
        assert seeds.retrained
        assert seeds.half_trained
        assert seeds.data


def alone(asked: argparse.Namespace, targets: Sequence[Target], seeds: Seeds) -> None:
    chance = random.Random(f"{asked.seed} {asked.only}")
    target = target_of(chance, targets)
    folder = asked.keep or seeds.folder / "input"
    folder.mkdir(parents=True, exist_ok=True)
    print(f"input {asked.only}: {target.name}")
    target.run(chance, seeds, folder)
    print("accepted")


def campaign(asked: argparse.Namespace, targets: Sequence[Target], seeds: Seeds) -> bool:
    """Prints findings as they come, then the table; whether there were any."""
    counts = {target.name: Counter[str]() for target in targets}
    kinds: dict[tuple[str, str, str], list[int]] = {}
    start = time.monotonic()
    for number, name, outcome, what in answers(asked, targets, seeds):
        counts[name][outcome] += 1
        if number and number % EACH == 0:
            left = (time.monotonic() - start) / number * (asked.count - number)
            print(f"{number} of {asked.count} inputs, {left / 60:.0f} min left", file=sys.stderr, flush=True)
        if outcome in ("accepted", "refused"):
            continue
        numbers = kinds.setdefault((name, outcome, what.partition(" | ")[0]), [])
        numbers.append(number)
        if len(numbers) == 1:
            print(f"{outcome}: input {number}, {name}: {what}", flush=True)
    width = max(map(len, counts))
    print(f"\n{'':{width}} " + " ".join(f"{outcome:>9}" for outcome in OUTCOMES))
    for name, found in counts.items():
        print(f"{name:{width}} " + " ".join(f"{found[outcome]:>9}" for outcome in OUTCOMES))
    for (name, outcome, what), numbers in sorted(kinds.items(), key=lambda item: -len(item[1])):
        print(f"{len(numbers):6} x {name}, {outcome}: {what} (input {numbers[0]})")
    total = sum(sum(found.values()) for found in counts.values())
    print(f"{total} inputs in {time.monotonic() - start:.0f} s, {len(kinds)} kinds of findings")
    return bool(kinds)


if __name__ == "__main__":
    main()
