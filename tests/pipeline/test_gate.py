# SPDX-License-Identifier: Apache-2.0
"""A gate that signals cannot break."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from ckpt_fast.pipeline.gate import Gate


def interrupted_at(number: int, action: Callable[[], object]) -> bool:
    """Whether Ctrl-C ended the action at the instruction of that number that it runs in Python."""
    left = number

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        frame.f_trace_opcodes = True
        left -= event in ("line", "opcode")
        if left == 0:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def can_pass(gate: Gate) -> bool:
    """Whether another thread can open the gate, and two others pass."""
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
        was_interrupted = interrupted_at(number, lambda gate=gate: gate.wait(0.001))  # type: ignore[misc]
        assert can_pass(gate), f"interrupted at instruction {number}"
        number += 1
    assert number > 5


def test_whoever_opens_may_be_interrupted_anywhere() -> None:
    number, was_interrupted = 1, True
    while was_interrupted:
        gate = Gate()
        was_interrupted = interrupted_at(number, gate.open)
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
