# SPDX-License-Identifier: Apache-2.0
"""What ranks do to save while one call fails, of all those by which Python and the engine change the disk.

``faults.c`` is preloaded. At each point, a run resumes and saves. A call of that save fails, or everything
from that call on, as if all ranks had been killed there. Then what is left is loaded, and saved over.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch.distributed as dist

from ckpt_fast.errors import CheckpointError
from tests.crash.states.recording import together
from tests.crash.states.saving import SCENARIOS, Training, job_of, left_in, wait_for_deletions

_PATH_BYTES = 4096


class Faults(ctypes.Structure):
    """``struct faults`` of ``faults.c``."""

    _fields_ = (
        ("count", ctypes.c_long),
        ("at", ctypes.c_long),
        ("error", ctypes.c_int),
        ("ends", ctypes.c_int),
        ("call", ctypes.c_char * 64),
        ("path", ctypes.c_char * _PATH_BYTES),
    )


@dataclass(frozen=True)
class Fault:
    """What happens at a call: it fails with an errno, or nothing happens from then on."""

    error: int
    ends: bool = False


@dataclass
class Findings:
    """The results of a scenario.

    Attributes:
        calls: how many a save makes on all ranks.
        outcomes: calls that failed, with what came of it, and how often.
        failures: what was not as it should be, and at which call.
    """

    calls: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    @property
    def points(self) -> int:
        return self.outcomes.total()


def fail_at_every_call(rank: int, name: str, place: str, fault: Fault, step: int) -> Findings:
    """Collective. Save with a fault at every ``step``-th call of the last save of a scenario.

    Args:
        name: the scenario.
        place: an empty directory.
    """
    scenario = SCENARIOS[name]
    settings = {"CKPT_FAST_NATIVE": str(int(scenario.native)), "CKPT_FAST_RETRIES": "0"}
    with mock.patch.dict(os.environ, settings), job_of(scenario, os.path.join(place, "start")) as job:
        failing = _Failing(job, place, fault)
        findings = Findings(calls=failing.calls())
        for number in range(0, findings.calls, step):
            call, outcome, failure = failing.at(number)
            findings.outcomes[outcome] += 1
            if failure:
                findings.failures.append(f"call {number}, {call}: {failure}")
    return findings


class _Failing:
    """Saves of one scenario, each with a fault, in copies of the same disk."""

    def __init__(self, job: Training, place: str, fault: Fault) -> None:
        self._job, self._place, self._start, self._fault = job, place, job.disk, fault
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        os.makedirs(job.disk, exist_ok=True)  # nothing is saved before a run's first save
        *before, self._last = job.scenario.iterations
        self._version = len(before) + 1
        self._before = [job.save(version) for version in range(1, self._version)][-1:]
        wait_for_deletions()
        with open(os.environ["CRASH_FAULTS"], "r+b") as file:
            self._faults = Faults.from_buffer(mmap.mmap(file.fileno(), ctypes.sizeof(Faults)))

    def calls(self) -> int:
        """Return how many calls a save makes, on all ranks."""
        with self._resumed("counted"):
            self._save(-1)
            return int(self._faults.count)

    def at(self, number: int) -> tuple[str, str, str]:
        """Save with a fault at a call, load, and save again.

        Returns:
            The call, what came of it, and what is wrong with that, if anything.
        """
        with self._resumed(str(number)):
            expected, error = self._save(number)
            call = self._faults.call.decode()
            where = f"{call} {os.path.relpath(self._faults.path.decode(), self._job.disk)}"
            if self._fault.ends:
                self._move()
            told = together(lambda: self._told(error))
            found = self._found([*self._before, expected], self._version)
            if not isinstance(told, int) or not isinstance(found, int):
                return where, call, str(told if isinstance(found, int) else found)
            is_new = found > len(self._before)
            outcome = f"{call}: {'an' if told else 'no'} error, the {'new' if is_new else 'old'} checkpoint"
            if not is_new and not told:
                return where, outcome, "the save reported no error, and is not there"
            return where, outcome, self._what_next()

    @contextlib.contextmanager
    def _resumed(self, name: str) -> Iterator[None]:
        """A run that has resumed from a copy of the disk."""
        directory = os.path.join(self._place, name)
        if self._rank == 0:
            shutil.copytree(self._start, directory)
        dist.barrier()
        self._job.disk = directory
        found = self._found(self._before, self._version - 1)
        assert found == len(self._before), found
        try:
            yield
        finally:
            dist.barrier()
            if self._rank == 0:
                shutil.rmtree(self._job.disk)

    def _save(self, at: int) -> tuple[dict[str, Any], Exception | None]:
        """Save with a fault at a call; return what was to be saved, and the error."""
        job, faults, error = self._job, self._faults, None
        expected = job.prepare(self._version, abs(self._last))
        if self._rank == 0:
            faults.at, faults.error, faults.ends = at, self._fault.error, self._fault.ends
            faults.count, faults.call, faults.path = 0, b"", os.fsencode(job.disk)
        dist.barrier()
        os.environ["CRASH_ROOT"] = job.disk
        try:
            job.write(self._version, non_persistent=self._last < 0)
        except Exception as raised:
            error = raised
        finally:
            wait_for_deletions()
            dist.barrier()
            del os.environ["CRASH_ROOT"]
        return expected, error

    def _move(self) -> None:
        """Give the disk another name, so that what the process remembers about it does not apply."""
        if self._rank == 0:
            os.rename(self._job.disk, f"{self._job.disk} up again")
        dist.barrier()
        self._job.disk += " up again"

    def _told(self, error: Exception | None) -> int:
        """Return whether there is an error; it is ours and names the cause, if anyone is left to be told."""
        if error is not None and not self._fault.ends:
            assert isinstance(error, CheckpointError), f"{type(error).__name__}: {error}"
            assert os.strerror(self._fault.error) in str(error), f"the cause is not named: {error}"
        return int(error is not None)

    def _found(self, expected: list[dict[str, Any]], last: int) -> int | str:
        """Return which of these saves is loaded, from 1, or 0; the last of them has the version ``last``."""

        def load() -> int:
            found = self._job.version_in(expected)
            if found:
                self._job.check_what_lies_beside(last - len(expected) + found, self._ranks)
            return found

        return together(load)

    def _what_next(self) -> str:
        """Save once more; return what is wrong with that, if anything."""
        job = self._job
        iteration = job.iteration + 1 if job.scenario.is_local else abs(self._last)

        def save() -> dict[str, Any]:
            expected = job.prepare(self._version, iteration)
            job.write(self._version, non_persistent=self._last < 0)
            wait_for_deletions()
            return expected

        expected = together(save)
        if isinstance(expected, str):
            return f"another save: {expected}"
        found, left = self._found([expected], self._version), left_in(job.disk)
        if found != 1:
            return f"after another save: {found}"
        return f"left after another save: {left}" if left else ""
