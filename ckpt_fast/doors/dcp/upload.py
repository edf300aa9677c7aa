# SPDX-License-Identifier: Apache-2.0
"""A save through another storage writer of torch DCP, in the background: to object storage, for instance.

All collectives are in the caller's thread, as in ``dcp_save``; a thread of this process calls the writer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult

from ckpt_fast import native, settings
from ckpt_fast.doors.dcp.snapshot import snapshots
from ckpt_fast.errors import CheckpointError
from ckpt_fast.jobs import untold
from ckpt_fast.jobs.job import too_late
from ckpt_fast.jobs.publishing import PublishedJob, Publishing
from ckpt_fast.jobs.report import SaveReport
from ckpt_fast.jobs.worker import LEAVE_S, Worker
from ckpt_fast.pipeline.save import seal
from ckpt_fast.ranks.group import ControlGroup, Outcome
from ckpt_fast.settings import Settings
from ckpt_fast.storage import owners


class Upload(PublishedJob[float]):
    """One save in progress.

    The writer can neither be interrupted nor asked how far it is. What it has written of a save that is given
    up is left where it is, without metadata; until it has returned, ``directory`` stays occupied.

    Args:
        state_dict: nested, of DTensors, tensors and objects.
        writer: of torch DCP; it uses no collectives of its own.
        directory: where the writer writes to, for messages.
        prepare: run by the coordinator before anything is written, when nothing can be refused any more.
        process_group: the ranks that save together; None means all.
    """

    def __init__(
        self,
        state_dict: dict[str, Any],
        writer: StorageWriter,
        directory: str,
        prepare: Callable[[], object] = lambda: None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(directory, ControlGroup(process_group))
        self._state_dict = state_dict
        self._writer = writer
        self._prepare = prepare
        self._planner = DefaultSavePlanner()
        self._metadata: Metadata | None = None
        self._results: list[WriteResult] = []
        self._error: BaseException | None = None
        self._progress = native.Progress()
        self._outcome: Outcome[list[WriteResult]] | None = None
        self._is_committed = False
        self._thread = Worker("ckpt_fast-upload", self._progress.stop)

    def stage(self) -> None:
        """Collective. Copy the state dict, plan, and begin to write.

        On return the state dict's owner may change it.

        Raises:
            CheckpointError: on every rank, naming the rank that failed. If another save to ``directory`` is
                not over, an older checkpoint is as before.
        """
        with self._abandoned_if_left():
            with self.report.timed("stage"):
                copied = snapshots.take(self._state_dict, keep_buffer=True)
            self._state_dict = {}
            with self.report.timed("plan"):
                plan = self._plan(copied)
                self._group.decide(self._prepare)
                self._group.agree(lambda: self._begin_writing(plan))
        self.report.stall_s = self.report.since_call()

    @property
    def _worker(self) -> Worker:
        return self._thread

    def cancel(self) -> None:
        """Local. ``commit`` will raise on every rank, and nothing is published."""
        self._progress.stop()

    @property
    def is_wanted(self) -> Callable[[], bool]:
        """Says whether nobody has given the save up. It does not keep the save."""
        progress = self._progress
        return lambda: not progress.stopped

    def is_over(self) -> bool:
        """Whether another save may be made in its place; see ``owners.Owner``."""
        publishes = self._publishing is not None and not self._publishing.is_done
        return self.is_written() and not publishes and (self._is_committed or self._progress.stopped)

    @property
    def failure(self) -> BaseException | None:
        """The error on this rank while writing; None if there is none so far."""
        return self._error

    def write(self, timeout_s: float | None = None) -> None:
        """Local. Return when this rank's part is written; ``commit`` raises what went wrong, everywhere."""
        with self._abandoned_if_left():
            self._outcome = self._group.attempt(lambda: self._finish_writing(timeout_s))

    def abandon(self, wait_s: float = LEAVE_S) -> bool:
        """Local. Give the save up without the other ranks; returns whether nothing of it is under way."""
        ended = super().abandon(wait_s)
        return self._stop_publishing(wait_s) and ended

    def commit(self) -> SaveReport:
        """Collective. Publish the checkpoint if every rank has written its part, else raise on every rank."""
        self.report.seconds = self._publish_everywhere()
        self._is_committed = True
        seal.report(self.report, self._group.global_rank)
        return self.report

    def _meet(self) -> Publishing[float]:
        assert self._outcome is not None, "commit before write"
        outcomes = self._group.gather(self._outcome)
        return Publishing(
            self.directory, self._group, outcomes, lambda: self._publish(outcomes), self._progress.stop
        )

    def _plan(self, state_dict: dict[str, Any]) -> SavePlan:
        planner, writer = self._planner, self._writer

        def plan_locally() -> SavePlan:
            Settings.read()
            owners.occupy(self.directory, self)
            planner.set_up_planner(state_dict, None, self._group.is_coordinator)
            writer.set_up_storage_writer(self._group.is_coordinator)
            return writer.prepare_local_plan(planner.create_local_plan())

        plan, self._metadata = _plan_together(self._group, planner, plan_locally, writer.prepare_global_plan)
        return plan

    def _begin_writing(self, plan: SavePlan) -> None:
        finished = self._planner.finish_plan(plan)
        self._worker.submit(lambda: self._write(finished))
        self._worker.close()

    def _write(self, plan: SavePlan) -> None:
        try:
            if self._progress.stopped:
                return
            with snapshots.read(self._planner.state_dict.values()) as snapshot, self.report.timed("write"):
                written = self._writer.write_data(plan, self._planner)
                written.wait()
                self._results = written.value()
            if snapshot is not None:
                self.report.host_memory_allocated += snapshot.allocated_nbytes
            self.report.nbytes = sum(result.size_in_bytes for result in self._results)
        except BaseException as error:
            self._error = error
            if not self._progress.stopped:
                untold.report(self.report.directory, error)
        finally:
            self.report.written_s = self.report.since_call()
            self._planner.state_dict = {}

    def _finish_writing(self, timeout_s: float | None) -> list[WriteResult]:
        if not self._worker.wait(timeout_s):
            self.cancel()
            raise too_late(self.directory, settings.timeout_s())
        if self._error is not None:
            raise self._error
        if self._progress.stopped:
            raise CheckpointError(f"the save to {self.report.directory} was cancelled")
        return self._results

    def _publish(self, outcomes: list[Outcome[list[WriteResult]]]) -> float:
        """Returns the seconds since the save began."""
        assert self._metadata is not None
        if self._progress.stopped:
            raise CheckpointError(f"the save to {self.report.directory} was cancelled")
        self._writer.finish(self._metadata, [outcome.value or [] for outcome in outcomes])
        return self.report.since_call()


def _plan_together(
    group: ControlGroup,
    planner: SavePlanner,
    plan_locally: Callable[[], SavePlan],
    divide: Callable[[list[SavePlan]], list[SavePlan]] = lambda plans: plans,
) -> tuple[SavePlan, Metadata | None]:
    """Collective. torch DCP's planning: every rank's plan, then the plan of all, then each its own part.

    Args:
        group: the ranks that save together.
        planner: makes the plan of all.
        plan_locally: makes this rank's.
        divide: has the last word on the plan of all, which it gets in rank order. Runs on the coordinator.

    Returns:
        This rank's part; and what ``.metadata`` will say, on the coordinator.

    Raises:
        CheckpointError: on every rank, naming the rank that failed.
    """
    plans: list[SavePlan] = []
    metadata: list[Metadata] = []

    def plan_globally() -> None:
        together, described = planner.create_global_plan([each.value for each in local if each.value])
        plans.extend(divide(together))
        metadata.append(described)

    local = group.collect(plan_locally)
    group.decide(plan_globally, local)
    return group.scatter(plans), metadata[0] if metadata else None
