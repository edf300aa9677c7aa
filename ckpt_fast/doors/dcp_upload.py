# SPDX-License-Identifier: Apache-2.0
"""A save through another storage writer of torch DCP, in the background: to object storage, for instance.

All collectives are in the caller's thread, as in ``dcp_save``; a thread of this process calls the writer.
"""

from __future__ import annotations

import time
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult

from ckpt_fast import settings
from ckpt_fast.doors.dcp_snapshot import snapshots
from ckpt_fast.errors import CheckpointError
from ckpt_fast.pipeline import untold
from ckpt_fast.pipeline.group import ControlGroup, Outcome
from ckpt_fast.pipeline.types import SaveReport
from ckpt_fast.pipeline.worker import Worker
from ckpt_fast.settings import Settings


class Upload:
    """One save in progress, with the interface of the pipeline's ``Save``. ``SaveHandle`` takes it.

    The writer can neither be interrupted nor asked how far it is. What it has written of a save that is given
    up is left where it is, without metadata.

    Args:
        state_dict: nested, of DTensors, tensors and objects.
        writer: of torch DCP; it uses no collectives of its own.
        directory: where the writer writes to, for messages.
        process_group: the ranks that save together; None means all.
    """

    def __init__(
        self,
        state_dict: dict[str, Any],
        writer: StorageWriter,
        directory: str,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.report = SaveReport(directory)
        self._state_dict = state_dict
        self._writer = writer
        self._group = ControlGroup(process_group)
        self._planner = DefaultSavePlanner()
        self._metadata: Metadata | None = None
        self._results: list[WriteResult] = []
        self._error: BaseException | None = None
        self._cancelled = False
        self._outcome: Outcome[list[WriteResult]] | None = None
        self._worker = Worker("ckpt_fast-upload")
        self._begun = time.perf_counter()

    def stage(self) -> None:
        """Collective. Copy the state dict, plan, and begin to write.

        On return the state dict's owner may change it.

        Raises:
            CheckpointError: on every rank, naming the rank that failed.
        """
        with self.report.timed("stage"):
            copied = snapshots.take(self._state_dict, keep_buffer=True)
        self._state_dict = {}
        with self.report.timed("plan"):
            plan = self._plan(copied)
        self._group.agree(lambda: self._worker.submit(lambda: self._write(plan)))
        self._worker.close()
        self.report.stall_s = time.perf_counter() - self._begun

    @property
    def ranks(self) -> int:
        """How many ranks save together."""
        return self._group.size

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes written and bytes in all, of this rank; both are known at the end only."""
        return self.report.nbytes, self.report.nbytes

    def wait_staged(self) -> None:
        """Nothing is left to wait for when ``stage`` has returned."""

    def is_written(self) -> bool:
        """Whether this rank has nothing left to write (or has failed)."""
        return self._worker.is_done

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until this rank has nothing left to write; returns whether that was in time."""
        return self._worker.wait(timeout_s)

    def cancel(self) -> None:
        """Local. ``commit`` will raise on every rank, and nothing is published."""
        self._cancelled = True

    def abandon(self, wait_s: float) -> bool:
        """Local. Give the save up without the other ranks; returns whether the writer has returned."""
        self.cancel()
        return self._worker.abandon(wait_s)

    @property
    def failure(self) -> BaseException | None:
        """What went wrong on this rank while it wrote; None until then."""
        return self._error

    def write(self, timeout_s: float | None = None) -> None:
        """Local. Return when this rank's part is written; ``commit`` raises what went wrong, everywhere."""
        self._outcome = self._group.attempt(lambda: self._finish_writing(timeout_s))

    def commit(self) -> SaveReport:
        """Collective. Publish the checkpoint if every rank has written its part, else raise on every rank."""
        assert self._outcome is not None, "commit before write"
        with self.report.timed("commit"):
            outcomes = self._group.gather(self._outcome)
            self._group.decide(lambda: self._publish(outcomes), outcomes)
        untold.forget()
        self.report.seconds = time.perf_counter() - self._begun
        return self.report

    def _plan(self, state_dict: dict[str, Any]) -> SavePlan:
        group, planner, writer = self._group, self._planner, self._writer
        central: list[SavePlan] = []

        def plan_locally() -> SavePlan:
            Settings.read()
            planner.set_up_planner(state_dict, None, group.is_coordinator)
            writer.set_up_storage_writer(group.is_coordinator)
            return writer.prepare_local_plan(planner.create_local_plan())

        def plan_centrally() -> None:
            plans, self._metadata = planner.create_global_plan(local)
            central.extend(writer.prepare_global_plan(plans))

        local = group.gather(group.agree(plan_locally))
        group.decide(plan_centrally)
        mine = group.scatter(central)
        return group.agree(lambda: planner.finish_plan(mine))

    def _write(self, plan: SavePlan) -> None:
        try:
            with snapshots.read(self._planner.state_dict.values()) as snapshot, self.report.timed("write"):
                written = self._writer.write_data(plan, self._planner)
                written.wait()
                self._results = written.value()
            if snapshot is not None:
                self.report.host_memory_allocated += snapshot.allocated_nbytes
            self.report.nbytes = sum(result.size_in_bytes for result in self._results)
        except BaseException as error:
            self._error = error
            untold.report(self.report.directory, error)
        finally:
            self.report.written_s = time.perf_counter() - self._begun
            self._planner.state_dict = {}

    def _finish_writing(self, timeout_s: float | None) -> list[WriteResult]:
        if not self._worker.wait(timeout_s):
            self.cancel()
            raise CheckpointError(
                f"writing to {self.report.directory} did not end within the {settings.timeout_s():.0f} s "
                "that CKPT_FAST_TIMEOUT allows. The storage may hang: look at it, or allow more time."
            )
        if self._error is not None:
            raise self._error
        if self._cancelled:
            raise CheckpointError(f"the save to {self.report.directory} was cancelled")
        return self._results

    def _publish(self, outcomes: list[Outcome[list[WriteResult]]]) -> None:
        assert self._metadata is not None
        self._writer.finish(self._metadata, [outcome.value or [] for outcome in outcomes])
