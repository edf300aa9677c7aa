# SPDX-License-Identifier: Apache-2.0
"""The common interface of all background saves, whatever writes their bytes."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator

from ckpt_fast.errors import CheckpointError
from ckpt_fast.jobs.report import SaveReport
from ckpt_fast.jobs.worker import LEAVE_S, Worker
from ckpt_fast.ranks.group import ControlGroup


class Job(ABC):
    """One save whose bytes are this process's own, on their way: a thread writes, all ranks commit.

    Args:
        directory: the checkpoint, for messages.
        group: the ranks that save together.

    Attributes:
        directory: the checkpoint.
        report: times and sizes; complete once it is committed.
    """

    def __init__(self, directory: str, group: ControlGroup) -> None:
        self.directory = directory
        self.report = SaveReport(directory)
        self._group = group

    @property
    @abstractmethod
    def _worker(self) -> Worker:
        """The thread that writes."""

    @property
    @abstractmethod
    def failure(self) -> BaseException | None:
        """The error on this rank; None if there is none so far."""

    @abstractmethod
    def cancel(self) -> None:
        """Local. Stop writing as soon as possible. ``commit`` will raise on every rank."""

    @abstractmethod
    def write(self, timeout_s: float | None = None) -> None:
        """Local. Return when this rank's part is written; ``commit`` raises what went wrong, everywhere.

        Args:
            timeout_s: longer than this counts as a failure.
        """

    @abstractmethod
    def commit(self) -> object:
        """Collective. Publish the checkpoint if every rank has written its part, else raise on every rank."""

    def begin_commit(self) -> bool:
        """Collective. After ``write``: the coordinator begins to publish, so that ``commit`` need not wait.

        Returns:
            Whether ``commit`` may follow at once, the same on every rank; otherwise once ``is_published``
            says so everywhere.
        """
        return True

    @property
    def is_published(self) -> bool:
        """Local. After ``begin_commit``: whether ``commit`` need not wait for this rank."""
        return True

    def wait_published(self, timeout_s: float | None = None) -> None:  # noqa: B027
        """Local. Wait for what ``begin_commit`` has begun.

        Args:
            timeout_s: longer than this counts as a failure, which ``commit`` raises on every rank.
        """

    def settle(self, timeout_s: float) -> bool | None:
        """Local. The process ends after ``begin_commit``: wait for what has been begun.

        Returns:
            Whether the checkpoint is published; None: only the coordinator knows.
        """
        return False

    @property
    def ranks(self) -> int:
        """The number of ranks that save together."""
        return self._group.size

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes that this rank has written so far, and its total if known."""
        return self.report.nbytes, self.report.nbytes

    def talk_through(self, group: ControlGroup) -> None:
        """Local. Let the collectives from now on be those of ``group``, which has the same ranks."""
        self._group = group

    def is_written(self) -> bool:
        """Whether this rank has nothing left to write (or has failed)."""
        return self._worker.is_done

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until this rank has nothing left to write; returns whether that was in time."""
        return self._worker.wait(timeout_s)

    def wait_staged(self) -> None:  # noqa: B027
        """Local. What the calling thread does from now on no longer reaches the checkpoint."""

    def abandon(self, wait_s: float = LEAVE_S) -> bool:
        """Local. Give the save up without the other ranks; returns whether nothing of it is under way."""
        self.cancel()
        return self._worker.abandon(wait_s)

    @contextlib.contextmanager
    def _abandoned_if_left(self) -> Iterator[None]:
        """Leaving this block by an exception, including Ctrl-C, leaves no writer behind."""
        try:
            yield
        except BaseException:
            self.abandon()
            raise


def too_late(directory: str, allowed_s: float, written: str = "") -> CheckpointError:
    """The error of a save whose time is up."""
    return CheckpointError(
        f"writing to {directory} did not end within the {allowed_s:.0f} s that CKPT_FAST_TIMEOUT allows"
        f"{written}. The storage may hang: look at it, or allow more time."
    )
