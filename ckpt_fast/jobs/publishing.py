# SPDX-License-Identifier: Apache-2.0
"""The end of every save: all ranks have written, and the coordinator alone publishes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from ckpt_fast import settings
from ckpt_fast.jobs import untold
from ckpt_fast.jobs.job import Job, too_late
from ckpt_fast.jobs.worker import LEAVE_S, Task
from ckpt_fast.ranks.group import ControlGroup, Outcome

T = TypeVar("T")


class Publishing(Generic[T]):
    """One save whose ranks' outcomes have met. ``finish`` publishes it, or waits for what ``start`` began.

    Args:
        directory: the checkpoint, for messages.
        group: the ranks that save together.
        outcomes: of all ranks, on the coordinator. With a failure among them nothing is published.
        publish: what the coordinator does. Local.
        stop: lets it end soon.
    """

    def __init__(
        self,
        directory: str,
        group: ControlGroup,
        outcomes: Sequence[Outcome[Any]],
        publish: Callable[[], T],
        stop: Callable[[], None],
    ) -> None:
        self._directory, self._group, self._outcomes = directory, group, outcomes
        self._publish, self._stop = publish, stop
        self._task: Task[T] | None = None
        self._is_late = False

    def start(self) -> None:
        """Local. Publish in a thread, on the coordinator."""
        if not self._group.is_coordinator or any(outcome.error is not None for outcome in self._outcomes):
            return
        self._task = Task("ckpt_fast-publish", self._publish_unattended, self._stop)
        try:
            self._task.start()
        except RuntimeError:  # the process may start no more threads: ``finish`` publishes
            self._task = None

    @property
    def is_done(self) -> bool:
        """Local. Whether ``finish`` need not wait for this rank."""
        return self._task is None or self._task.is_done

    def wait(self, timeout_s: float | None) -> None:
        """Local. Wait for what has been started; if that is not in time, stop it, and ``finish`` raises."""
        if self._task is not None and not self._task.wait(timeout_s):
            self._stop()
            self._is_late = True

    def finish(self) -> T:
        """Collective. What ``publish`` has returned; its failure, or a rank's, is raised on every rank."""
        return self._group.decide(self._published, self._outcomes)

    def settle(self, timeout_s: float) -> bool | None:
        """Local. See ``Job.settle``."""
        if not self._group.is_coordinator:
            return None
        self.wait(timeout_s)
        return self._task is not None and self._group.attempt(self._published).error is None

    def abandon(self, wait_s: float = LEAVE_S) -> bool:
        """Local. Stop it; returns whether nothing is under way."""
        return self._task is None or self._task.abandon(wait_s)

    def _published(self) -> T:
        if self._is_late:
            written = ", although all files are written: it is not published"
            raise too_late(self._directory, settings.timeout_s(), written)
        return self._publish() if self._task is None else self._task.result()

    def _publish_unattended(self) -> T:
        try:
            return self._publish()
        except BaseException as error:
            untold.report(self._directory, error)
            raise


class PublishedJob(Job, Generic[T]):
    """A job that its coordinator publishes: at once in ``commit``, or in a thread after ``begin_commit``."""

    def __init__(self, directory: str, group: ControlGroup) -> None:
        super().__init__(directory, group)
        self._publishing: Publishing[T] | None = None

    @abstractmethod
    def _meet(self) -> Publishing[T]:
        """Collective. The coordinator learns what the ranks have written, or why they have not."""

    def begin_commit(self) -> bool:
        """Collective. Let the coordinator publish in a thread, if every rank has written its part."""
        with self.report.timed("commit"), self._abandoned_if_left():
            self._publishing = self._meet()
            self._publishing.start()
        return False

    @property
    def is_published(self) -> bool:
        """Local. Whether the thread that ``begin_commit`` has started is done."""
        return self._publishing is not None and self._publishing.is_done

    def wait_published(self, timeout_s: float | None = None) -> None:
        """Local. See ``Job.wait_published``."""
        if self._publishing is not None:
            self._publishing.wait(timeout_s)

    def settle(self, timeout_s: float) -> bool | None:
        """Local. See ``Job.settle``."""
        return self._publishing.settle(timeout_s) if self._publishing is not None else False

    def _publish_everywhere(self) -> T:
        """Collective. What publishing has returned; its failure, or a rank's, is raised on every rank."""
        with self.report.timed("commit"), self._abandoned_if_left():
            if self._publishing is None:
                self._publishing = self._meet()
            return self._publishing.finish()

    def _stop_publishing(self, wait_s: float) -> bool:
        """Local. Returns whether nothing is being published."""
        return self._publishing is None or self._publishing.abandon(wait_s)
