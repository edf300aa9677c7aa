# SPDX-License-Identifier: Apache-2.0
"""A gate that signals cannot break."""

from __future__ import annotations

import functools
import threading
import time

import pytest

from ckpt_fast.jobs.gate import Gate
from tests.interrupting import interrupted_at

# Python 3.12 may not report instructions the first time.
EVENTS = ("line", "opcode")


def can_pass(gate: Gate) -> bool:
    """Return whether another thread can open the gate, and two others can pass it."""
    passed = []
    threads = [threading.Thread(target=lambda: passed.append(gate.wait(5)), daemon=True) for _ in range(2)]
    threads.append(threading.Thread(target=gate.open, daemon=True))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    return passed == [True, True]


@pytest.mark.parametrize("is_open", [False, True])
def test_whoever_waits_may_be_interrupted_anywhere(is_open: bool) -> None:
    number, was_interrupted = 1, True
    while was_interrupted:
        gate = Gate()
        if is_open:
            gate.open()
        was_interrupted = interrupted_at(number, functools.partial(gate.wait, 0.001), events=EVENTS)
        assert can_pass(gate), f"interrupted at instruction {number}"
        number += 1
    assert number > 5


def test_whoever_opens_may_be_interrupted_anywhere() -> None:
    number, was_interrupted = 1, True
    while was_interrupted:
        gate = Gate()
        was_interrupted = interrupted_at(number, gate.open, events=EVENTS)
        assert can_pass(gate), f"interrupted at instruction {number}"
        number += 1
    assert number > 5


def test_time_is_up() -> None:
    gate = Gate()
    begin = time.monotonic()
    assert not gate.wait(0.05) and time.monotonic() - begin >= 0.05
    assert not gate.wait(0) and not gate.is_open
    gate.open()
    gate.open()
    assert gate.wait(0) and gate.wait() and gate.is_open
