# SPDX-License-Identifier: Apache-2.0
"""Requests to remote storage, repeated while their failure may pass: an outage, a limit on their rate."""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Protocol, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
_POLL_S = 0.05

# The program's own generator is a part of its checkpoints.
_random = random.Random()


# Whether those for whom this thread makes its requests still want them.
_is_wanted: ContextVar[Callable[[], bool]] = ContextVar("is_wanted", default=lambda: True)


@contextlib.contextmanager
def while_wanted(is_wanted: Callable[[], bool]) -> Iterator[None]:
    """A block in which no request is tried again any more once ``is_wanted`` says no."""
    token = _is_wanted.set(is_wanted)
    try:
        yield
    finally:
        _is_wanted.reset(token)


def is_wanted() -> bool:
    """Whether what this thread does is still wanted; see ``while_wanted``."""
    return _is_wanted.get()()


class Judge(Protocol):
    """Knows the errors of one kind of storage."""

    def may_pass(self, error: BaseException) -> bool:
        """Whether the same request may succeed later."""

    def cause_of(self, error: BaseException) -> str:
        """What the storage or the network said, in one line."""


class PlainJudge:
    """For storage whose errors say nothing about the time after them: none is expected to pass."""

    def may_pass(self, error: BaseException) -> bool:
        """No."""
        return False

    def cause_of(self, error: BaseException) -> str:
        """Its type and text."""
        return f"{type(error).__name__}: {error}"


def insist(
    what: str,
    request: Callable[[], T],
    judge: Judge,
    until: float,
    go_on: Callable[[], bool] | None = None,
) -> T:
    """Make a request until it succeeds. The pauses in between grow, and are random to spread out the ranks.

    Args:
        what: the request, with the URL; for the log.
        request: what is repeated. It may have taken effect although it failed.
        judge: of its errors.
        until: by ``time.monotonic``; no repetition begins later.
        go_on: asked all the time; once it says no, nothing is repeated any more. None: see ``while_wanted``.

    Returns:
        What ``request`` returned.

    Raises:
        Exception: its last error: one that will not pass, or there was no time left, or ``go_on`` said no.
    """
    go_on = go_on or _is_wanted.get()
    pause, failures, begun = _FIRST_PAUSE_S, 0, time.monotonic()
    while True:
        try:
            result = request()
        except Exception as error:
            failures += 1
            left = until - time.monotonic()
            if left <= 0 or not go_on() or not judge.may_pass(error):
                raise
            if failures == 1:
                cause = judge.cause_of(error)
                logger.warning("cannot %s: %s. Trying again for up to %.0f s.", what, cause, left)
            _wait(min(pause * _random.uniform(0.5, 1.0), left), go_on)
            if not go_on():
                raise
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        else:
            if failures:
                seconds = time.monotonic() - begun
                logger.warning("the storage answers again after %.0f s: could %s", seconds, what)
            return result


def _wait(seconds: float, go_on: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while go_on() and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, _POLL_S))
