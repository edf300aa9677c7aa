# SPDX-License-Identifier: Apache-2.0
"""What ranks do to record a series of saves, and to check the disks that a crash may leave."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from tests.crash.states.disk import Call, Disk, Tree, lay_out, note, read_log, tree_of
from tests.crash.states.saving import SCENARIOS, job_of, wait_for_deletions

BEGUN, RETURNED = "begun", "returned"


def record(rank: int, name: str, place: str) -> None:
    """Collective, with ``recorder.c`` preloaded. Leave ``place/disk``, a log, and what was saved."""
    scenario, disk, log = SCENARIOS[name], os.path.join(place, "disk"), os.path.join(place, "log")
    expected = []
    native = mock.patch.dict(os.environ, CKPT_FAST_NATIVE=str(int(scenario.native)))
    with native, job_of(scenario, disk) as job:
        os.environ.update(CRASH_ROOT=disk, CRASH_LOG=log)
        try:
            for version in range(1, len(scenario.iterations) + 1):
                if rank == 0:
                    note(log, f"{BEGUN} {version}")
                dist.barrier()
                expected.append(job.save(version))
                if rank == 0:
                    note(log, f"{RETURNED} {version}")
                wait_for_deletions()
                dist.barrier()
        finally:
            del os.environ["CRASH_ROOT"], os.environ["CRASH_LOG"]
    if rank == 0:
        torch.save(expected, os.path.join(place, "expected.pt"))


@dataclass(frozen=True)
class State:
    """A disk state after a crash: after which call, what reached the disk, and what it must contain.

    Attributes:
        lowest, highest: the versions that a load may return; 0 is none.
    """

    position: int
    word: str
    tree: Tree
    lowest: int
    highest: int


def states_after(calls: Sequence[Call], seeds: int, without: Collection[int] = ()) -> Iterator[State]:
    """Yield every distinct state that a crash during the last save may leave.

    Args:
        calls: what was recorded.
        seeds: how many random states are generated at each position.
        without: numbers of syncs to omit.
    """
    disk, lowest, highest = Disk(), 0, 0
    last = max(int(call.path.split()[1]) for call in calls if call.name == "note")
    known: set[tuple[Tree, int]] = set()
    for position, call in enumerate(calls):
        if position not in without:
            disk.do(call)
        elif call.content:
            disk.do(call._replace(name="content"))
        if call.name == "note":
            what, version = call.path.split()
            lowest = int(version) if what == RETURNED else lowest
            highest = int(version) if what == BEGUN else highest
        if highest < last:
            continue
        first = 1000 * position
        disks = [("killed", disk.visible()), *disk.after_power_loss(range(first, first + seeds))]
        for word, tree in disks:
            if (tree, lowest) not in known:
                known.add((tree, lowest))
                yield State(position, f"after {call}: {word}", tree, lowest, highest)


@dataclass
class Findings:
    """The results of a scenario.

    Attributes:
        states: how many there are.
        checked: how many were checked.
        failures: position, state, and what is wrong with it.
        versions: what was loaded, and how often.
    """

    states: int = 0
    checked: int = 0
    failures: list[str] = field(default_factory=list)
    versions: dict[str, int] = field(default_factory=dict)


class Looking:
    """Loads each distinct disk state once."""

    def __init__(self, job: Any, expected: list[Any], ranks: int, place: str) -> None:
        self._job, self._expected, self._ranks = job, expected, ranks
        self._place = os.path.join(place, "up again")
        os.makedirs(self._place, exist_ok=True)
        self._outcomes: dict[Tree, int | str] = {}
        self._count = 0

    def failure(self, state: State, go_on: bool = False) -> str | None:
        """Return what is wrong with a state; with ``go_on``, also with a save and a load on top of it."""
        found = self._outcomes.get(state.tree)
        if found is None or go_on:
            found = self._outcomes[state.tree] = self._look(state.tree, go_on)
        if isinstance(found, str):
            return found
        if not state.lowest <= found <= state.highest:
            return f"version {found} is loaded, not {state.lowest} to {state.highest}"
        return None

    def version(self, state: State) -> int | str:
        return self._outcomes[state.tree]

    def _look(self, tree: Tree, go_on: bool) -> int | str:
        # A separate directory, so that what the process remembers about other directories does not apply.
        self._count += 1
        directory = self._job.disk = os.path.join(self._place, str(self._count))
        if dist.get_rank() == 0:
            lay_out(tree, directory)
        dist.barrier()
        try:
            version = self._version(self._expected, self._ranks)
            if go_on and isinstance(version, int):
                return self._go_on(version)
            return version
        finally:
            dist.barrier()
            if dist.get_rank() == 0:
                shutil.rmtree(directory)

    def _go_on(self, version: int) -> int | str:
        later = len(self._expected) + 1
        expected = together(lambda: self._job.save_later(later))
        if isinstance(expected, str):
            return f"another save: {expected}"
        found = self._version([*self._expected, expected], dist.get_world_size())
        return version if found == later else f"after another save, this is loaded: {found}, not {later}"

    def _version(self, expected: list[Any], ranks: int) -> int | str:
        version = together(lambda: self._job.version_in(expected))
        if version == 0:
            return 0
        if isinstance(version, int):
            number = version
            wrong = together(lambda: self._job.check_what_lies_beside(number, ranks))
            return wrong if isinstance(wrong, str) else version
        return str(version)


def together(action: Callable[[], Any]) -> Any:
    """Return what an action returns on this rank, or a text if it fails on any rank or the numbers differ.

    No rank continues alone: what follows is collective.
    """
    try:
        found = action()
    except (Exception, CheckpointException) as error:  # torch's exception does not derive from Exception
        found = f"{type(error).__name__}: {error}"
    told = found if isinstance(found, int | str) else None
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, told)
    return found if len(set(outcomes)) == 1 else f"the ranks differ: {outcomes}"


def look(_rank: int, name: str, place: str, ranks: int, seeds: int, most: int | None = None) -> Findings:
    """Collective. Load all states of a recorded scenario, or ``most`` of them, evenly spread.

    Args:
        name: the scenario.
        place: what ``record`` was given.
        ranks: how many recorded it. One rank can load what they saved, except local checkpoints.
        seeds, most: how many states.
    """
    calls = read_calls(place)
    findings = Findings()
    states = list(states_after(calls, seeds))
    findings.states = len(states)
    step = 1 if most is None else max(1, -(-len(states) // most))
    with looking(name, place, ranks) as looks:
        for number, state in enumerate(states[::step]):
            failure = looks.failure(state, go_on=number % 8 == 5)
            if failure is not None:
                findings.failures.append(f"{state.position} {state.word}: {failure}")
            word = str(looks.version(state))
            findings.versions[word] = findings.versions.get(word, 0) + 1
            findings.checked += 1
    return findings


def syncs(_rank: int, name: str, place: str, ranks: int, seeds: int) -> list[tuple[str, str]]:
    """Collective. Return every sync of the last save, with what would fail without it, or ""."""
    calls, found = read_calls(place), []
    last = next(number for number in reversed(range(len(calls))) if calls[number].path.startswith(BEGUN))
    with looking(name, place, ranks) as looks:
        for number in range(last, len(calls)):
            if calls[number].name == "sync":
                fails = (
                    f"{state.word}: {failure}"
                    for state in states_after(calls, seeds, without=[number])
                    if (failure := looks.failure(state)) is not None
                )
                found.append((calls[number].path, next(fails, "")))
    return found


@contextlib.contextmanager
def looking(name: str, place: str, ranks: int) -> Iterator[Looking]:
    expected = torch.load(os.path.join(place, "expected.pt"), weights_only=False)
    with job_of(SCENARIOS[name], "", seed=4321) as job:
        yield Looking(job, expected, ranks, place)


def read_calls(place: str) -> list[Call]:
    """Return the recorded calls; raises AssertionError if one is missing."""
    disk = os.path.join(place, "disk")
    calls, replayed = read_log(os.path.join(place, "log"), disk), Disk()
    for call in calls:
        replayed.do(call)
    assert replayed.visible() == tree_of(disk), "not everything that changed the disk was recorded"
    return calls
