# SPDX-License-Identifier: Apache-2.0
"""Save and load for hours, with faults and changes: ``python -m tests.soak --hours 1 --seed 1``.

One rank has half of the time, two ranks have the other half. The seed decides what they do, so a problem can
be looked at again: with the same seed and ranks, and as many steps. Prints each rank's samples, and what has
grown.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter

from tests.helpers import run_ranks
from tests.soak.campaign import Outcome, Plan, soak
from tests.soak.resources import growths, table

_SAMPLES = 60
_GRACE_S = 600.0


def main() -> int:
    """0 if every load was right and nothing has grown."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--hours", type=float, default=1.0, help="of all together (1)")
    parser.add_argument("--minutes", type=float, help="the same in minutes")
    parser.add_argument("--seed", type=int, help="other seeds do other things (the time)")
    parser.add_argument("--ranks", type=int, action="append", help="may be repeated (1 and 2)")
    parser.add_argument("--steps", type=int, help="end after so many steps instead, and judge no growth")
    options = parser.parse_args()
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    minutes = options.minutes if options.minutes is not None else 60 * options.hours
    seed = options.seed if options.seed is not None else int(time.time())
    ranks = options.ranks or [1, 2]
    seconds = 60 * minutes / len(ranks)
    plan = Plan(seed, seconds, options.steps, every_s=_every(options.steps or seconds))
    _tell(f"seed {seed}")
    is_fine = True
    for count in ranks:
        with tempfile.TemporaryDirectory(prefix="soak_") as directory:
            outcomes = run_ranks(soak, count, directory, plan, timeout_s=seconds + _GRACE_S, fresh=True)
        is_fine &= _report(outcomes, options.steps is None)
    return 0 if is_fine else 1


def _every(whole: float) -> float:
    return max(1.0, whole // _SAMPLES)


def _report(outcomes: list[Outcome], is_judged: bool) -> bool:
    """Print what the ranks have seen; return whether all is well."""
    ranks = f"{len(outcomes)} rank{'s' if len(outcomes) > 1 else ''}"
    first, grown = outcomes[0], []
    for rank, outcome in enumerate(outcomes):
        _tell(f"\n{ranks}, rank {rank}\n{table(outcome.samples)}")
        grown += [f"rank {rank}, {text}" for text in growths(outcome.samples)] if is_judged else []
    counts = Counter(first.counts)
    for outcome in outcomes[1:]:
        for name, count in outcome.counts.items():
            counts[name] = max(counts[name], count)
    _tell(f"\n{first.steps} steps of {ranks}")
    for name, count in sorted(counts.items()):
        _tell(f"{count:8} {name}")
    for text in grown:
        _tell(f"GROWN {text}")
    _tell(f"{len(first.problems)} problems, {len(grown)} growths")
    return not first.problems and not grown


def _tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
