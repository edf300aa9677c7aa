# SPDX-License-Identifier: Apache-2.0
"""Saves of two ranks, one of which is interrupted and leaves.

``python -m tests.crash.campaigns.two_ranks DOOR WHAT DIRECTORY MOMENTS`` prints what happened as JSON.
WHAT is "moments" or "lines". ``tests/slow_disk.c`` may be preloaded.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from ckpt_fast.errors import CheckpointError
from tests.crash.campaigns.doors import DOORS, Documented, Door
from tests.crash.campaigns.interruptions import (
    Interruption,
    facts,
    let_go,
    lines_of,
    no_partial_files,
    require,
    seconds_of,
    slow,
)
from tests.helpers import preloaded_processes, run_ranks

RANKS = 2
SLOW_MS = 20
TIMEOUT_S = 30.0  # of the process group
LIMIT_S = 2 * TIMEOUT_S
INTERRUPTED = 130
# These begin with collectives of torch or Megatron-Core.
FOREIGN = ("dcp", "megatron-core", "megatron-core-async")


def save(_: int, name: str, directory: str, number: float) -> None:
    DOORS[name]().save(directory, number)


def measure(_: int, name: str, directory: str) -> tuple[float, int]:
    """Return how long a save to a slow disk takes and how many package lines this rank's main thread runs."""
    door = DOORS[name]()
    door.save(directory, 2.0)
    lines = lines_of(lambda: door.save(directory, 3.0))
    with slow(SLOW_MS):
        return seconds_of(lambda: door.save(directory, 4.0)), lines


def interrupt(rank: int, name: str, directory: str, what: str, victim: int, at: float) -> dict[str, Any]:
    """Save and interrupt one rank; return the outcome on both."""
    door = DOORS[name]()
    with slow(SLOW_MS if what == "moments" else 0):
        outcome = _interrupted(door, directory, what, at) if rank == victim else _left_alone(door, directory)
    door.give_up()
    let_go()
    return outcome | {"out": time.monotonic()}


def live(rank: int, rendezvous: str, connection: Connection, environment: dict[str, str], *args: Any) -> None:
    """Run a rank, which exits as an interrupted program does, or with a report of what went wrong."""
    os.environ.update(environment)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=RANKS,
            timeout=timedelta(seconds=TIMEOUT_S),
        )
    except Exception:
        connection.send({"how": "no group"})
        return
    outcome = interrupt(rank, *args)
    connection.send(outcome)
    sys.exit(INTERRUPTED if outcome["how"] == "interrupted" else 0)


def outcomes_of(*args: Any) -> list[dict[str, Any]]:
    """Run ``interrupt`` on new processes, which exit normally."""
    context = preloaded_processes()
    with tempfile.TemporaryDirectory(prefix="ranks_") as directory:
        ranks = []
        for rank in range(RANKS):
            ours, theirs = context.Pipe()
            rendezvous = os.path.join(directory, "rendezvous")
            process = context.Process(target=live, args=(rank, rendezvous, theirs, dict(os.environ), *args))
            process.start()
            theirs.close()
            ranks.append((process, ours))
        try:
            outcomes = [
                connection.recv() if connection.poll(LIMIT_S) else {"how": "silent"}
                for _, connection in ranks
            ]
            for process, _ in ranks:
                process.join(LIMIT_S)
        finally:
            for process, _ in ranks:
                process.kill()
    if any(outcome["how"] == "no group" for outcome in outcomes):
        return outcomes_of(*args)  # see ``helpers.run_ranks``
    statuses = [process.exitcode for process, _ in ranks]
    expected = [INTERRUPTED if outcome["how"] == "interrupted" else 0 for outcome in outcomes]
    require(statuses == expected, f"exit statuses {statuses} after {outcomes}")
    return outcomes


def _interrupted(door: Door, directory: str, what: str, at: float) -> dict[str, Any]:
    interruption = Interruption()
    end = interruption.after if what == "moments" else interruption.at_line
    ended = end(at, lambda: door.save(directory, 2.0))  # type: ignore[operator]
    return {
        "how": "interrupted" if ended else "in time",
        "s": interruption.longest_s,
        "at": interruption.where,
    }


def _left_alone(door: Door, directory: str) -> dict[str, Any]:
    try:
        door.save(directory, 2.0)
    except CheckpointError as error:
        return {"how": "refused", "why": str(error)}
    except (CheckpointException, RuntimeError) as error:
        # In collectives that are not ours.
        return {"how": "refused by torch", "why": f"{type(error).__name__}: {error}"}
    return {"how": "saved"}


def look(_: int, name: str, before: str, target: str, published: bool) -> float | None:
    """In new processes: check the older checkpoint, the interrupted save's remains, and the next save."""
    door = DOORS[name]()
    if isinstance(door, Documented):
        door.expect(1.0, 2.0)
    found = door.load(target) if published else None
    if before != target:
        require(door.load(before) == 1.0, "the older checkpoint is not what was saved")
    door.save(target, 3.0)
    require(door.load(target) == 3.0, "the next save is not what was saved")
    let_go()
    return found


class Campaign:
    """Interrupted saves of one door, each in new processes, and what follows each."""

    def __init__(self, name: str, directory: str) -> None:
        self._name = name
        self._is_run = DOORS[name].is_run
        self._first = os.path.join(directory, "first")
        self._before = os.path.join(directory, "before")
        self._target = self._before if self._is_run else os.path.join(directory, "target")
        run_ranks(save, RANKS, name, self._first, 1.0)
        measured = run_ranks(measure, RANKS, name, os.path.join(directory, "measured"))
        self.duration_s = max(seconds for seconds, _ in measured)
        self.lines = [lines for _, lines in measured]
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.longest_s = self.longest_alone_s = 0.0

    def run(self, what: str, moments: int) -> dict[str, Any]:
        """Interrupt each rank in turn, at moments spread evenly over a save."""
        for number in range(moments):
            victim, part = number % RANKS, number / moments
            at = 0.001 + self.duration_s * part if what == "moments" else 1 + int(self.lines[victim] * part)
            try:
                self._one(what, victim, at)
            except Exception as error:
                self.failures.append(f"rank {victim} at {at}: {type(error).__name__}: {error}"[-3000:])
        return {
            "failures": self.failures,
            "duration_s": self.duration_s,
            "lines": self.lines,
            "longest_s": self.longest_s,
            "longest_alone_s": self.longest_alone_s,
            **self.counts,
        }

    def _one(self, what: str, victim: int, at: float) -> None:
        for directory in (self._before, self._target):
            shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(self._first, self._before)
        untouched = self._facts()
        outcomes = outcomes_of(self._name, self._target, what, victim, at)
        left, other = outcomes[victim], outcomes[1 - victim]
        self.longest_s = max(self.longest_s, left["s"])
        self.longest_alone_s = max(self.longest_alone_s, other["out"] - left["out"])
        self.counts[left["how"]] += 1
        self.counts[f"the other {other['how']}"] += 1
        published = os.path.exists(os.path.join(self._target, DOORS[self._name].seal))
        if other["how"] == "saved":
            require(self._is_run or published, f"rank {1 - victim} reported a checkpoint that is none")
        found = run_ranks(look, RANKS, self._name, self._before, self._target, published or self._is_run)
        expected = (2.0,) if other["how"] == "saved" else (1.0, 2.0) if self._is_run else (None, 2.0)
        require(found[0] == found[1] and found[0] in expected, f"there is {found} after {outcomes}")
        self.counts[f"found {found[0]}"] += 1
        no_partial_files(self._target)
        require(untouched.items() <= self._facts().items(), f"what was there was touched: {outcomes}")
        ours = self._name not in FOREIGN
        require(not ours or other["how"] != "refused by torch", f"not an error of ours: {other}")

    def _facts(self) -> dict[str, tuple[int, int, int]]:
        found = facts(self._before)
        return {path: fact for path, fact in found.items() if "iter_0000001" in path or not self._is_run}


def main(name: str, what: str, directory: str, moments: str) -> None:
    result = Campaign(name, directory).run(what, int(moments))
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
