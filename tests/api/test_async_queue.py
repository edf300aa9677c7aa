# SPDX-License-Identifier: Apache-2.0
"""The run's queue with requests of Megatron-Core and nvidia-resiliency-ext, on machines without a GPU."""

from __future__ import annotations

import threading
import time

import pytest

from ckpt_fast import compat
from ckpt_fast.errors import AsyncSaveError
from ckpt_fast.run.async_queue import AsyncCallsQueue
from tests.helpers import run_ranks

CLASSES = [compat.MCoreAsyncRequest]
if compat.HAVE_NVRX:
    CLASSES.append(compat.NVRxAsyncRequest)


@pytest.fixture(params=CLASSES, ids=lambda cls: cls.__module__.partition(".")[0])
def make(request):
    return request.param


def test_written_in_the_background_then_finalized_in_order(make):
    gate, log = threading.Event(), []

    def write(name, *, suffix):
        gate.wait()
        log.append(name + suffix)

    queue = AsyncCallsQueue()
    request = make(write, ("data",), [lambda: log.append("first")], {"suffix": "!"})
    request.add_finalize_fn(lambda: log.append("second"))
    assert queue.schedule_async_request(request) == 0
    assert queue.get_num_unfinalized_calls() == 1
    assert queue.maybe_finalize_async_calls(blocking=False) == []
    assert log == []
    gate.set()
    assert queue.maybe_finalize_async_calls(blocking=True) == [0]
    assert log == ["data!", "first", "second"]
    assert queue.get_num_unfinalized_calls() == 0


def test_staging_is_over_when_scheduling_returns(make):
    staged, written = [1], []
    request = make(
        lambda rank, data, extra: written.append(data),
        (0, None, None),
        [],
        {},
        preload_fn=lambda: list(staged),
    )
    queue = AsyncCallsQueue()
    queue.schedule_async_request(request)
    staged.append(2)  # training continues
    queue.close()
    assert written == [[1]]


def test_a_rank_without_anything_to_write(make):
    queue, done = AsyncCallsQueue(), []
    queue.schedule_async_request(make(None, (), [lambda: done.append(1)], {}))
    queue.maybe_finalize_async_calls(True)
    assert done == [1]


def test_a_failure_is_raised_and_nothing_is_finalized(make):
    def fail():
        raise OSError(28, "No space left on device")

    queue, done = AsyncCallsQueue(), []
    queue.schedule_async_request(make(fail, (), [lambda: done.append("failed")], {}))
    queue.schedule_async_request(make(None, (), [lambda: done.append("next")], {}))
    with pytest.raises(AsyncSaveError, match="No space left on device"):
        queue.maybe_finalize_async_calls(blocking=True)
    assert done == []
    assert queue.maybe_finalize_async_calls(blocking=True) == [1]
    assert done == ["next"]


def test_abort_publishes_nothing(make):
    queue, done = AsyncCallsQueue(), []
    queue.schedule_async_request(make(None, (), [lambda: done.append(1)], {}))
    queue.close(abort=True)
    assert done == []
    assert queue.get_num_unfinalized_calls() == 0


def slow_on_rank_1(rank):
    queue, done = AsyncCallsQueue(), []
    gate = threading.Event()
    request = compat.MCoreAsyncRequest(gate.wait if rank == 1 else None, (), [lambda: done.append(1)], {})
    queue.schedule_async_request(request)
    time.sleep(0.05)
    early = queue.maybe_finalize_async_calls(blocking=False)
    gate.set()
    late = queue.maybe_finalize_async_calls(blocking=True)
    return early, late, done


def test_finalized_when_all_ranks_have_written():
    assert run_ranks(slow_on_rank_1, 2) == [([], [0], [1])] * 2


def failing_on_rank_1(rank):
    def write():
        if rank == 1:
            raise RuntimeError("disk on fire")

    queue, done = AsyncCallsQueue(), []
    queue.schedule_async_request(compat.MCoreAsyncRequest(write, (), [lambda: done.append(1)], {}))
    try:
        queue.maybe_finalize_async_calls(blocking=True)
    except AsyncSaveError as error:
        return str(error), done
    return None


def test_a_failure_on_one_rank_is_raised_on_all():
    for message, done in run_ranks(failing_on_rank_1, 2):
        assert "rank 1" in message
        assert "disk on fire" in message
        assert done == []
