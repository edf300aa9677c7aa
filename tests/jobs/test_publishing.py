# SPDX-License-Identifier: Apache-2.0
"""The end of a background save: the coordinator publishes it in a thread, and nobody waits for storage."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ckpt_fast.errors import AsyncSaveError
from ckpt_fast.format.types import TensorShard
from ckpt_fast.jobs import background
from ckpt_fast.jobs.background import SaveHandle, SaveQueue
from tests.helpers import run_ranks
from tests.interrupting import interrupted_at
from tests.jobs.conftest import Exits
from tests.pipeline.layouts import same
from tests.pipeline.save.test_save import FILES, assert_not_published, loaded, names
from tests.saves import new_save, save

pytestmark = pytest.mark.usefixtures("no_fsync")


class Storage:
    """Publishing that waits for ``opened``, and may fail then.

    ``selected`` are the checkpoints that were made the newest.
    """

    def __init__(self, error: Exception | None = None) -> None:
        self.opened, self.entered, self.error = threading.Event(), threading.Event(), error
        self.selected: list[str] = []
        self.threads: set[str] = set()

    def finish(self, _: str) -> tuple[()]:
        self.entered.set()
        self.threads.add(threading.current_thread().name)
        assert self.opened.wait(30)
        if self.error is not None:
            raise self.error
        return ()


def handle(directory: Path | str, storage: Storage, value: float, rank: int = 0, rows: int = 1) -> SaveHandle:
    """Stage a save of one row of ``w`` that is published by ``storage``."""
    shard = TensorShard("w", torch.full((1, 1000), value), (rank, 0), (rows, 1000))
    job = new_save(
        [shard],
        os.fspath(directory),
        snapshot=True,
        finish=storage.finish,
        select=lambda: storage.selected.append(os.fspath(directory)),
        **FILES,
    )
    job.stage()
    return SaveHandle(job)


def polled(queue: SaveQueue) -> list[int]:
    """What ``maybe_finalize_async_calls`` finalizes, once it finalizes something."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        finalized = queue.maybe_finalize_async_calls()
        if finalized:
            return finalized
        time.sleep(0.005)
    raise AssertionError("it is never published")


def holds(directory: Path, value: float, rows: int = 1) -> bool:
    return same(loaded(directory, "w", torch.zeros(rows, 1000)), torch.full((rows, 1000), value))


def test_training_goes_on_while_a_save_is_published(tmp_path: Path) -> None:
    storage, queue, finished = Storage(), SaveQueue(), []
    request = handle(tmp_path, storage, 1.0)
    request.add_finalize_fn(lambda: finished.append(list(storage.selected)))
    queue.schedule_async_request(request)
    request.wait()
    assert queue.maybe_finalize_async_calls() == []  # begins to publish, and does not wait
    assert storage.entered.wait(30)
    assert queue.maybe_finalize_async_calls() == [] and queue.get_num_unfinalized_calls() == 1
    assert_not_published(tmp_path)
    storage.opened.set()
    assert polled(queue) == [0]
    assert finished == [[str(tmp_path)]] and holds(tmp_path, 1.0)
    assert storage.threads == {"ckpt_fast-publish"}
    assert 0 < request.report.written_s <= request.report.seconds
    assert request.report.steps["commit"] > 0


def test_it_is_selected_although_nobody_asks_again(tmp_path: Path) -> None:
    storage, queue = Storage(), SaveQueue()
    storage.opened.set()
    request = handle(tmp_path, storage, 1.0)
    queue.schedule_async_request(request)
    request.wait()
    queue.maybe_finalize_async_calls()
    deadline = time.monotonic() + 30
    while not storage.selected and time.monotonic() < deadline:
        time.sleep(0.005)
    assert storage.selected == [str(tmp_path)] and holds(tmp_path, 1.0)
    queue.close()


def test_a_blocking_call_waits_for_what_has_begun(tmp_path: Path) -> None:
    storage, queue = Storage(), SaveQueue()
    request = handle(tmp_path, storage, 1.0)
    queue.schedule_async_request(request)
    request.wait()
    assert queue.maybe_finalize_async_calls() == []
    threading.Timer(0.2, storage.opened.set).start()
    assert queue.maybe_finalize_async_calls(blocking=True) == [0]
    assert storage.selected == [str(tmp_path)]
    assert storage.threads == {"ckpt_fast-publish"}, "it was published twice, or by the training thread"


def test_a_failure_to_publish_is_raised_by_the_next_call(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "checkpoint"
    save([TensorShard("w", torch.full((1, 1000), 1.0), (0, 0), (1, 1000))], os.fspath(directory), **FILES)
    storage, queue = Storage(OSError(5, "the disk is on fire")), SaveQueue()
    storage.opened.set()
    request = handle(directory, storage, 2.0)
    request.add_finalize_fn(lambda: pytest.fail("nothing was published"))
    queue.schedule_async_request(request)
    request.wait()
    with pytest.raises(AsyncSaveError, match=r"in the background failed: rank 0: OSError: .*on fire"):
        polled(queue)
    assert "the disk is on fire" in caplog.text
    assert queue.get_num_unfinalized_calls() == 0 and not storage.selected
    assert holds(directory, 1.0), "the older checkpoint is lost"
    assert names(tmp_path) == {directory.name}, "something is left beside it"
    again = Storage()
    again.opened.set()
    queue.schedule_async_request(handle(directory, again, 3.0))
    assert queue.maybe_finalize_async_calls(blocking=True) == [1]
    assert holds(directory, 3.0)


@pytest.mark.parametrize("how", ["abandon", "abort", "cancel"])
def test_giving_up_while_it_is_published(tmp_path: Path, how: str) -> None:
    directory = tmp_path / "checkpoint"
    save([TensorShard("w", torch.full((1, 1000), 1.0), (0, 0), (1, 1000))], os.fspath(directory), **FILES)
    storage, queue = Storage(), SaveQueue()
    request = handle(directory, storage, 2.0)
    queue.schedule_async_request(request)
    request.wait()
    assert queue.maybe_finalize_async_calls() == [] and storage.entered.wait(30)
    threading.Timer(0.2, storage.opened.set).start()
    if how == "abandon":
        assert request.abandon(30)
    elif how == "abort":
        queue.close(abort=True)
    else:
        request.cancel()
        with pytest.raises(AsyncSaveError, match="cancel"):
            queue.maybe_finalize_async_calls(blocking=True)
    assert not storage.selected and holds(directory, 1.0)
    assert names(tmp_path) == {directory.name}, "something is left beside it"
    again = Storage()
    again.opened.set()
    other = SaveQueue()
    other.schedule_async_request(handle(directory, again, 3.0))
    assert other.maybe_finalize_async_calls(blocking=True) == [0]
    assert holds(directory, 3.0)


def test_an_interruption_anywhere_leaves_one_checkpoint_or_the_other(tmp_path: Path) -> None:
    """Ctrl-C in the call that begins to publish, and in the one that finds it published."""

    def threads() -> int:
        # Python keeps an entry of a thread whose start was interrupted before there was one.
        return sum(each.ident is not None for each in threading.enumerate())

    moment, before = 1, threads()
    while True:
        directory = tmp_path / str(moment)
        storage, queue = Storage(), SaveQueue()
        storage.opened.set()
        save([TensorShard("w", torch.full((1, 1000), 1.0), (0, 0), (1, 1000))], str(directory), **FILES)
        request = handle(directory, storage, 2.0)
        queue.schedule_async_request(request)
        request.wait()
        came = interrupted_at(moment, lambda queue=queue: polled(queue))
        if not came:
            break
        assert request.abandon(30)
        deadline = time.monotonic() + 10  # one that was not needed may be about to end
        while threads() > before and time.monotonic() < deadline:
            time.sleep(0.001)
        assert threads() == before, "a thread is left"
        assert holds(directory, 2.0) or holds(directory, 1.0)
        moment += 19
    assert moment > 50


def publish_on_two(rank: int, directory: str, fails: bool) -> list[Any]:
    """What each poll finalizes, up to the first that finalizes something or raises."""
    storage, queue = Storage(ValueError("no") if fails else None), SaveQueue()
    request = handle(directory, storage, 4.0, rank, dist.get_world_size())
    queue.schedule_async_request(request)
    request.wait()
    dist.barrier()
    seen: list[Any] = [queue.maybe_finalize_async_calls(), queue.maybe_finalize_async_calls()]
    storage.opened.set()
    try:
        while not seen[-1]:
            seen.append(queue.maybe_finalize_async_calls())
    except AsyncSaveError as error:
        seen.append(str(error))
    return [seen, storage.selected, sorted(storage.threads)]


@pytest.mark.parametrize("fails", [False, True])
def test_all_ranks_learn_together_what_became_of_it(tmp_path: Path, fails: bool) -> None:
    first, second = run_ranks(publish_on_two, 2, str(tmp_path), fails)
    assert first[0] == second[0] and first[0][:2] == [[], []]
    assert (first[2], second[2]) == (["ckpt_fast-publish"], [])
    if fails:
        assert "rank 0: ValueError: no" in first[0][-1]
        assert_not_published(tmp_path)
    else:
        assert first[0][-1] == [0] and (first[1], second[1]) == ([str(tmp_path)], [])
        assert holds(tmp_path, 4.0, rows=2)


def test_ranks_that_end_while_it_is_published_publish_it(exits: Exits, tmp_path: Path) -> None:
    first, second = exits(tmp_path, "publishing", ranks=2)
    assert "the checkpoint is published" in first.stderr
    assert "rank 0 says what became of it" in second.stderr
    for done in (first, second):
        assert done.status == 0, done.stderr
        assert "finalized" not in done.stdout and "Traceback" not in done.stderr
        assert f"before the save to {tmp_path}/second was finalized: " in done.stderr
    expected = torch.tensor([0.0, 1.0]).view(2, 1).expand(2, 100_000)
    assert same(loaded(tmp_path / "second", "w", torch.ones(2, 100_000)), expected.contiguous())


def test_one_rank_that_ends_while_it_is_published_finalizes_it(exits: Exits, tmp_path: Path) -> None:
    (done,) = exits(tmp_path, "publishing")
    assert done.status == 0 and "finalized" in done.stdout, done.stderr


def test_a_process_killed_while_it_is_published_has_the_older_one(exits: Exits, tmp_path: Path) -> None:
    (done,) = exits(tmp_path, "killed while publishing")
    assert done.status == -signal.SIGKILL
    assert (tmp_path / "first" / "metadata.json").exists()
    assert_not_published(tmp_path / "second")


def test_where_no_thread_can_be_started_it_is_published_by_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, queue = Storage(), SaveQueue()
    storage.opened.set()
    request = handle(tmp_path, storage, 1.0)
    queue.schedule_async_request(request)
    request.wait()

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert queue.maybe_finalize_async_calls() == []
    assert queue.maybe_finalize_async_calls() == [0]
    assert storage.threads == {threading.current_thread().name} and holds(tmp_path, 1.0)


def test_nothing_is_left_in_flight(tmp_path: Path) -> None:
    storage, queue = Storage(), SaveQueue()
    storage.opened.set()
    queue.schedule_async_request(handle(tmp_path, storage, 1.0))
    polled(queue)
    assert not background._in_flight


def hang(rank: int, directory: str) -> tuple[str, bool]:
    """What the call that finds the time up raises, on a file system that hangs while rank 0 publishes."""
    os.environ["CKPT_FAST_TIMEOUT"] = "1"
    storage, queue = Storage(), SaveQueue()
    try:
        queue.schedule_async_request(handle(directory, storage, 4.0, rank, dist.get_world_size()))
        return str(polled_error(queue)), bool(queue.handles)
    finally:
        del os.environ["CKPT_FAST_TIMEOUT"]
        storage.opened.set()


def polled_error(queue: SaveQueue) -> AsyncSaveError:
    with pytest.raises(AsyncSaveError) as caught:
        polled(queue)
    return caught.value


@pytest.mark.parametrize("world_size", [1, 2])
def test_publishing_that_hangs_fails_the_save_in_time(tmp_path: Path, world_size: int) -> None:
    (tmp_path / "new").mkdir()
    found = run_ranks(hang, world_size, str(tmp_path / "new"))
    assert len(set(found)) == 1
    text, is_in_flight = found[0]
    assert "did not end within the 1 s that CKPT_FAST_TIMEOUT allows" in text and not is_in_flight
    assert "not published" in text
    assert_not_published(tmp_path / "new")
