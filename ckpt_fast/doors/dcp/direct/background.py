# SPDX-License-Identifier: Apache-2.0
"""Saves that end by themselves: a thread writes, and a second one commits, with collectives of its own.

The ranks commit through a process group that nothing else uses, so that these collectives cannot meet those
of training. They commit one save after the other, in the order in which all ranks have started them.
"""

from __future__ import annotations

import concurrent.futures
import datetime
import os
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch.distributed as dist

from ckpt_fast import settings
from ckpt_fast.errors import AsyncSaveError
from ckpt_fast.jobs import untold
from ckpt_fast.jobs.background import SaveHandle
from ckpt_fast.jobs.failures import is_rank_lost
from ckpt_fast.jobs.report import SaveReport
from ckpt_fast.jobs.worker import LEAVE_S
from ckpt_fast.pipeline.save.save import Save
from ckpt_fast.ranks.devices import on_this_gpu
from ckpt_fast.ranks.group import ControlGroup, PerGroup


class SaveFuture(Future[SaveReport]):
    """The outcome of a save in the background: a ``concurrent.futures.Future``. None of it is collective.

    It cannot be cancelled: the other ranks could not know. An error that nobody asks for is logged when it
    happens, and again at exit.

    Args:
        directory: the checkpoint.

    Attributes:
        directory: the same.
    """

    def __init__(self, directory: str) -> None:
        super().__init__()
        self.directory = directory
        self.set_running_or_notify_cancel()

    def result(self, timeout: float | None = None) -> SaveReport:
        """Wait for the end of the save; its report.

        Raises:
            AsyncSaveError: the save failed, on every rank; nothing was published.
            TimeoutError: it takes longer than ``timeout`` seconds.
        """
        error = self.exception(timeout)
        if error is not None:
            raise error
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the end of the save; its error, None if it was published."""
        error = super().exception(timeout)
        if error is not None:
            untold.forget(self.directory)
        return error


class Committer:
    """Commits the background saves of one process group, in a thread that the interpreter waits for."""

    def __init__(self) -> None:
        self._group: ControlGroup | None = None
        self._thread = ThreadPoolExecutor(1, "ckpt_fast-commit")

    def get_ready(self, group: ControlGroup, process_group: dist.ProcessGroup | None) -> None:
        """Collective. Have a process group to commit through; the first call creates it.

        Args:
            group: talks through ``process_group``.
            process_group: None means all ranks.
        """
        if self._group is None:
            self._group = group if group.size == 1 else ControlGroup(new_control_group(process_group))

    def finish(self, job: Save, when_failed: Callable[[], None] | None = None) -> SaveFuture:
        """Local. Write and commit a staged save that owns its bytes; all ranks do so in the same order.

        Args:
            job: the save.
            when_failed: called on the coordinator if it has failed, once nobody writes any more. All ranks
                give one, or none does.
        """
        assert self._group is not None, "get_ready comes first"
        future = SaveFuture(job.directory)
        handle = SaveHandle(job)
        job.talk_through(self._group)
        try:
            handle.start()
            self._thread.submit(on_this_gpu(_finish), handle, future, self._group, when_failed)
        except BaseException:
            handle.abandon()
            raise
        _in_flight[_key(job.directory)] = future
        return future


committers = PerGroup(Committer)


def new_control_group(process_group: dist.ProcessGroup | None) -> Any:
    """Collective. A CPU group that nothing else uses, of the ranks of ``process_group`` (None: all)."""
    timeout = meeting_timeout()
    ranks = None if process_group is None else dist.get_process_group_ranks(process_group)
    if ranks is None or len(ranks) == dist.get_world_size():
        return dist.new_group(ranks, timeout, "gloo")
    # torch names it by how many groups each of these ranks is in, which must be as many on all of them.
    return dist.new_group(ranks, timeout, "gloo", use_local_synchronization=True)


def meeting_timeout() -> datetime.timedelta:
    """How long ranks wait for each other; one may need all of its time to write meanwhile."""
    return datetime.timedelta(seconds=2 * settings.timeout_s())


_in_flight: weakref.WeakValueDictionary[str, SaveFuture] = weakref.WeakValueDictionary()


def wait_for_save(directory: str) -> None:
    """Local. Return once no background save of this kind to the directory is in flight.

    Whether it was published is for the holder of its future to find out.
    """
    earlier = _in_flight.get(_key(directory))
    if earlier is not None:
        concurrent.futures.wait([earlier])


def _finish(
    handle: SaveHandle, future: SaveFuture, group: ControlGroup, when_failed: Callable[[], None] | None
) -> None:
    try:
        handle.finalize()
    except BaseException as error:
        untold.report(handle.directory, error)
        try:
            if when_failed is not None and isinstance(error, AsyncSaveError) and not is_rank_lost(error):
                _clean_up(handle, group, when_failed)
        finally:
            future.set_exception(error)
    else:
        future.set_result(handle.report)


def _clean_up(handle: SaveHandle, group: ControlGroup, when_failed: Callable[[], None]) -> None:
    """Collective. ``when_failed``, if the threads of all ranks have ended."""
    if group.all_true(handle.abandon(LEAVE_S)) and group.is_coordinator:
        when_failed()


def _key(directory: str) -> str:
    return os.path.realpath(directory)
