"""Injects faults into every verb that writes, and looks what is left: on the disk, to load, and for the same command.

    python benchmarks/faults.py [--count 200] [--seed 0] [--verb prune] [--kind "disk full"] [--only NUMBER]

Faults: SIGKILL, SIGTERM and SIGINT at a random moment or file operation; a full disk and an error of the disk at any
file operation, and files that cannot grow; few file handles; a source that vanishes, is truncated or changes; two
processes at once. Verbs and models are those of `fault_verbs.py`; no network is needed. Each fault is one of

- survived: the process was killed, or finished all the same; the same command leaves the bytes of an undisturbed run;
- refused: it ended with a sentence and its exit status; then the same as for survived;
- lost: a file of the user or the source changed, an end without a sentence, a hang, a folder that the same command does
  not complete;
- wrong: a folder that loads with weights of neither the former nor the new model, or a success with other bytes.

A source that stays changed may be refused. The status is 1 if anything was lost or wrong. Every fault is determined by
the seed and its number.
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from fault_campaign import KINDS, Campaign
from fault_processes import in_process, preload
from fault_verbs import VERBS, Verb, prepare

OUTCOMES = ("survived", "refused", "lost", "wrong")


def applies(verb: Verb, kind: str) -> bool:
    return verb.source is not None or not kind.startswith("source")


def show(counts: dict[tuple[str, str], Counter[str]], verbs: list[Verb], kinds: list[str]) -> None:
    """Faults by verb and kind, as survived/refused, with what was lost and wrong; then the sums."""
    width = max(len(verb.name) for verb in verbs)
    print(f"\n{'survived + refused':{width}} " + " ".join(f"{kind:>14}" for kind in kinds))
    for verb in verbs:
        cells = []
        for kind in kinds:
            found = counts.get((verb.name, kind), Counter())
            bad = "".join(f" {found[name]} {name}!" for name in ("lost", "wrong") if found[name])
            cells.append(f"{found['survived']} + {found['refused']}{bad}" if found else "-")
        print(f"{verb.name:{width}} " + " ".join(f"{cell:>14}" for cell in cells))
    print()
    for kind in kinds:
        total: Counter[str] = sum((found for (_, k), found in counts.items() if k == kind), Counter())
        print(f"{kind:{width}} " + ", ".join(f"{name} {total[name]}" for name in OUTCOMES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verb", help="only verbs whose name begins so")
    parser.add_argument("--kind", help=f"only one of {', '.join(KINDS)}")
    parser.add_argument("--only", type=int, help="the number of one fault, to see it again")
    asked = parser.parse_args()
    verbs = [verb for verb in VERBS if verb.name.startswith(asked.verb or "")]
    kinds = [kind for kind in KINDS if asked.kind in (None, kind)]
    pairs = [(verb, kind) for verb in verbs for kind in kinds if applies(verb, kind)]
    if not pairs:
        parser.error("no verb or kind is called so")
    preload()
    counts: dict[tuple[str, str], Counter[str]] = {}
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="budwood-faults-") as folder:
        campaign = Campaign(Path(folder).resolve())
        in_process(lambda: prepare(campaign.world))
        for number in range(asked.count) if asked.only is None else [asked.only]:
            verb, kind = pairs[number % len(pairs)]
            outcome, what = campaign.inject(verb, kind, random.Random(f"{asked.seed} {number}"))
            counts.setdefault((verb.name, kind), Counter())[outcome] += 1
            if outcome in ("lost", "wrong") or asked.only is not None:
                print(f"{outcome}: fault {number}, {verb.name}, {kind}: {what}", flush=True)
    show(counts, verbs, kinds)
    sums: Counter[str] = sum(counts.values(), Counter())
    print(
        f"\n{sum(sums.values())} faults in {time.monotonic() - start:.0f} s: "
        + ", ".join(f"{name} {sums[name]}" for name in OUTCOMES)
    )
    sys.exit(bool(sums["lost"] or sums["wrong"]))


if __name__ == "__main__":
    main()
