# SPDX-License-Identifier: Apache-2.0
"""The tool that interrupts leaves Python itself in order."""

from __future__ import annotations

import contextlib
import threading

from tests.interrupting import interrupted_at


def start_one() -> None:
    thread = threading.Thread(target=threading.Event, daemon=True)
    with contextlib.suppress(RuntimeError):  # Event.wait, interrupted where it takes its lock back
        thread.start()


def test_threads_can_be_started_after_any_interruption() -> None:
    moment = 1
    while interrupted_at(moment, start_one):
        thread = threading.Thread(target=threading.Event, daemon=True)
        thread.start()
        thread.join(30)
        assert not thread.is_alive(), f"interrupted at {moment}"
        moment += 1
    assert moment > 20
