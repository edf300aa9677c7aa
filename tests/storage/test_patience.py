# SPDX-License-Identifier: Apache-2.0
"""Requests that are tried again: how often, how long, and what is logged. The clock is a counter."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Callable

import pytest

from ckpt_fast.storage import patience
from ckpt_fast.storage.patience import PlainJudge, insist


class Judge(PlainJudge):
    def may_pass(self, error: BaseException) -> bool:
        return isinstance(error, ConnectionError)


class Clock:
    """The module's time, and random numbers that are always the largest."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(patience, "time", clock)
    monkeypatch.setattr(patience._random, "uniform", lambda low, high: high)
    return clock


def failing(clock: Clock, times: int, error: Exception) -> tuple[Callable[[], str], list[float]]:
    """Return a request that fails so often, and the times at which it is made."""
    made: list[float] = []

    def request() -> str:
        made.append(round(clock.now, 6))
        if len(made) <= times:
            raise error
        return "answer"

    return request, made


def test_pauses_double(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    request, made = failing(clock, 9, ConnectionResetError("cut"))
    with caplog.at_level(logging.INFO, patience.__name__):
        assert insist("upload a to store://b", request, Judge(), 1000.0) == "answer"
    pauses = [round(after - before, 6) for before, after in itertools.pairwise(made)]
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert caplog.messages == [
        "cannot upload a to store://b: ConnectionResetError: cut. Trying again for up to 1000 s.",
        "the storage answers again after 122 s: could upload a to store://b",
    ]


def test_what_succeeds_is_not_mentioned(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    assert insist("list", lambda: 7, Judge(), 0.0) == 7
    assert caplog.messages == []


def test_pauses_are_random(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(patience, "time", clock)
    request, made = failing(clock, 6, ConnectionError())
    state = random.getstate()
    insist("list", request, Judge(), 1000.0)
    assert random.getstate() == state  # a part of checkpoints
    pauses = [after - before for before, after in itertools.pairwise(made)]
    shares = [pause / full for pause, full in zip(pauses, (0.5, 1, 2, 4, 8, 16), strict=True)]
    assert all(0.5 <= share <= 1 for share in shares)
    assert len(set(shares)) > 1


def test_the_last_attempt_is_at_the_end(clock: Clock) -> None:
    request, made = failing(clock, 99, ConnectionError("down"))
    with pytest.raises(ConnectionError, match="down"):
        insist("list", request, Judge(), 5.0)
    assert made == [0, 0.5, 1.5, 3.5, 5.0]


def test_what_will_not_pass_is_raised_at_once(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    request, made = failing(clock, 99, PermissionError("no"))
    with pytest.raises(PermissionError):
        insist("list", request, Judge(), 1000.0)
    assert made == [0]
    assert caplog.messages == []


def test_no_attempt_follows_when_nobody_wants_it(clock: Clock) -> None:
    request, made = failing(clock, 99, ConnectionError())
    with pytest.raises(ConnectionError):
        insist("list", request, Judge(), 1000.0, lambda: clock.now < 2.0)
    assert made == [0, 0.5, 1.5]
    assert clock.now < 2.1
