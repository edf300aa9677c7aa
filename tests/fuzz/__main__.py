# SPDX-License-Identifier: Apache-2.0
"""Damage checkpoints in ``--cases`` ways: ``python -m tests.fuzz --cases 100000 --seed 1``.

Each kind of checkpoint has the same number of cases, by engine and fallback in turn. They run in processes of
their own: one that crashes names the case that it was at.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any, Literal

from ckpt_fast import native
from tests.fuzz.campaign import Problem, Tally, run
from tests.fuzz.checkpoints import KINDS

_CASES_AT_ONCE = 250

Implementation = Literal["engine", "fallback"]


def main() -> int:
    """0 if every promise was kept."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000, help="of all kinds together (100 000)")
    parser.add_argument("--seed", type=int, default=0, help="other seeds have other cases (0)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="at a time (cores)")
    parser.add_argument("--kind", choices=KINDS, action="append", help="only this kind; may be repeated")
    options = parser.parse_args()
    os.environ |= {"CKPT_FAST_FSYNC": "0", "CKPT_FAST_IO_THREADS": "2"}
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    kinds = options.kind or list(KINDS)
    per_kind = -(-options.cases // len(kinds))
    parts = [
        (kind, range(first, min(first + _CASES_AT_ONCE, per_kind)))
        for first in range(0, per_kind, _CASES_AT_ONCE)
        for kind in kinds
    ]
    total, begin = Tally(Counter(), []), time.monotonic()
    running: list[_Part] = []
    while parts or running:
        while parts and len(running) < options.processes:
            running.append(_Part(*parts.pop(0), options.seed))
        part = running.pop(0)
        tally = part.tally()
        for outcome, count in tally.outcomes.items():
            total.outcomes[f"{part.kind}: {outcome}"] += count
        for problem in tally.problems:
            total.problems.append(problem)
            _tell(f"{problem.kind}, case {problem.case} ({problem.damage}): {problem.what}")
    for outcome, count in sorted(total.outcomes.items()):
        _tell(f"{count:8} {outcome}")
    cases = sum(count for outcome, count in total.outcomes.items() if outcome.endswith(": cases"))
    _tell(f"{cases} damages in {time.monotonic() - begin:.0f} s: {len(total.problems)} problems")
    return 1 if total.problems else 0


def _tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


class _Part:
    """Some cases of one kind, in a process of their own."""

    def __init__(self, kind: str, cases: range, seed: int) -> None:
        self.kind = kind
        context = multiprocessing.get_context("fork")
        self._at: Synchronized[int] = context.Value("q", -1)
        self._result, result = context.Pipe(duplex=False)
        implementation: Implementation = "fallback" if cases.start // _CASES_AT_ONCE % 2 else "engine"
        self._process = context.Process(
            target=_run, args=(kind, cases, seed, implementation, self._at, result), daemon=True
        )
        self._process.start()
        result.close()

    def tally(self) -> Tally:
        """Wait for its end."""
        try:
            found: Tally = self._result.recv()
        except EOFError:
            self._process.join()
            what = f"the process ends with status {self._process.exitcode}"
            return Tally(Counter(), [Problem(self.kind, self._at.value, "see the case", what)])
        self._process.join()
        return found


def _run(
    kind: str, cases: range, seed: int, implementation: Implementation, at: Synchronized[int], result: Any
) -> None:
    def note(case: int) -> None:
        at.value = case

    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as directory, native.using(implementation):
        result.send(run(kind, Path(directory), cases, seed, note))


if __name__ == "__main__":
    sys.exit(main())
