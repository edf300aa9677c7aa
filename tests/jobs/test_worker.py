# SPDX-License-Identifier: Apache-2.0
"""A worker whose owner is interrupted anywhere, even inside ``threading``, still comes to its end."""

from __future__ import annotations

import threading
import time

from ckpt_fast.jobs import worker
from ckpt_fast.jobs.worker import Worker
from tests.interrupting import interrupted_at

FILES = (worker.__file__, threading.__file__)


def test_a_wait_that_is_interrupted_anywhere() -> None:
    number = 0
    was_interrupted = True
    while was_interrupted:
        number += 1
        opened, done = threading.Event(), []
        job = Worker("ckpt_fast-test", opened.set)

        def act(opened: threading.Event = opened, done: list[int] = done) -> None:
            opened.wait(10)
            done.append(1)

        job.submit(act)
        job.close()
        threading.Timer(0.002, opened.set).start()
        was_interrupted = interrupted_at(number, job.wait, FILES, ("line", "return"))
        begin = time.monotonic()
        assert job.abandon(5.0) and job.is_done and done == [1]
        assert time.monotonic() - begin < 4
    assert number > 10


def test_a_close_that_is_interrupted_anywhere() -> None:
    number = 0
    was_interrupted = True
    while was_interrupted:
        number += 1
        job = Worker("ckpt_fast-test", lambda: None)
        job.submit(lambda: None)
        was_interrupted = interrupted_at(number, job.close, FILES)
        assert job.abandon(20.0) and job.is_done
    assert number > 2
