# SPDX-License-Identifier: Apache-2.0
"""Host buffers: exact, aligned, kept, bounded, safe to share between threads and across forks."""

from __future__ import annotations

import ctypes
import gc
import io
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_fast.errors import CheckpointError
from ckpt_fast.pipeline.memory.host_buffer import HostBuffer, HostBufferPool

HUGE_PAGE = 2 << 20


@pytest.mark.parametrize("nbytes", [1, 4096, (1 << 20) + 1, 3 * HUGE_PAGE + 5])
def test_exact_and_aligned(nbytes: int) -> None:
    buffer = HostBuffer(nbytes)
    assert buffer.memory.shape == (nbytes,) and buffer.memory.dtype == torch.uint8
    assert buffer.memory.data_ptr() % HUGE_PAGE == 0
    buffer.memory.fill_(7)
    assert buffer.memory[-1] == 7


def test_slots_share_the_memory_but_not_the_storage() -> None:
    buffer = HostBuffer(1 << 20)
    slot = buffer.slot(4096, 100)
    slot.fill_(3)
    assert slot.data_ptr() == buffer.memory.data_ptr() + 4096
    assert buffer.memory[4096:4200].tolist() == [3] * 100 + [0] * 4
    file = io.BytesIO()
    torch.save(slot, file)
    assert file.tell() < 4096
    assert buffer.slot(0, 0).numel() == 0


def test_slots_keep_the_memory_alive() -> None:
    buffer = HostBuffer(1 << 20)
    slot = buffer.slot(0, 1 << 20)
    buffer.close()
    del buffer
    slot.fill_(9)
    assert slot.sum() == 9 << 20


def test_more_than_there_is() -> None:
    with pytest.raises(CheckpointError, match=r"cannot reserve .* CKPT_FAST_HOST_BUFFER"):
        HostBuffer(1 << 60)


def test_a_child_process_shares_no_pages() -> None:
    """Pages shared with a child are copied when the parent writes to them, which must not happen."""
    buffer = HostBuffer(1 << 20)
    buffer.memory.fill_(1)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, ctypes.string_at(buffer.memory.data_ptr(), 1))  # torch's threads do not exist here
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 1) == b"\0"
    assert buffer.memory.min() == 1
    os.close(reader)
    os.close(writer)


def is_mapped(address: int) -> bool:
    ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(start, 16) <= address < int(end, 16) for start, end in ranges)


def test_kept_between_saves() -> None:
    pool = HostBufferPool()
    first = pool.take(1000)
    address = first.memory.data_ptr()
    assert first.nbytes == 1000 and first.is_new
    pool.give_back(first)
    second = pool.take(900)
    assert second.memory.data_ptr() == address and not second.is_new


def test_the_smallest_that_suffices() -> None:
    pool = HostBufferPool()
    buffers = [pool.take(nbytes) for nbytes in (3000, 1000, 2000)]
    for buffer in buffers:
        pool.give_back(buffer)
    assert [pool.take(1500).nbytes, pool.take(1500).nbytes, pool.take(100).nbytes] == [2000, 3000, 1000]


def test_what_is_too_small_is_freed_first() -> None:
    pool = HostBufferPool()
    small = pool.take(1 << 20)
    address = small.memory.data_ptr()
    pool.give_back(small)
    del small
    assert is_mapped(address)
    large = pool.take(64 << 20)
    assert large.is_new
    assert not is_mapped(address) or large.memory.data_ptr() <= address < large.memory.data_ptr() + (66 << 20)


def test_not_kept_where_not_wanted() -> None:
    pool = HostBufferPool()
    pool.give_back(pool.take(1000), keep=False)
    assert pool.take(1000).is_new


def test_bound_makes_wait() -> None:
    pool = HostBufferPool()
    first = pool.take(60, bound=100)
    with ThreadPoolExecutor(1) as executor:
        waiting = executor.submit(pool.take, 50, 100)
        time.sleep(0.05)
        assert not waiting.done()
        pool.give_back(first)
        assert waiting.result(timeout=5) is first


def test_bound_has_room_for_two() -> None:
    pool = HostBufferPool()
    buffers = [pool.take(50, bound=100, wait_s=0) for _ in range(2)]
    assert [buffer.nbytes for buffer in buffers] == [50, 50]
    with pytest.raises(CheckpointError, match="hold 100 of the 100 that CKPT_FAST_HOST_BUFFER, or"):
        pool.take(1, bound=100, wait_s=0)


def test_waiting_ends_with_an_error() -> None:
    pool = HostBufferPool()
    held = pool.take(100, bound=100)
    begin = time.monotonic()
    with pytest.raises(CheckpointError, match="Wait for the save before"):
        pool.take(1, bound=100, wait_s=0.1)
    assert 0.1 <= time.monotonic() - begin < 2
    pool.give_back(held)


def test_what_is_dropped_is_in_use_no_longer() -> None:
    """As after a signal whose handler raises between acquiring a buffer and storing it."""
    pool = HostBufferPool()
    pool.take(100, bound=100)
    assert pool.used_nbytes == 0
    held = pool.take(100, bound=100, wait_s=0)
    with ThreadPoolExecutor(1) as executor:
        waiting = executor.submit(pool.take, 50, 100, 20.0)
        del held
        assert waiting.result().nbytes == 50


def test_what_is_dropped_in_a_cycle_is_in_use_no_longer() -> None:
    """As by an error: its traceback has a frame that has the error."""
    pool = HostBufferPool()
    gc.disable()
    try:
        cycle: list[Any] = [pool.take(1 << 20)]
        cycle.append(cycle)
        del cycle
        assert pool.take(1 << 20, bound=1 << 20, wait_s=0.1).nbytes == 1 << 20
    finally:
        gc.enable()


def test_more_than_the_bound_waits_for_all_others() -> None:
    pool = HostBufferPool()
    small = pool.take(10, bound=100)
    with pytest.raises(CheckpointError):
        pool.take(500, bound=100, wait_s=0)
    pool.give_back(small)
    assert pool.take(500, bound=100, wait_s=0).nbytes == 500


def test_failed_allocation_takes_nothing() -> None:
    pool = HostBufferPool()
    with pytest.raises(CheckpointError):
        pool.take(1 << 60, bound=100)
    assert pool.take(100, bound=100, wait_s=0).nbytes == 100


def test_given_back_by_a_destructor() -> None:
    """A destructor may run at any time, even in a thread that is just acquiring a buffer."""
    pool = HostBufferPool()
    buffer = pool.take(100, bound=100)
    with pool._lock:
        pool.give_back(buffer)
    assert pool.take(100, bound=100, wait_s=0) is buffer


def test_many_threads() -> None:
    pool, bound, guard = HostBufferPool(), 1000, threading.Lock()
    used, peak = 0, 0

    def saves(seed: int) -> None:
        nonlocal used, peak
        rng = random.Random(seed)
        for _ in range(60):
            buffer = pool.take(rng.randint(1, bound), bound)
            with guard:
                used += buffer.nbytes
                peak = max(peak, used)
            buffer.memory.fill_(seed)
            time.sleep(rng.random() / 2000)
            assert bool((buffer.memory == seed).all()), "two savers have the same buffer"
            with guard:
                used -= buffer.nbytes
            pool.give_back(buffer)

    with ThreadPoolExecutor(6) as executor:
        for future in [executor.submit(saves, seed) for seed in range(6)]:
            future.result(timeout=60)
    assert used == 0 and 0 < peak <= bound


def test_reserved_memory_is_there_for_the_next_save() -> None:
    pool = HostBufferPool()
    pool.reserve(3 * HUGE_PAGE + 5).join()
    buffer = pool.take(2 * HUGE_PAGE, bound=3 * HUGE_PAGE + 5)
    assert buffer.nbytes == 3 * HUGE_PAGE + 5 and not buffer.is_new
    assert not buffer.memory.any(), "touched with zeros"


def test_memory_that_cannot_be_reserved_is_not_missed_yet(caplog: pytest.LogCaptureFixture) -> None:
    pool = HostBufferPool()
    pool.reserve(1 << 60).join()
    assert "no host memory was reserved" in caplog.text
    assert pool.take(100, bound=100).nbytes == 100
