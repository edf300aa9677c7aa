# SPDX-License-Identifier: Apache-2.0
"""``ckpt_fast.CheckpointManager``: names, back-pressure, retention and fall-back around ``async_save``."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
from collections.abc import Iterable, Mapping
from signal import Signals
from types import TracebackType
from typing import Any, Literal

import torch.distributed as dist

from ckpt_fast.doors.dcp.direct import save as dcp_save
from ckpt_fast.doors.dcp.direct.background import SaveFuture, new_control_group
from ckpt_fast.doors.dcp.direct.functions import load, save_in_background
from ckpt_fast.doors.dcp.places import StrPath
from ckpt_fast.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError
from ckpt_fast.jobs.report import SaveReport
from ckpt_fast.manager.directory import CheckpointDirectory
from ckpt_fast.manager.failures import FailedSaves
from ckpt_fast.pipeline.save.parts import Completion
from ckpt_fast.ranks.group import ControlGroup, PerGroup
from ckpt_fast.retention.line import Lineage, Origin, metrics_note
from ckpt_fast.retention.policies import Policy, require_policies
from ckpt_fast.run.signal_handler import DistributedSignalHandler
from ckpt_fast.storage.files import absolute

logger = logging.getLogger(__name__)


def _require_file_system(directory: StrPath) -> None:
    if not os.fspath(directory):
        raise ValueError("directory is empty; '.' is the current one")
    # A Path has swallowed one of the slashes.
    if re.match(r"[a-z][a-z0-9+.-]+:/", os.fspath(directory)):
        raise ValueError(
            f"directory={os.fspath(directory)!r} is in object storage, where CheckpointManager cannot save: "
            "it relies on renames in a file system. Give a path of a file system that all ranks share; "
            "save_checkpoint and the strategies of Megatron-Core save to object storage."
        )


class _Decisions:
    """The process group through which the managers of a process group decide. Created once."""

    def __init__(self) -> None:
        self.group: ControlGroup | None = None

    def ready(self, group: ControlGroup, process_group: dist.ProcessGroup | None) -> ControlGroup:
        """Collective, at the first call."""
        if self.group is None:
            self.group = group if group.size == 1 else ControlGroup(new_control_group(process_group))
        return self.group


_decisions = PerGroup(_Decisions)


class CheckpointManager:
    """The checkpoints of a training loop: saved in the background, pruned, and restored from.

    They are written by ``ckpt_fast.async_save`` and read by ``ckpt_fast.load``, as directories
    ``iter_<step>`` of torch DCP's files, which ``torch.distributed.checkpoint.load`` reads as well. A
    checkpoint counts once ``latest_checkpointed_iteration.txt`` beside them names it, which is after all
    ranks have written.
    ``ckpt-fast ls``, ``prune``, ``verify`` and ``inspect`` know such a directory.

    As a context manager, it finishes what is in flight at the end. All methods but ``wait`` and ``close``
    are collective: all ranks call them in the same order. What depends on the directory, or on a signal, is
    the same on all ranks.

    Args:
        directory: on a file system that all ranks share; the same on every rank. Created by the first save.
            Not in object storage (``msc://...``).
        policies: which checkpoints stay (``KeepNewest``, ``KeepEvery``, ``KeepBest``, ``KeepFor``,
            ``KeepIf``, ``MaxBytes``): those that one of them keeps. None: all stay. The newest always does.
        save_every: ``should_save`` is true for multiples of it; None: for a signal only.
        save_on: a signal, normally ``signal.SIGTERM``, after which ``should_save`` is true and ``stopping``
            is set; it has no other effect while the manager is entered. None: signals do what they always do.
        process_group: the ranks that save and load together; None means all.
        no_dist: this rank saves and loads alone, and calls no collectives.
        thread_count: files per rank; None: as many as are fastest there.
        on_save_failure: if a save fails, "raise" its error by the next call, or "continue" with a warning.
            Lost ranks, what the program got wrong, and the last save (``close``) are raised in any case.
            None: what ``CKPT_FAST_ON_SAVE_FAILURE`` says ("raise").
        max_failed_saves: how many saves may fail in a row if training continues; one more raises. None: what
            ``CKPT_FAST_MAX_FAILED_SAVES`` says (3).

    Attributes:
        stopping: whether a rank had received the signal at the last ``should_save``; the same on all ranks.

    Raises:
        ValueError: ``save_every`` or ``max_failed_saves`` is not positive, ``policies`` or
            ``on_save_failure`` is something else, or ``directory`` is empty or in object storage.
    """

    def __init__(
        self,
        directory: StrPath,
        *,
        policies: Iterable[Policy] | None = None,
        save_every: int | None = None,
        save_on: Signals | int | None = None,
        process_group: dist.ProcessGroup | None = None,
        no_dist: bool = False,
        thread_count: int | None = None,
        on_save_failure: Literal["raise", "continue"] | None = None,
        max_failed_saves: int | None = None,
    ) -> None:
        _require_file_system(directory)
        if save_every is not None and save_every < 1:
            raise ValueError(f"save_every={save_every} is not a positive number of steps")
        self.stopping = False
        self._policies = require_policies(policies)
        self._save_every = save_every
        self._directory = CheckpointDirectory(absolute(directory))
        self._ranks: dict[str, Any] = {"process_group": process_group, "no_dist": no_dist}
        self._thread_count = thread_count
        group = ControlGroup.of_one() if no_dist else ControlGroup(process_group)
        self._group = _decisions.get(group, process_group).ready(group, process_group)
        self._failures = FailedSaves(self._group, on_save_failure, max_failed_saves)
        self._newest: int | None = None
        self._lineage = Lineage()
        self._in_flight: SaveFuture | None = None
        self._in_flight_step: int | None = None
        self._pruning: threading.Thread | None = None
        self._report: SaveReport | None = None
        self._signal = DistributedSignalHandler(save_on) if save_on is not None else None
        self._saved_step: int | None = None

    def save(
        self, step: int, state_dict: Mapping[str, Any], *, metrics: Mapping[str, Any] | None = None
    ) -> SaveFuture:
        """Collective. Save a state dict in the background; see ``ckpt_fast.async_save``.

        At most one save is in flight: training waits here for the one before, not for its deletions.

        Args:
            step: the training step, from 1 on. A checkpoint of this step is replaced.
            state_dict: nested dicts and lists of tensors and objects. Copied when this returns.
            metrics: numbers by name, noted in the checkpoint for ``KeepBest``; rank 0's count.

        Returns:
            A ``concurrent.futures.Future`` with the ``SaveReport``. Nobody has to wait for it. With
            ``on_save_failure="continue"`` it may have failed already: there was no room, for instance.

        Raises:
            AsyncSaveError: on every rank: the save before has failed. This one was not begun; call again.
            CheckpointError: on every rank, naming the rank that failed; nothing is in flight.
            ValueError: on every rank: ``step`` is not positive, a metric is no number, or ranks differ in
                what they do about failed saves.
        """
        self._failures.agree()
        self._settle()
        notes = self._group.agree(lambda: self._notes(step, metrics), keep_kind=True)
        directory = self._directory.path(step)
        try:
            self._in_flight = save_in_background(
                state_dict,
                directory,
                Completion(notes=notes, select=lambda: self._publish(step)),
                thread_count=self._thread_count,
                when_failed=lambda: self._directory.remove_unfinished(step),
                **self._ranks,
            )
        except CheckpointError as error:
            self._failures.require_storage(error)
            future = SaveFuture(directory)
            future.set_exception(error)
            self._fail(future, error)
            return future
        self._saved_step = self._in_flight_step = step
        return self._in_flight

    def should_save(self, step: int) -> bool:
        """Collective if ``save_on`` is given. Whether a save is due after this step; the same on all ranks.

        It costs one small all-reduce on the CPU then.

        Args:
            step: the training step.
        """
        if self._signal is not None and not self.stopping:
            self.stopping = not self._group.all_true(not self._signal.received)
        is_due = self._save_every is not None and step % self._save_every == 0
        return (is_due or self.stopping) and step != self._saved_step

    def latest(self) -> int | None:
        """Collective. The step that ``restore`` would try first; None if there is no checkpoint."""
        return self._group.decide(self._directory.selected, keep_kind=True)

    def restore(
        self, state_dict: dict[str, Any], step: int | None = None, *, allow_partial_load: bool = False
    ) -> int | None:
        """Collective. Fill a state dict in place from the newest whole checkpoint; see ``ckpt_fast.load``.

        The number of ranks and the sharding may be others than when it was saved. If the newest is damaged,
        the one it came from is loaded, and so on, with a warning each; what an abandoned branch has left is
        never taken. What is saved from now on notes that it came from this checkpoint.

        Args:
            state_dict: nested dicts and lists of tensors and objects, as for ``save``.
            step: load this one and no other; None: the newest.
            allow_partial_load: leave as they are the values that the checkpoint does not have. Then no other
                is tried if it is damaged: values of both might come together.

        Returns:
            The step; None if there is no checkpoint: the state dict is as before.

        Raises:
            CheckpointNotFoundError: there is no checkpoint of ``step``.
            CheckpointCorruptError: none is whole; that of the newest.
            CheckpointMismatchError, UnsafeCheckpointError: see ``ckpt_fast.load``.
            AsyncSaveError: the save in flight has failed; call again.
        """
        self.wait()
        problem: CheckpointError | None = None
        for origin in self._group.decide(lambda: self._directory.to_restore(step), keep_kind=True):
            try:
                self._load(state_dict, origin, allow_partial_load)
            except (CheckpointCorruptError, CheckpointNotFoundError) as error:
                if allow_partial_load:  # what it has filled, an older one may not have
                    raise
                problem = problem or error
                if self._group.is_coordinator:
                    logger.warning("the checkpoint of step %d is not loaded: %s", origin.iteration, error)
                continue
            self._lineage, self._saved_step = Lineage(origin), origin.iteration
            self._newest = origin.iteration
            return origin.iteration
        if problem is not None:
            raise problem
        return None

    def wait(self) -> SaveReport | None:
        """Wait for the save in flight, and for deletions. The report of the last save that was published;
        None before the first.

        Raises:
            AsyncSaveError: on every rank, once: it has failed, and training may not go on; the checkpoints
                before it are as they were.
        """
        self._settle()
        if self._pruning is not None:
            self._pruning.join()
            self._pruning = None
        return self._report

    def _settle(self) -> None:
        """Wait for the save in flight; errors as of ``wait``."""
        future = self._in_flight
        if future is not None:
            error = future.exception()
            self._in_flight = None
            if error is not None:
                self._fail(future, error)
                return
            self._report, self._newest = future.result(), self._in_flight_step
            self._failures.end()

    def _fail(self, future: SaveFuture, error: BaseException) -> None:
        """A save has failed; errors as of ``wait``."""
        self._saved_step = None
        dcp_save.forget(**self._ranks)
        self._failures.add(error, future.directory, self._newest)

    def close(self) -> None:
        """Finish what is in flight, and give the signal its former effect back.

        Raises:
            AsyncSaveError: on every rank: the last save has failed, even if training has gone on after it.
            CheckpointWriteError: the same, of a last save that was not even begun.
        """
        try:
            self.wait()
            self._failures.raise_last()
        finally:
            if self._signal is not None:
                self._signal.release()

    def __enter__(self) -> CheckpointManager:
        if self._signal is not None:
            self._signal.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        # It has been logged, and the error that ends the block is the one to see.
        with contextlib.suppress(CheckpointError):
            self.close()

    def _notes(self, step: int, metrics: Mapping[str, Any] | None) -> dict[str, Any]:
        if isinstance(step, bool) or not isinstance(step, int) or step < 1:
            raise ValueError(f"step={step!r} is not a positive whole number")
        return {**metrics_note(metrics), **self._lineage.notes(step)}

    def _publish(self, step: int) -> None:
        """On rank 0, in the thread that commits, once the checkpoint is sealed."""
        self._directory.publish(step)
        # The other ranks wait for the commit, but need not wait for deletions.
        before = self._pruning

        def prune() -> None:
            if before is not None:
                before.join()
            if self._policies:
                self._directory.prune(self._policies)
            self._directory.sweep()

        pruning = threading.Thread(target=prune, name="ckpt_fast-prune")
        try:
            pruning.start()
        except RuntimeError:  # the interpreter ends, and starts no more threads
            prune()
        else:
            self._pruning = pruning

    def _load(self, state_dict: dict[str, Any], origin: Origin, allow_partial_load: bool) -> None:
        def require_whole() -> None:
            damage = self._directory.damage(origin.iteration)
            if damage is not None:
                raise CheckpointCorruptError(damage)

        self._group.decide(require_whole, keep_kind=True)
        path = self._directory.path(origin.iteration)
        load(state_dict, path, allow_partial_load=allow_partial_load, **self._ranks)
