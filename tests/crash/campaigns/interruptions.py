# SPDX-License-Identifier: Apache-2.0
"""Saves and loads of one door, interrupted repeatedly.

``python -m tests.crash.campaigns.interruptions DOOR WHAT DIRECTORY MOMENTS`` prints what happened as JSON.
WHAT is a function of this module. ``tests/slow_disk.c`` is preloaded.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import glob
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from ckpt_fast import settings
from ckpt_fast.errors import CheckpointError
from ckpt_fast.pipeline.memory.host_buffer import host_buffers
from tests.crash.campaigns.doors import DOORS, Door, one_rank

PACKAGE = os.sep + "ckpt_fast" + os.sep
PATIENCE_S = 20.0  # allows for a busy machine
GRACE_S = 5.0
OURS = "ckpt_fast"
SOON_S = 20e-6
HANGS_S = 25.0  # seconds after the newest interruption


class Terminated(SystemExit):
    """Raised by the program's own SIGTERM handler."""


def require(condition: object, text: str) -> None:
    if not condition:
        raise AssertionError(text)


@contextlib.contextmanager
def slow(milliseconds: int) -> Iterator[None]:
    os.environ["SLOW_DISK_MS"] = str(milliseconds)
    try:
        yield
    finally:
        os.environ["SLOW_DISK_MS"] = "0"


class Interruption:
    """Interrupts an action, alternately as Ctrl-C and as a SIGTERM handler.

    Attributes:
        longest_s: the longest time from the signal until the action ended.
        where: the line that was last interrupted.
    """

    def __init__(self) -> None:
        self.longest_s = 0.0
        self.where = ""
        self._count = 0
        self._sent: float | None = None
        self._is_armed = False
        signal.signal(signal.SIGALRM, self._raise)

    def after(self, seconds: float, action: Callable[[], object]) -> bool:
        """Interrupt it this many seconds after it began; return whether it was interrupted."""
        return self._ended(action, lambda: signal.setitimer(signal.ITIMER_REAL, seconds))

    def at_line(self, number: int, action: Callable[[], object]) -> bool:
        """Interrupt it near the ``number``-th package line in the main thread; return whether it was."""
        left = number

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal left
            if PACKAGE not in frame.f_code.co_filename:
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    sys.settrace(None)
                    # Not from here: Python runs handlers only between certain instructions.
                    signal.setitimer(signal.ITIMER_REAL, SOON_S)
            return trace

        return self._ended(action, lambda: sys.settrace(trace))

    def _raise(self, _: int, frame: FrameType | None) -> None:
        if not self._is_armed:  # the action has just ended
            return
        places = []
        while frame is not None:
            places.append(f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}")
            frame = frame.f_back
        self.where = " < ".join(places[:4])
        self._sent = time.monotonic()
        self._count += 1
        raise KeyboardInterrupt if self._count % 2 else Terminated(3)

    def _ended(self, action: Callable[[], object], arm: Callable[[], object]) -> bool:
        try:
            return self._ended_before(action, arm)
        except (KeyboardInterrupt, Terminated):  # when it was already over
            signal.setitimer(signal.ITIMER_REAL, 0)
            return False

    def _ended_before(self, action: Callable[[], object], arm: Callable[[], object]) -> bool:
        self._sent = None
        faulthandler.dump_traceback_later(HANGS_S, exit=True)
        self._is_armed = True
        try:
            arm()
            action()
            self._is_armed = False
        except (KeyboardInterrupt, Terminated, CheckpointException, RuntimeError) as error:
            # torch turns the others into the last two: CheckpointException, or RuntimeError from an archive.
            if isinstance(error, RuntimeError) and "unexpected pos" not in str(error):
                raise
            require(self._sent is not None, "it failed before it was interrupted")
            self.longest_s = max(self.longest_s, time.monotonic() - (self._sent or 0.0))
            require(self.longest_s < PATIENCE_S, f"it was left after {self.longest_s:.2f} s")
            return True
        finally:
            sys.settrace(None)
            signal.setitimer(signal.ITIMER_REAL, 0)
        return False


def let_go() -> None:
    """Assert that nothing of a save is left in this process."""
    deadline = time.monotonic() + GRACE_S
    while True:
        gc.collect()
        # A signal during ``Thread.start`` may leave a thread that never ran in the list.
        threads = [each.name for each in threading.enumerate() if each.is_alive() and OURS in each.name]
        held = host_buffers.used_nbytes
        flags = glob.glob(f"/dev/shm/ckpt_fast-written-{os.getpid()}-*")
        if not threads and not held and not flags:
            return
        left = f"left: threads {threads}, {held} bytes of host buffers, {flags}"
        require(time.monotonic() < deadline, left)
        time.sleep(0.02)


def facts(directory: str) -> dict[str, tuple[int, int, int]]:
    """Return identity, length and modification time of every file."""
    found = {}
    for path, _, names in os.walk(directory):
        for name in names:
            status = os.stat(os.path.join(path, name))
            found[os.path.join(path, name)] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found


def no_partial_files(directory: str) -> None:
    left = [path for path in facts(directory) if path.endswith((".partial", ".dirty", ".old"))]
    require(not left, f"left: {left}")


class Saves:
    """Interrupted saves beside a previously published checkpoint, and what follows each."""

    def __init__(self, door: Door, directory: str) -> None:
        self._door = door
        self._is_run = door.is_run
        self._before = os.path.join(directory, "run" if self._is_run else "before")
        self._target = self._before if self._is_run else os.path.join(directory, "target")
        door.save(self._before, 1.0)
        self._facts = self._of_before()
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []

    def save(self) -> None:
        self._door.save(self._target, 2.0)

    def renew(self) -> None:
        """Restore the initial state."""
        if self._is_run:
            shutil.rmtree(self._before)
            self._door.save(self._before, 1.0)
            self._facts = self._of_before()
        else:
            shutil.rmtree(self._target, ignore_errors=True)

    def look(self, was_interrupted: bool, when: str) -> None:
        """Check after a possibly interrupted save: nothing is torn, and the next save is correct."""
        self.counts["interrupted" if was_interrupted else "in time"] += 1
        try:
            self._look()
        except Exception as error:
            self.failures.append(f"{when}: {type(error).__name__}: {error}")
            traceback.print_exc()

    def _look(self) -> None:
        self._door.give_up()
        if self._door.is_published(self._target):
            found = self._door.load(self._target)
            require(found in ((1.0, 2.0) if self._is_run else (2.0,)), f"there is {found}")
            self.counts[f"published, {found:.0f}"] += 1
        number = 3.0
        self._door.save(self._target, number)
        require(self._door.load(self._target) == number, "the next save is not what was saved")
        let_go()
        no_partial_files(self._target)
        require(self._facts.items() <= self._of_before().items(), "what was published before was touched")
        left = self._door.left()
        require(not left, f"left: {left}")

    def result(self, **more: Any) -> dict[str, Any]:
        """Return what to report."""
        return {"failures": self.failures, **more, **self.counts}

    def _of_before(self) -> dict[str, tuple[int, int, int]]:
        found = facts(self._before)
        return {path: fact for path, fact in found.items() if "iter_0000001" in path or not self._is_run}


def seconds_of(action: Callable[[], object]) -> float:
    begin = time.monotonic()
    action()
    return time.monotonic() - begin


def lines_of(action: Callable[[], object]) -> int:
    """Count the package's lines that the main thread runs."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if PACKAGE not in frame.f_code.co_filename:
            return None
        count += event == "line"
        return trace

    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(None)
    return count


def saves(door: Door, directory: str, moments: int) -> dict[str, Any]:
    """Interrupt a save to a slow disk at evenly spread moments."""
    job, interruption = Saves(door, directory), Interruption()
    job.renew()
    job.save()
    job.renew()
    with slow(20):
        duration_s = seconds_of(job.save)
    for number in range(moments):
        job.renew()
        with slow(20):
            was_interrupted = interruption.after(0.001 + duration_s * number / moments, job.save)
        job.look(was_interrupted, interruption.where)
    return job.result(duration_s=duration_s, longest_s=interruption.longest_s)


def lines_of_saves(door: Door, directory: str, moments: int) -> dict[str, Any]:
    """Interrupt a save at lines spread evenly over the package's lines that the main thread runs."""
    job, interruption = Saves(door, directory), Interruption()
    job.renew()
    lines = lines_of(job.save)
    for number in range(moments):
        job.renew()
        was_interrupted = interruption.at_line(1 + lines * number // moments, job.save)
        job.look(was_interrupted, interruption.where)
    return job.result(lines=lines, longest_s=interruption.longest_s)


def deadlines(door: Door, directory: str, moments: int) -> dict[str, Any]:
    """Time out at moments spread evenly over a background save to a slow disk."""
    return _deadlines(door, directory, moments, milliseconds=20)


def deadlines_of_a_disk_that_hangs(door: Door, directory: str, moments: int) -> dict[str, Any]:
    """The same, if a write takes longer than the grace period for abandoning a save."""
    return _deadlines(door, directory, moments, milliseconds=3000)


def _deadlines(door: Door, directory: str, moments: int, milliseconds: int) -> dict[str, Any]:
    job = Saves(door, directory)
    with slow(20):
        duration_s = seconds_of(job.save)
    for number in range(moments):
        job.renew()
        door.polls = number % 2 == 1
        with slow(milliseconds):
            was_late = is_late(duration_s * number / moments, job.save)
        job.look(was_late, f"deadline {number} of {moments}")
    return job.result(duration_s=duration_s)


def is_late(allowed_s: float, save: Callable[[], object]) -> bool:
    """Return whether a background save failed because its time limit was that short."""
    faulthandler.dump_traceback_later(HANGS_S, exit=True)
    original = settings.timeout_s
    settings.timeout_s = lambda: allowed_s  # the variable is in whole seconds
    try:
        save()
    except CheckpointError as error:
        require("did not end within" in str(error), f"it failed of something else: {error}")
        return True
    finally:
        settings.timeout_s = original
    return False


def loads(door: Door, directory: str, moments: int) -> dict[str, Any]:
    """Interrupt a load from a slow disk at evenly spread moments."""
    door.save(directory, 1.0)
    before, interruption = facts(directory), Interruption()
    with slow(20):
        duration_s = seconds_of(lambda: door.load(directory))
    counts: Counter[str] = Counter()
    for number in range(moments):
        with slow(20):
            ended = interruption.after(0.001 + duration_s * number / moments, lambda: door.load(directory))
        counts["interrupted" if ended else "in time"] += 1
        require(door.load(directory) == 1.0, "the next load is not what was saved")
        let_go()
    require(before == facts(directory), "a load has changed the checkpoint")
    return {"failures": [], "duration_s": duration_s, "longest_s": interruption.longest_s, **counts}


def main(name: str, what: str, directory: str, moments: str) -> None:
    faulthandler.dump_traceback_later(HANGS_S, exit=True)
    one_rank()
    result = globals()[what](DOORS[name](), directory, int(moments))
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
