# SPDX-License-Identifier: Apache-2.0
"""Ranks that act together: small control messages, and failures that reach everyone.

No rank may leave a collective because of a local error: the others would wait for it until the watchdog
kills the job. So each rank turns its error into a value (``attempt``), the values meet, and all ranks raise
the same.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, NoReturn, TypeVar

import torch
import torch.distributed as dist

from ckpt_fast import errors
from ckpt_fast.errors import CheckpointError, CheckpointWriteError
from ckpt_fast.ranks.lost import rank_lost

logger = logging.getLogger(__name__)
T = TypeVar("T")
_FAILED = -1
# What the coordinator receives at once from all ranks together, and what a rank at least sends.
_MOST_GATHERED = 256 << 20
_LEAST_ROUND = 16 << 10
_MOST_BROADCAST = 64 << 20
_NAMES_RANK = re.compile(r"rank \d+: ")


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """A value, or instead the error raised on ``rank`` (``others`` more ranks raised errors of their own).

    The error can travel to other ranks. ``raised`` is what was raised, on the rank where it was.
    """

    rank: int
    value: T | None = None
    error: BaseException | None = None
    others: int = 0
    raised: BaseException | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "raised": None}


def ranks_on_this_node() -> int:
    """The number of ranks on this machine, from the launcher or estimated from its number of GPUs."""
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

    @classmethod
    def of_one(cls) -> ControlGroup:
        """This process alone."""
        group = cls()
        group.rank, group.size = 0, 1
        return group

    @property
    def is_coordinator(self) -> bool:
        """Whether this is the rank that publishes."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Collective. All ranks' values in rank order on the coordinator, an empty list elsewhere."""
        if self.size == 1:
            return [value]
        values: list[T] | None = [value] * self.size if self.is_coordinator else None
        with self._in_touch():
            dist.gather_object(value, values, dst=self._coordinator(), group=self._group)
        return values or []

    def all_gather(self, value: T) -> list[T]:
        """Collective. All ranks' values in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size
        with self._in_touch():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def broadcast(self, value: T) -> T:
        """Collective. The coordinator's value on every rank."""
        if self.size == 1:
            return value
        box = [value]
        with self._in_touch():
            dist.broadcast_object_list(box, src=self._coordinator(), group=self._group)
        return box[0]

    def scatter(self, values: Sequence[T]) -> T:
        """Collective. Each rank's own of the coordinator's ``values``, which are in rank order."""
        if self.size == 1:
            return values[0]
        box: list[Any] = [None]
        with self._in_touch():
            dist.scatter_object_list(
                box, list(values) if self.is_coordinator else None, src=self._coordinator(), group=self._group
            )
        value: T = box[0]
        return value

    def gather_bytes(self, content: bytes) -> list[bytes]:
        """Collective. All ranks' bytes in rank order on the coordinator, an empty list elsewhere.

        They come in rounds, so that the coordinator needs memory for little more than it has in the end.
        """
        if self.size == 1:
            return [content]
        lengths = self._all_gather_integers(len(content))
        longest = max(lengths)
        width = max(_LEAST_ROUND, _MOST_GATHERED // self.size)
        mine = torch.frombuffer(bytearray(content) or bytearray(1), dtype=torch.uint8)
        rounds: list[list[bytes]] = []
        for begin in range(0, longest, width):
            part = torch.zeros(min(width, longest - begin), dtype=torch.uint8)
            present = mine[begin : min(begin + width, len(content))]
            part[: len(present)] = present
            parts = self._gather_tensor(part)
            if self.is_coordinator:
                rounds.append(
                    [
                        each[: max(0, length - begin)].numpy().tobytes()
                        for each, length in zip(parts, lengths, strict=True)
                    ]
                )
        if not self.is_coordinator:
            return []
        return [b"".join(parts) for parts in zip(*rounds, strict=True)] or [b""] * self.size

    def broadcast_bytes(self, content: bytes, nbytes: int | None = None) -> bytes:
        """Collective. The coordinator's bytes on every rank, in few large transfers.

        Args:
            content: the coordinator's counts.
            nbytes: their number, where all ranks know it; there is nothing to transfer if it is 0.
        """
        if self.size == 1:
            return content
        if nbytes is None:
            nbytes = int(self._broadcast_tensor(torch.tensor([len(content)])))
        whole = torch.empty(nbytes, dtype=torch.uint8)
        if self.is_coordinator and content:
            whole = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        for begin in range(0, len(whole), _MOST_BROADCAST):
            part = whole[begin : begin + _MOST_BROADCAST]
            part.copy_(self._broadcast_tensor(part))
        return content if self.is_coordinator else whole.numpy().tobytes()

    def _all_gather_integers(self, value: int) -> list[int]:
        """Collective. All ranks' integers in rank order, on every rank."""
        with self._in_touch():
            mine = torch.tensor([value], dtype=torch.int64, device=_device_of(self._group))
            values = [torch.empty_like(mine) for _ in range(self.size)]
            dist.all_gather(values, mine, group=self._group)
            return [int(each) for each in torch.cat(values).tolist()]

    def _gather_tensor(self, value: torch.Tensor) -> list[torch.Tensor]:
        """Collective. All ranks' tensors, on the CPU of the coordinator."""
        with self._in_touch():
            mine = value.to(_device_of(self._group))
            values = [torch.empty_like(mine) for _ in range(self.size)] if self.is_coordinator else None
            dist.gather(mine, values, dst=self._coordinator(), group=self._group)
            return [each.cpu() for each in values or []]

    def _broadcast_tensor(self, value: torch.Tensor) -> torch.Tensor:
        """Collective. The coordinator's tensor, on the CPU of every rank."""
        with self._in_touch():
            device_value = value.to(_device_of(self._group))
            dist.broadcast(device_value, src=self._coordinator(), group=self._group)
            return device_value.cpu()

    def barrier(self) -> None:
        """Collective. Wait for all ranks."""
        if self.size > 1:
            with self._in_touch():
                dist.barrier(group=self._group)

    def all_true(self, value: bool) -> bool:
        """Collective. Whether ``value`` holds on every rank; one small all-reduce."""
        return self._least(int(value)) > 0

    def attempt(self, action: Callable[[], T], *, keep_kind: bool = False) -> Outcome[T]:
        """Run a local action that may fail; its error becomes a value that can travel.

        Args:
            action: anything local.
            keep_kind: leave the error of the kind it is, ``SystemExit`` included; otherwise what is no
                CheckpointError becomes one.
        """
        try:
            return Outcome(self.global_rank, action())
        except CheckpointError as error:
            logger.debug("rank %d failed", self.global_rank, exc_info=True)
            portable = _picklable(error) if keep_kind else _portable(error)
            return Outcome(self.global_rank, error=portable, raised=error)
        except (Exception, SystemExit) as error:
            if keep_kind:
                return Outcome(self.global_rank, error=_picklable(error), raised=error)
            if isinstance(error, SystemExit):
                raise
            logger.exception("rank %d failed", self.global_rank)
            wrapped = CheckpointError(f"{type(error).__name__}: {error}")
            wrapped.__cause__ = error
            return Outcome(self.global_rank, error=wrapped, raised=error)

    def collect(self, action: Callable[[], T]) -> list[Outcome[T]]:
        """Collective. Every rank runs ``action``; the outcomes in rank order on the coordinator.

        They are for ``decide``, which raises a failure among them everywhere.
        """
        return self.gather(self.attempt(action))

    def decide(
        self,
        action: Callable[[], T],
        outcomes: Sequence[Outcome[Any]] = (),
        *,
        keep_kind: bool = False,
    ) -> T:
        """Collective. The coordinator runs ``action``; its value, or its error, reaches every rank.

        Args:
            action: not run if there is a failure among ``outcomes``, which then takes the place of its error.
            outcomes: of all ranks, on the coordinator.
            keep_kind: see ``attempt``; the error is then raised as it is.
        """
        mine: Outcome[T] = Outcome(self.global_rank)
        if self.is_coordinator:
            mine = _first_failure(outcomes) or self.attempt(action, keep_kind=keep_kind)
        outcome = self.broadcast(mine)
        if outcome.error is not None:
            _raise_failure(outcome, mine, named=not keep_kind)
        # The coordinator gets the very object, the others a copy.
        return (mine if self.is_coordinator else outcome).value  # type: ignore[return-value]

    def agree(self, action: Callable[[], T], *, keep_kind: bool = False) -> T:
        """Collective. Every rank runs ``action``; returns its value, or raises the same everywhere.

        While nothing fails, this is one small all-reduce.

        Args:
            action: local; or with collectives in which no rank waits for one that failed before.
            keep_kind: see ``attempt``.
        """
        mine = self.attempt(action, keep_kind=keep_kind)
        if self._least(_FAILED if mine.error is not None else 1) == _FAILED:
            outcomes: list[Outcome[Any]] = self.all_gather(Outcome(mine.rank, error=mine.error))
            failure = _first_failure(outcomes)
            assert failure is not None
            _raise_failure(failure, mine, named=True)
        return mine.value  # type: ignore[return-value]

    def _least(self, value: int) -> int:
        """Collective. The least of all ranks' integers."""
        if self.size == 1:
            return value
        with self._in_touch():
            least = torch.tensor([value], dtype=torch.int64, device=_device_of(self._group))
            dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self._group)
            return int(least.item())

    @contextlib.contextmanager
    def _in_touch(self) -> Iterator[None]:
        """The transport's error about a lost rank, in our words."""
        try:
            yield
        except RuntimeError as error:
            raise rank_lost(error, self.global_rank, self.size - 1) from error

    def _coordinator(self) -> int:
        return dist.get_global_rank(self._group, 0) if self._group is not None else 0


class PerGroup(Generic[T]):
    """A value for each process group, forgotten with it, and one for this process alone. Thread-safe.

    A forked process has values of its own: neither the threads nor the groups of its parent work there.

    Args:
        new: makes the value of a group that has none.
    """

    def __init__(self, new: Callable[[], T]) -> None:
        self._new = new
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._alone = self._new()
        self._of_groups: weakref.WeakKeyDictionary[Any, T] = weakref.WeakKeyDictionary()

    def get(self, group: ControlGroup, process_group: dist.ProcessGroup | None) -> T:
        """The value of ``process_group`` (None: of all ranks), through which ``group`` talks."""
        if self._process != os.getpid():
            self._begin()
        if group.size == 1:
            return self._alone
        key = process_group if process_group is not None else dist.group.WORLD
        value = self._of_groups.get(key)
        return value if value is not None else self._of_groups.setdefault(key, self._new())


def _device_of(group: dist.ProcessGroup | None) -> torch.device:
    """The device for tensors of a collective: the CPU if a backend of the group supports it."""
    devices = [entry.partition(":")[0] for entry in str(dist.get_backend_config(group)).split(",")]
    if "cpu" in devices:
        return torch.device("cpu")
    return torch.device(devices[0], torch.get_device_module(devices[0]).current_device())


def _portable(error: CheckpointError) -> CheckpointError:
    """The error as one of the kinds in ``errors``, which any rank can rebuild from its text."""
    kind = next(kind for kind in type(error).__mro__ if getattr(errors, kind.__name__, None) is kind)
    if isinstance(error, CheckpointWriteError):
        portable: CheckpointError = CheckpointWriteError(str(error), error.errno, error.filename)
    else:
        portable = kind(str(error))
    portable.__cause__ = error
    return portable


def _picklable(error: BaseException) -> BaseException:
    """The error, or one with the same text if it cannot travel to other ranks."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _first_failure(outcomes: Sequence[Outcome[Any]]) -> Outcome[Any] | None:
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    return replace(failed[0], value=None, others=len(failed) - 1) if failed else None


def _raise_failure(outcome: Outcome[Any], mine: Outcome[Any], *, named: bool) -> NoReturn:
    """Raise the outcome's error.

    Args:
        outcome: of the rank that failed first.
        mine: this rank's own; if it is that one, what it raised is the cause, with its traceback.
        named: let the text of a CheckpointError begin with that rank, and say how many others failed.
    """
    error = outcome.error
    assert error is not None
    cause = mine.raised if mine.rank == outcome.rank and mine.raised is not None else error
    if not named or not isinstance(error, CheckpointError):
        if named and hasattr(cause, "add_note"):
            cause.add_note(f"raised by rank {outcome.rank} of a collective operation of ckpt_fast")
        raise cause
    error = _portable(error)
    message = str(error)
    if not _NAMES_RANK.match(message):  # as that of an agreement within this one does
        others = f" ({outcome.others} more ranks failed)" if outcome.others else ""
        message = f"rank {outcome.rank}: {message}{others}"
    if isinstance(error, CheckpointWriteError):
        raise CheckpointWriteError(message, error.errno, error.filename) from cause
    raise type(error)(message) from cause
