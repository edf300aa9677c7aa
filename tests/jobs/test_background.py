# SPDX-License-Identifier: Apache-2.0
"""Saves in flight: in order, with the values at the time of the call, failing on every rank or none."""

from __future__ import annotations

import gc
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ckpt_fast import native
from ckpt_fast.errors import AsyncSaveError, CheckpointWriteError
from ckpt_fast.format.types import TensorShard
from ckpt_fast.jobs import background
from ckpt_fast.jobs.background import SaveHandle, SaveQueue
from tests.helpers import run_ranks
from tests.interrupting import interrupted_at
from tests.pipeline.layouts import same
from tests.pipeline.save.test_save import FILES, assert_not_published, loaded, names
from tests.saves import new_save
from tests.storage.test_commit import file_size_limit

pytestmark = pytest.mark.usefixtures("no_fsync")


def handle(directory: Path | str, tensor: torch.Tensor, rows: int = 1, row: int = 0) -> SaveHandle:
    """Stage a save of one row of ``w``."""
    shard = TensorShard("w", tensor.view(1, -1), (row, 0), (rows, tensor.numel()))
    job = new_save([shard], os.fspath(directory), snapshot=True, **FILES)
    job.stage()
    return SaveHandle(job)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Block writing until the event is set, like a slow disk."""
    opened = threading.Event()
    implementation = native.engine()
    original = implementation.write_files

    def write_files(*arguments: Any, **options: Any) -> Any:
        assert opened.wait(30)
        return original(*arguments, **options)

    monkeypatch.setattr(implementation, "write_files", write_files)
    return opened


def test_training_goes_on_while_the_save_is_written(tmp_path: Path, gate: threading.Event) -> None:
    tensor = torch.arange(1000)
    queue = SaveQueue()
    assert queue.schedule_async_request(handle(tmp_path, tensor)) == 0
    tensor.fill_(-1)
    assert queue.maybe_finalize_async_calls() == [] and queue.get_num_unfinalized_calls() == 1
    assert_not_published(tmp_path)
    gate.set()
    assert queue.maybe_finalize_async_calls(blocking=True) == [0]
    assert queue.get_num_unfinalized_calls() == 0
    assert same(
        loaded(tmp_path, "w", torch.zeros(1, 1000, dtype=torch.int64)), torch.arange(1000).view(1, -1)
    )


def test_saves_are_finalized_in_the_order_scheduled(tmp_path: Path, gate: threading.Event) -> None:
    queue, finished = SaveQueue(), []
    for number in range(3):
        request = handle(tmp_path / str(number), torch.full((4,), float(number)))
        request.add_finalize_fn(lambda n=number: finished.append(("first", n)))
        request.add_finalize_fn(
            lambda n=number: finished.append(("then", n, (tmp_path / str(n) / "metadata.json").exists()))
        )
        assert queue.schedule_async_request(request) == number
    assert finished == []
    gate.set()
    assert queue.maybe_finalize_async_calls(blocking=True) == [0, 1, 2]
    assert finished == [entry for n in range(3) for entry in (("first", n), ("then", n, True))]


def test_finalizing_does_not_wait_unless_told_to(tmp_path: Path) -> None:
    queue = SaveQueue()
    queue.schedule_async_request(handle(tmp_path, torch.zeros(4)))
    deadline = time.monotonic() + 20
    while not (done := queue.maybe_finalize_async_calls()):
        assert time.monotonic() < deadline
    assert done == [0]


def test_close_finalizes(tmp_path: Path) -> None:
    queue = SaveQueue()
    queue.schedule_async_request(handle(tmp_path, torch.zeros(4)))
    queue.close()
    assert (tmp_path / "metadata.json").exists() and queue.get_num_unfinalized_calls() == 0


def test_abort_publishes_nothing_and_leaves_nobody_writing(tmp_path: Path) -> None:
    queue, finished = SaveQueue(), []
    for number in range(2):
        request = handle(tmp_path / str(number), torch.zeros(4))
        request.add_finalize_fn(lambda: finished.append(True))
        queue.schedule_async_request(request)
    queue.close(abort=True)
    assert finished == [] and queue.get_num_unfinalized_calls() == 0
    for number in range(2):
        assert_not_published(tmp_path / str(number))
    assert not [thread for thread in threading.enumerate() if thread.name == "ckpt_fast-write"]


def test_a_save_that_is_interrupted_anywhere_can_be_given_up(tmp_path: Path) -> None:
    number = 1
    while True:
        queue = SaveQueue()
        request = handle(tmp_path, torch.full((4,), 1.0))

        def finish(queue: SaveQueue = queue, request: SaveHandle = request) -> None:
            queue.schedule_async_request(request)
            queue.maybe_finalize_async_calls(blocking=True)

        was_interrupted = interrupted_at(number, finish, [background.__file__])
        queue.close(abort=True)
        assert queue.get_num_unfinalized_calls() == 0 and request not in background._in_flight
        del request, finish
        queue.schedule_async_request(handle(tmp_path, torch.full((4,), 2.0)))  # the directory is free again
        queue.close()
        assert same(loaded(tmp_path, "w", torch.zeros(1, 4)), torch.full((1, 4), 2.0))
        if not was_interrupted:
            break
        number += 1
    assert number > 20


def test_finalizers_are_added_before_scheduling(tmp_path: Path) -> None:
    queue, request = SaveQueue(), handle(tmp_path, torch.zeros(4))
    queue.schedule_async_request(request)
    with pytest.raises(RuntimeError, match="scheduled already"):
        request.add_finalize_fn(lambda: None)
    queue.close()


def test_failure(tmp_path: Path) -> None:
    queue, finished = SaveQueue(), []
    with file_size_limit(1024):
        request = handle(tmp_path / "bad", torch.zeros(40_000))
        request.add_finalize_fn(lambda: finished.append(True))
        queue.schedule_async_request(request)
        also_bad = handle(tmp_path / "also bad", torch.zeros(40_000))
        queue.schedule_async_request(also_bad)
        for failing in (request, also_bad):
            failing.wait()  # until here, the limit applies to the whole process
        with pytest.raises(AsyncSaveError) as caught:
            queue.maybe_finalize_async_calls(blocking=True)
    assert isinstance(caught.value.__cause__, CheckpointWriteError)
    assert f"the save to {tmp_path}/bad in the background failed: rank 0: write" in str(caught.value)
    assert finished == [], "the tracker would name a checkpoint that is none"
    assert_not_published(tmp_path / "bad")
    assert queue.get_num_unfinalized_calls() == 1, "the other save is still in flight"
    with pytest.raises(AsyncSaveError, match="also bad"):
        queue.close()
    assert queue.get_num_unfinalized_calls() == 0
    queue.schedule_async_request(handle(tmp_path / "good", torch.zeros(40_000)))
    assert queue.maybe_finalize_async_calls(blocking=True) == [2]


def test_failure_while_staging(tmp_path: Path) -> None:
    queue = SaveQueue()
    queue.schedule_async_request(handle(tmp_path, torch.zeros(4, device="meta")))
    with pytest.raises(AsyncSaveError):
        queue.maybe_finalize_async_calls(blocking=True)
    assert_not_published(tmp_path)


# Several ranks.


def save_thrice(rank: int, directory: str, failing: int) -> list[Any]:
    """Three saves in the queue; during the second, the disk of one rank is full."""
    world, queue, seen = dist.get_world_size(), SaveQueue(), []
    for number in range(3):
        tensor = torch.full((30_000,), number * 10 + rank)
        with file_size_limit(4096 if number == 1 and rank == failing else -1):
            request = handle(f"{directory}/{number}", tensor, world, rank)
            request.add_finalize_fn(lambda n=number: seen.append(n))
            queue.schedule_async_request(request)
            if number < 2:
                request.wait()  # the limit applies to the whole process: only the second save may hit it
        tensor.fill_(-1)
    for _ in range(2):
        try:
            queue.maybe_finalize_async_calls(blocking=True)
        except AsyncSaveError as error:
            seen.append(str(error))
    assert queue.get_num_unfinalized_calls() == 0
    return seen


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_on_one_rank_fails_that_save_on_all(tmp_path: Path, failing: int) -> None:
    first, second = run_ranks(save_thrice, 2, str(tmp_path), failing)
    assert first == second
    before, error, after = first
    assert (before, after) == (0, 2)
    assert error.startswith(f"the save to {tmp_path}/1 in the background failed: rank {failing}: ")
    assert_not_published(tmp_path / "1")
    for number in (0, 2):
        expected = torch.stack([torch.full((30_000,), number * 10 + rank) for rank in range(2)])
        assert same(loaded(tmp_path / str(number), "w", expected), expected)


def one_rank_is_slow(rank: int, directory: str) -> list[int]:
    queue = SaveQueue()
    original = native.write_files
    if rank == 1:
        native.engine().write_files = lambda *a, **k: (time.sleep(0.5), original(*a, **k))[1]
    request = handle(directory, torch.full((4,), rank), dist.get_world_size(), rank)
    queue.schedule_async_request(request)
    if rank == 0:
        request.wait()
    polls = []
    while not polls or not polls[-1]:
        polls.append(len(queue.maybe_finalize_async_calls()))
        dist.barrier()
    native.engine().write_files = original
    return polls


def test_nobody_finalizes_before_the_slowest_rank_has_written(tmp_path: Path) -> None:
    first, second = run_ranks(one_rank_is_slow, 2, str(tmp_path))
    assert first == second and first[0] == 0 and first[-1] == 1
    assert "metadata.json" in names(tmp_path)


# Watching, stopping and limiting a save.


def test_progress(tmp_path: Path, gate: threading.Event) -> None:
    request = handle(tmp_path, torch.zeros(30_000))
    queue = SaveQueue()
    queue.schedule_async_request(request)
    assert request.progress() == (0, 120_000) and not request.is_written()
    with pytest.raises(RuntimeError, match="not finalized yet"):
        request.result()
    gate.set()
    request.wait()
    assert request.progress() == (120_000, 120_000) and request.is_written()
    queue.close()
    assert request.result() is request.report and request.error is None
    assert 0 < request.report.written_s <= request.report.seconds


@pytest.mark.parametrize("when", ["before the write", "after the write"])
def test_cancel(tmp_path: Path, gate: threading.Event, when: str) -> None:
    request = handle(tmp_path, torch.zeros(30_000))
    queue = SaveQueue()
    queue.schedule_async_request(request)
    if when == "after the write":
        gate.set()
        request.wait()
    request.cancel()
    gate.set()
    with pytest.raises(AsyncSaveError, match=f"rank 0: the save to {tmp_path} was cancelled"):
        queue.maybe_finalize_async_calls(blocking=True)
    with pytest.raises(AsyncSaveError, match="was cancelled"):
        request.result()
    assert isinstance(request.error, AsyncSaveError)
    assert_not_published(tmp_path)


@pytest.mark.parametrize("blocking", [False, True])
def test_a_file_system_that_hangs_fails_the_save_in_time(
    tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch, blocking: bool
) -> None:
    monkeypatch.setenv("CKPT_FAST_TIMEOUT", "1")
    queue, begin = SaveQueue(), time.monotonic()
    request = handle(tmp_path, torch.zeros(30_000))
    queue.schedule_async_request(request)
    assert queue.maybe_finalize_async_calls() == []
    with pytest.raises(
        AsyncSaveError, match=r"rank 0: writing to .* did not end within the 1 s that CKPT_FAST_T"
    ):
        while time.monotonic() < begin + 20:
            queue.maybe_finalize_async_calls(blocking)
    assert 0.9 < time.monotonic() - begin < 10
    assert queue.get_num_unfinalized_calls() == 0
    gate.set()
    assert request.wait(20)
    assert_not_published(tmp_path)


def one_rank_hangs(rank: int, directory: str) -> str:
    os.environ["CKPT_FAST_TIMEOUT"] = "1"
    opened = threading.Event()
    original = native.write_files
    if rank == 1:
        native.engine().write_files = lambda *a, **k: (opened.wait(30), original(*a, **k))[1]
    queue = SaveQueue()
    queue.schedule_async_request(handle(directory, torch.full((4,), rank), dist.get_world_size(), rank))
    try:
        queue.maybe_finalize_async_calls(blocking=True)
    except AsyncSaveError as error:
        return str(error)
    finally:
        opened.set()
        native.engine().write_files = original
        del os.environ["CKPT_FAST_TIMEOUT"]
    return "published"


def test_a_rank_that_hangs_fails_the_save_on_all(tmp_path: Path) -> None:
    first, second = run_ranks(one_rank_hangs, 2, str(tmp_path))
    assert first == second
    assert first.startswith(
        f"the save to {tmp_path} in the background failed: rank 1: writing to {tmp_path} did"
    )
    assert_not_published(tmp_path)


@pytest.mark.parametrize("saves", [200, pytest.param(1000, marks=pytest.mark.long)])
def test_many_saves_leak_nothing(tmp_path: Path, saves: int) -> None:
    queue, tensor = SaveQueue(), torch.zeros(250_000)

    def save_often(count: int) -> None:
        for _ in range(count):
            queue.schedule_async_request(handle(tmp_path, tensor))
            queue.maybe_finalize_async_calls(blocking=True)

    def resources() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    save_often(50)
    before, memory = resources(), resident_nbytes()
    save_often(saves)
    descriptors, threads = resources()
    assert descriptors <= before[0] and threads <= before[1]
    # Leaking one buffer per save would be 200 MB or more.
    assert resident_nbytes() - memory < 20 << 20


def test_an_unfinishable_save_at_exit_does_not_block_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise ValueError("not a save's own error")

    for name in ("bad", "good"):
        request = handle(tmp_path / name, torch.zeros(4))
        if name == "bad":
            request.add_finalize_fn(fail)
        SaveQueue().schedule_async_request(request)
    background._settle()
    assert (tmp_path / "good" / "metadata.json").exists()
    assert f"the save to {tmp_path}/bad could not be finished" in caplog.text


def resident_nbytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
