# SPDX-License-Identifier: Apache-2.0
"""Ranks that act together: small control messages, and failures that reach everyone.

No rank may leave a collective because of a local error: the others would wait for it until the watchdog
kills the job. So each rank turns its error into a value (``attempt``), the values meet, and all ranks raise
the same.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

from ckpt_fast.errors import CheckpointError, CheckpointWriteError

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """A value, or the error that took its place on ``rank`` (and others of their own on ``others`` ranks)."""

    rank: int
    value: T | None = None
    error: CheckpointError | None = None
    others: int = 0


def ranks_on_this_node() -> int:
    """How many ranks share this machine, as the launcher says or the number of its GPUs suggests."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    launched = os.environ.get("LOCAL_WORLD_SIZE", "")
    count = int(launched) if launched.isdigit() else torch.cuda.device_count()
    return min(max(count, 1), dist.get_world_size())


class ControlGroup:
    """The ranks of one save or load. Without torch.distributed it is one rank that talks to itself.

    Args:
        process_group: the ranks; None means all of them.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        self._distributed = dist.is_available() and dist.is_initialized()
        self._group = process_group
        self.rank = dist.get_rank(process_group) if self._distributed else 0
        self.size = dist.get_world_size(process_group) if self._distributed else 1
        self.global_rank = dist.get_rank() if self._distributed else 0

    @property
    def is_coordinator(self) -> bool:
        """Whether this is the rank that publishes."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Collective. All ranks' values in rank order on the coordinator, an empty list elsewhere."""
        if self.size == 1:
            return [value]
        values: list[T] | None = [value] * self.size if self.is_coordinator else None
        dist.gather_object(value, values, dst=self._coordinator(), group=self._group)
        return values or []

    def broadcast(self, value: T) -> T:
        """Collective. The coordinator's value on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=self._coordinator(), group=self._group)
        return box[0]

    def scatter(self, values: Sequence[T]) -> T:
        """Collective. Each rank's own of the coordinator's ``values``, which are in rank order."""
        if self.size == 1:
            return values[0]
        box: list[Any] = [None]
        dist.scatter_object_list(
            box, list(values) if self.is_coordinator else None, src=self._coordinator(), group=self._group
        )
        value: T = box[0]
        return value

    def all_true(self, value: bool) -> bool:
        """Collective. Whether ``value`` holds on every rank; one small all-reduce."""
        if self.size == 1:
            return value
        flag = torch.tensor([int(value)], dtype=torch.int32, device=_device_of(self._group))
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self._group)
        return bool(flag.item())

    def attempt(self, action: Callable[[], T]) -> Outcome[T]:
        """Run a local action that may fail; its error becomes a value that can travel."""
        try:
            return Outcome(self.global_rank, action())
        except CheckpointError as error:
            logger.debug("rank %d failed", self.global_rank, exc_info=True)
            return Outcome(self.global_rank, error=_portable(error))
        except Exception as error:
            logger.exception("rank %d failed", self.global_rank)
            wrapped = CheckpointError(f"{type(error).__name__}: {error}")
            wrapped.__cause__ = error
            return Outcome(self.global_rank, error=wrapped)

    def decide(self, action: Callable[[], T], outcomes: Sequence[Outcome[Any]] = ()) -> T:
        """Collective. The coordinator runs ``action``; its value, or its error, reaches every rank.

        Args:
            action: not run if there is a failure among ``outcomes``, which then takes the place of its error.
            outcomes: of all ranks, on the coordinator.
        """
        outcome: Outcome[T] = Outcome(self.global_rank)
        if self.is_coordinator:
            outcome = _first_failure(outcomes) or self.attempt(action)
        outcome = self.broadcast(outcome)
        _raise_failure(outcome)
        return outcome.value  # type: ignore[return-value]

    def agree(self, action: Callable[[], T]) -> T:
        """Collective. Every rank runs ``action``; returns its value, or raises everywhere if any failed."""
        mine = self.attempt(action)
        self.decide(lambda: None, self.gather(Outcome[T](mine.rank, error=mine.error)))
        return mine.value  # type: ignore[return-value]

    def _coordinator(self) -> int:
        return dist.get_global_rank(self._group, 0) if self._group is not None else 0


def _device_of(group: dist.ProcessGroup | None) -> torch.device:
    """Where tensors of a collective must be: the CPU if a backend of the group serves it."""
    devices = [entry.partition(":")[0] for entry in str(dist.get_backend_config(group)).split(",")]
    if "cpu" in devices:
        return torch.device("cpu")
    return torch.device(devices[0], torch.get_device_module(devices[0]).current_device())


def _portable(error: CheckpointError) -> CheckpointError:
    """The error as one of the kinds in ``errors``, which any rank can rebuild from its text."""
    kind = next(kind for kind in type(error).__mro__ if kind.__module__ == CheckpointError.__module__)
    if isinstance(error, CheckpointWriteError):
        portable: CheckpointError = CheckpointWriteError(str(error), error.errno, error.filename)
    else:
        portable = kind(str(error))
    portable.__cause__ = error
    return portable


def _first_failure(outcomes: Sequence[Outcome[Any]]) -> Outcome[Any] | None:
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    return replace(failed[0], value=None, others=len(failed) - 1) if failed else None


def _raise_failure(outcome: Outcome[Any]) -> None:
    """Raise the outcome's error, if it is one, naming its rank and how many others failed."""
    error = outcome.error
    if error is None:
        return
    others = f" ({outcome.others} more ranks failed)" if outcome.others else ""
    message = f"rank {outcome.rank}: {error}{others}"
    if isinstance(error, CheckpointWriteError):
        raise CheckpointWriteError(message, error.errno, error.filename) from error
    raise type(error)(message) from error
