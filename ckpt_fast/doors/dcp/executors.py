# SPDX-License-Identifier: Apache-2.0
"""The background saves of ``dcp.async_save``: in a thread, through a process group of their own.

torch's thread talks through the process group of training, whose collectives it may meet. Its process gets a
copy of the state, and ends with the job. A save of ours needs neither (docs/decisions/0044).
"""

from __future__ import annotations

import functools
import logging
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException, _is_wrapped_exception, _wrap_exception
from torch.distributed.checkpoint.utils import _DistWrapper, _get_failure_dict
from torch.distributed.distributed_c10d import _get_default_store

from ckpt_fast.doors.dcp.direct.background import meeting_timeout, new_control_group
from ckpt_fast.doors.dcp.places import StrPath, is_served, located
from ckpt_fast.doors.dcp.planning.planners import InstalledSavePlanner
from ckpt_fast.doors.dcp.steps import let_go
from ckpt_fast.doors.dcp.writer import FastStorageWriter
from ckpt_fast.errors import CheckpointError
from ckpt_fast.ranks.devices import on_this_gpu
from ckpt_fast.ranks.group import ControlGroup, PerGroup

logger = logging.getLogger(__name__)

_MIXTURE = (
    "some ranks save in the background with ckpt_fast and others without it; call ckpt_fast.install() on "
    "every rank, or on none"
)


class _Background:
    """The background saves of one process group: one after the other, as all ranks start them."""

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None
        self._thread = ThreadPoolExecutor(1, "ckpt_fast-dcp")

    def get_ready(self, process_group: dist.ProcessGroup | None, meet: Callable[[Any], None]) -> None:
        """Collective. Have a process group to save through; the first call creates it.

        Args:
            process_group: of the ranks that save; None means all.
            meet: called before, as creating one waits for ranks that have no ckpt_fast.

        Raises:
            CheckpointException: see ``meet_threads`` and ``meet_processes``.
        """
        if self._group is None:
            meet(_DistWrapper(process_group, True, 0))
            self._group = new_control_group(process_group)

    def submit(self, staged: Any, options: dict[str, Any]) -> Future[Any]:
        """Local. Save what has been, or is being, staged; ``options`` mean what they mean here and now.

        The future cannot be cancelled, even while the save waits for another: no other rank could know.
        """
        place: dict[str, Any] = {}
        if options.get("planner") is None:
            place["planner"] = InstalledSavePlanner()
        if self._group is not None:
            place["process_group"] = self._group
        if options.get("checkpoint_id"):
            place["checkpoint_id"] = located(options["checkpoint_id"])
        if options.get("storage_writer") is None:
            place["storage_writer"] = FastStorageWriter(place["checkpoint_id"])
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        saved = self._thread.submit(on_this_gpu(_save), staged, options | place)
        saved.add_done_callback(functools.partial(_hand_on, future))
        return future


_backgrounds = PerGroup(_Background)


class _InThisProcess:
    """Takes the place of an executor of torch's."""

    _meet: Callable[[Any], None]

    def execute_save(self, staging_future_or_state_dict: Any, **options: Any) -> Future[Any]:
        """Start a save; what it is not for is left to torch.

        Args:
            staging_future_or_state_dict: what the stager returned.
            options: those of ``dcp.save``.
        """
        if not _is_ours(options.get("storage_writer"), options.get("checkpoint_id")):
            executed: Future[Any] = super().execute_save(  # type: ignore[misc]
                staging_future_or_state_dict, **options
            )
            return executed
        let_go()  # one that failed on another rank, in this thread
        process_group = options.get("process_group")
        alone = options.get("no_dist") or not (dist.is_available() and dist.is_initialized())
        group = ControlGroup.of_one() if alone else ControlGroup(process_group)
        background = _backgrounds.get(group, process_group)
        if group.size > 1 and options.get("use_collectives", True):
            background.get_ready(process_group, self._meet)
        return background.submit(staging_future_or_state_dict, options)


def in_this_process(meet: Callable[[Any], None], executor: type) -> type:
    """A class that takes the place of one of torch's executors, which meets the other ranks by ``meet``."""
    members = {"__module__": __name__, "_meet": staticmethod(meet)}
    return type(executor.__name__, (_InThisProcess, executor), members)


def meet_threads(ranks: Any) -> None:
    """Collective. As torch's thread begins a save: a rank that saves with it gets an answer, and all raise.

    Args:
        ranks: torch's ``_DistWrapper``.

    Raises:
        CheckpointException: some ranks have ckpt_fast and others have not.
    """
    # To the coordinator, if torch saves there, it is a rank that has failed.
    gathered = ranks.gather_object(_wrap_exception(CheckpointError(_MIXTURE)))
    answers = None
    if gathered is not None:
        is_mixed = not all(_is_wrapped_exception(each) and str(each[0]) == _MIXTURE for each in gathered)
        answer = CheckpointException("plan", _get_failure_dict(gathered)) if is_mixed else None
        answers = [answer] * len(gathered)
    answered = ranks.scatter_object(answers)
    if answered is not None:
        raise answered


def meet_processes(ranks: Any) -> None:
    """Collective. As torch's process is started, where only the coordinator says something.

    Raises:
        CheckpointException: see ``meet_threads``.
    """
    _meeting.takes_part = True
    try:
        call = ranks.broadcast_object(_Call.of(ranks) if ranks.is_coordinator else None)
    finally:
        _meeting.takes_part = False
    if not isinstance(call, _Call):
        raise _refusal()
    call.require_all()


# Whether this thread is at ``meet_processes``.
_meeting = threading.local()


class _Call:
    """What a coordinator with ckpt_fast says to the others; for those in torch's code, an error to raise.

    That code sends nothing back, so the call does: it counts in the job's store who has unpickled it. The
    last one says there what came out.

    Args:
        key: begins the names in the store.
        listeners: how many ranks there are besides the coordinator.
    """

    def __init__(self, key: str, listeners: int) -> None:
        self._key, self._listeners = key, listeners

    @classmethod
    def of(cls, ranks: Any) -> _Call:
        """A new one, to all of ``ranks``."""
        return cls(f"ckpt_fast/{uuid.uuid4()}", ControlGroup(ranks.group).size - 1)

    def __reduce__(self) -> tuple[Any, ...]:
        return _heard, (self._key, self._listeners)

    def count(self, *, with_ours: bool) -> None:
        """Local. A rank has heard it."""
        store = _get_default_store()
        store.add(f"{self._key}/without", 0 if with_ours else 1)
        if store.add(f"{self._key}/heard", 1) == self._listeners:
            without = store.add(f"{self._key}/without", 0)
            store.set(f"{self._key}/outcome", str(without))

    def require_all(self) -> None:
        """Wait until all ranks have heard it; CheckpointException if some have no ckpt_fast."""
        store, outcome = _get_default_store(), f"{self._key}/outcome"
        store.wait([outcome], meeting_timeout())
        if int(store.get(outcome)):
            raise _refusal()


def _heard(key: str, listeners: int) -> _Call | CheckpointException:
    call, with_ours = _Call(key, listeners), getattr(_meeting, "takes_part", False)
    call.count(with_ours=with_ours)
    return call if with_ours else _refusal()


def _refusal() -> CheckpointException:
    return CheckpointException("install", {0: _wrap_exception(CheckpointError(_MIXTURE))})


def _is_ours(writer: Any, checkpoint_id: StrPath | None) -> bool:
    if writer is None:
        return bool(checkpoint_id) and is_served(checkpoint_id or "")
    return isinstance(writer, FastStorageWriter)


def _save(staged: Any, options: dict[str, Any]) -> Any:
    try:
        state_dict = staged.result() if isinstance(staged, Future) else staged
        return state_dict_saver.save(state_dict, **options)
    finally:
        let_go()  # the thread goes on, which is all that would end a save that failed on another rank


def _hand_on(future: Future[Any], saved: Future[Any]) -> None:
    error = saved.exception()
    try:
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(saved.result())
    except BaseException:  # of a callback, which may ask for the result: torch's error is no Exception
        logger.exception("a callback of a background save has failed")
