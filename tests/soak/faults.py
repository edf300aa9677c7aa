# SPDX-License-Identifier: Apache-2.0
"""What goes wrong during a save or a load, on one rank or on all."""

from __future__ import annotations

import contextlib
import functools
import linecache
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

import ckpt_fast
from ckpt_fast import native, settings
from ckpt_fast.errors import CheckpointError
from tests.crash.states.faults import Faults, fail
from tests.interrupting import interrupted_at
from tests.soak.resources import settle
from tests.trainer.save.test_failures import limited_files

_PACKAGE = Path(ckpt_fast.__file__).parent
_FILES = frozenset(map(str, _PACKAGE.rglob("*.py")))
_MOST_CALLS = 40  # that change the disk in a save
_MOST_LINES = 4.0  # of the package that a save runs: the power of ten
_DEADLINE_S, _HANGS_S = 0.05, 0.2

# torch's error of several ranks is no Exception.
ERRORS = (Exception, KeyboardInterrupt, CheckpointException)

# Runs an action with a fault; returns whether the fault may be felt.
Fault = Callable[[Random, Callable[[], object]], bool]


class MistakeError(Exception):
    """An error of the program's own, in the middle of a save."""


def is_on_this_rank(chance: Random) -> bool:
    """Choose a rank; the same on all of them."""
    return chance.randrange(dist.get_world_size()) == dist.get_rank()


def failing_call(chance: Random, action: Callable[[], object]) -> bool:
    """One call that changes the disk fails, on one rank."""
    at, here = chance.randrange(_MOST_CALLS), is_on_this_rank(chance)
    faults = Faults(at if here else None, fail)
    with faults.injected(), reported(lambda: here and faults.count > at) as was_felt:
        action()
    return was_felt()


def full_disk(chance: Random, action: Callable[[], object]) -> bool:
    """Files cannot grow beyond a size, on one rank."""
    nbytes, here = chance.choice((0, 6000, 200_000)), is_on_this_rank(chance)
    with limited_files(nbytes) if here else contextlib.nullcontext():
        action()
    return True


def no_room(_: Random, action: Callable[[], object]) -> bool:
    """File systems report no free space."""
    full = os.statvfs_result((4096, 4096, 9, 0, 0, 9, 9, 9, 0, 255))
    with mock.patch.object(os, "statvfs", return_value=full):
        action()
    return True


def deadline(chance: Random, action: Callable[[], object]) -> bool:
    """The storage of one rank does not answer before the deadline, but later. For saves in the background."""
    answers, engine, here = threading.Event(), native.engine(), is_on_this_rank(chance)
    original = engine.write_files

    def write_files(*args: Any, **options: Any) -> Any:
        assert answers.wait(60)
        return original(*args, **options)

    later = threading.Timer(_HANGS_S, answers.set)
    later.start()
    with (
        mock.patch.object(settings, "timeout_s", lambda: _DEADLINE_S),
        mock.patch.object(engine, "write_files", write_files) if here else contextlib.nullcontext(),
    ):
        try:
            action()
        finally:
            later.join()
    return True


@functools.cache
def _know_all_lines() -> None:
    """Read the package's code once: Python keeps the lines of every file that a traceback names."""
    for name in _FILES:
        linecache.getlines(name)


def interruption(chance: Random, action: Callable[[], object]) -> bool:
    """Ctrl-C somewhere in the package's code. For one rank: the others would wait for this one."""
    _know_all_lines()
    if interrupted_at(int(10 ** chance.uniform(0.0, _MOST_LINES)), action, _FILES):
        raise KeyboardInterrupt
    return False


def failing_collection(chance: Random, action: Callable[[], object]) -> bool:
    """The state dict of a ``Stateful`` cannot be had, on one rank."""
    Stateful.fails = is_on_this_rank(chance)
    try:
        action()
    finally:
        Stateful.fails = False
    return True


class Stateful:
    """A part of a state dict that is asked for its own.

    Attributes:
        fails: let all of them raise.
    """

    fails = False

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        if Stateful.fails:
            raise MistakeError("the program's own mistake")
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


@contextlib.contextmanager
def reported(happened: Callable[[], bool]) -> Iterator[Callable[[], bool]]:
    """A block whose errors are no refusals if the fault has not happened on any rank."""
    try:
        yield lambda: anywhere(happened())
    except BaseException as error:
        if not anywhere(happened()):
            raise AssertionError(f"nothing was wrong, and yet: {type(error).__name__}: {error}") from error
        raise


def anywhere(here: bool) -> bool:
    """Collective. Whether it is so on any rank."""
    found: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(found, here)
    return any(found)


def is_refusal(error: BaseException) -> bool:
    """Whether an error is one that a fault, damage or another structure may lead to."""
    if isinstance(error, CheckpointException):  # torch's: one error for each rank
        causes = [cause[0] if isinstance(cause, tuple) else cause for cause in error.failures.values()]
        return all(map(is_refusal, causes))
    return isinstance(error, CheckpointError | KeyboardInterrupt | MistakeError) or _is_of_torch(error)


def _is_of_torch(error: BaseException) -> bool:
    """Whether torch's own planner says what a checkpoint lacks, or that a tensor has another size."""
    return isinstance(error, RuntimeError | ValueError) and str(error).startswith(
        ("Missing key in checkpoint state_dict", "Size mismatch between saved")
    )


def flip(directory: str, chance: Random, *but: str) -> tuple[str, Callable[[], None]]:
    """Collective. Flip a bit of a file that the first rank finds in a checkpoint.

    Args:
        directory: the checkpoint.
        chance: chooses the file and the bit.
        but: names of files to leave alone.

    Returns:
        Its path, and what flips it back, collective.
    """
    found: list[Any] = [None]
    own = Random(chance.random())
    settle()  # what was replaced is deleted in the background
    dist.barrier()
    if dist.get_rank() == 0:
        paths = sorted(
            os.path.join(parent, name) for parent, _, names in os.walk(directory) for name in names
        )
        path = own.choice(
            [path for path in paths if os.path.getsize(path) and os.path.basename(path) not in but]
        )
        found = [(path, own.randrange(os.path.getsize(path)), own.randrange(8))]
    dist.broadcast_object_list(found)
    path, byte, bit = found[0]

    def turn() -> None:
        dist.barrier()
        if dist.get_rank() == 0:
            with open(path, "r+b") as file:
                file.seek(byte)
                value = file.read(1)[0]
                file.seek(byte)
                file.write(bytes([value ^ 1 << bit]))
        dist.barrier()

    turn()
    return path, turn
