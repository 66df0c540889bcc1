"""Kills a real pruning run at random moments, resumes it each time, and compares all shards with an undisturbed run.

    python benchmarks/kill_and_resume.py MODEL DATA FOLDER [--kills 10] [--method "wrp(alpha=0.25)"]

Moments are random within the time that an undisturbed run takes; one after the end of a run is not counted.
"""

import argparse
import hashlib
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.safetensors"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--method", default="wrp(alpha=0.25)")
    parser.add_argument("--num-samples", default="8")
    parser.add_argument("--seq-length", default="256")
    asked = parser.parse_args()

    def command(target: Path) -> list[str]:
        return [
            *(sys.executable, "-m", "budwood", "prune", asked.model, str(target), "--method", asked.method),
            *("--data", asked.data, "--num-samples", asked.num_samples, "--seq-length", asked.seq_length, "--quiet"),
            *("--compute-dtype", "float32", "--sparse-products", "off", "--attention", "fused"),  # the same in all runs
        ]

    whole, cut = asked.folder / "whole", asked.folder / "cut"
    shutil.rmtree(asked.folder, ignore_errors=True)
    start = time.monotonic()
    subprocess.run(command(whole), check=True, stdout=subprocess.DEVNULL)
    duration = time.monotonic() - start
    wanted = digests(whole)
    print(f"undisturbed: {duration:.1f} s, {len(wanted)} shards")

    chance = random.Random(0)
    kills = same = 0
    while kills < asked.kills:
        process = subprocess.Popen(command(cut), stdout=subprocess.DEVNULL)
        moment = chance.uniform(0.1, 0.95) * duration
        try:
            process.wait(moment)
            continue  # finished before the moment: start again
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        finished = len(list(cut.glob("*.safetensors"))) if cut.is_dir() else 0
        subprocess.run(command(cut), check=True, stdout=subprocess.DEVNULL)
        identical = digests(cut) == wanted
        same += identical
        print(f"killed after {moment:5.1f} s with {finished:2d} shards; resumed: identical {identical}", flush=True)
        shutil.rmtree(cut)
    print(f"{same} of {kills} byte-identical")
    sys.exit(same != kills)


if __name__ == "__main__":
    main()
