# SPDX-License-Identifier: Apache-2.0
"""Snapshots for ``dcp.async_save``: a state dict is copied into a kept host buffer, and training goes on."""

from __future__ import annotations

import copy
import itertools
import logging
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, NoReturn

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor

from ckpt_fast import settings
from ckpt_fast.errors import CheckpointError
from ckpt_fast.pipeline.host_buffer import HostBuffer, host_buffers
from ckpt_fast.pipeline.plan import is_plain
from ckpt_fast.pipeline.stage import copy_to_host

logger = logging.getLogger(__name__)

_IMMUTABLE = (bool, int, float, complex, str, bytes, type(None), torch.Size, torch.dtype, torch.device)


class Snapshot(NamedTuple):
    """One state dict in host memory.

    Attributes:
        buffer: memory of the copies; None if there are no bytes.
        keep_buffer: whether the buffer serves the next snapshot.
        values: all values of the copy that a planner may meet, by identity.
        allocated_nbytes: host memory that was new for it.
        seconds: how long copying took.
    """

    buffer: HostBuffer | None
    keep_buffer: bool
    values: dict[int, Any]
    allocated_nbytes: int
    seconds: float


class Snapshots:
    """The process's snapshots that are still to be written. Thread-safe."""

    def __init__(self) -> None:
        self._in_flight: dict[int, Snapshot] = {}
        self._numbers = itertools.count()

    def take(self, state_dict: dict[str, Any], keep_buffer: bool) -> dict[str, Any]:
        """A copy of the state dict that no later change reaches.

        Its memory is that of an earlier snapshot once that is written; with a bound on host memory there can
        be no more than fits. It is given back by ``written``, or when the copy itself is gone.

        An error must not keep this rank out of the save's collectives: the others would wait for it. What is
        returned then raises the error as soon as it is planned, and torch tells all ranks.
        """
        begin = time.perf_counter()
        try:
            return self._take(state_dict, keep_buffer, begin)
        except Exception as error:
            logger.exception("cannot copy the state dict to host memory")
            return {"state dict": _Unstaged(error)}

    def written(self, values: Iterable[Any]) -> Snapshot | None:
        """The snapshot that ``values`` belong to, if any, is written: its memory may be used again."""
        identities = {id(value) for value in values}
        for number, snapshot in list(self._in_flight.items()):
            if not identities.isdisjoint(snapshot.values):
                self._end(number)
                return snapshot
        return None

    def _take(self, state_dict: dict[str, Any], keep_buffer: bool, begin: float) -> dict[str, Any]:
        tensors = list(_tensors(state_dict))
        buffer, copies = copy_to_host(tensors, settings.host_buffer_bytes())
        copy_of = {id(tensor): copied for tensor, copied in zip(tensors, copies, strict=True)}
        values: dict[int, Any] = {}
        try:
            with torch.no_grad():
                staged = _Staged(_copied(state_dict, copy_of, values))
        except BaseException:
            if buffer is not None:
                host_buffers.give_back(buffer)
            raise
        values.update((id(value), value) for value in staged.values())
        number = next(self._numbers)
        allocated_nbytes = buffer.nbytes if buffer is not None and buffer.is_new else 0
        seconds = time.perf_counter() - begin
        self._in_flight[number] = Snapshot(buffer, keep_buffer, values, allocated_nbytes, seconds)
        weakref.finalize(staged, self._end, number).atexit = False
        return staged

    def _end(self, number: int) -> None:
        snapshot = self._in_flight.pop(number, None)
        if snapshot is not None and snapshot.buffer is not None:
            host_buffers.give_back(snapshot.buffer, snapshot.keep_buffer)


snapshots = Snapshots()


class _Staged(dict[str, Any]):
    """A dictionary that can be watched by a weak reference."""

    def __reduce__(self) -> tuple[Any, ...]:
        # To the process that writes, with AsyncCheckpointerType.PROCESS: the memory stays this one's affair.
        return dict, (dict(self),)


class _Unstaged(dict[str, Any]):
    """Stands for a state dict that could not be copied: whoever looks into it gets the error."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    def items(self) -> NoReturn:
        raise CheckpointError(
            f"the state dict could not be copied to host memory, nothing was saved: {self._error}"
        ) from self._error

    def __reduce__(self) -> NoReturn:
        self.items()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """All plain tensors in a state dict, also those that others (as DTensor) are made of."""
    if isinstance(value, torch.Tensor):
        if _has_bytes(value):
            yield value
        else:
            for part in _parts(value).values():
                yield from _tensors(part)
    elif isinstance(value, dict):
        for child in value.values():
            yield from _tensors(child)
    elif isinstance(value, (list, tuple)):
        for child in value:
            yield from _tensors(child)


def _copied(value: Any, copy_of: dict[int, torch.Tensor], values: dict[int, Any]) -> Any:
    """``value`` with every plain tensor replaced by its copy; tensors made here are noted in ``values``."""
    if isinstance(value, torch.Tensor):
        tensor = _copied_tensor(value, copy_of)
        values[id(tensor)] = tensor
        return tensor
    if isinstance(value, dict):
        kind = OrderedDict if isinstance(value, OrderedDict) else dict
        return kind((key, _copied(child, copy_of, values)) for key, child in value.items())
    if isinstance(value, _IMMUTABLE):
        return value
    if type(value) is list or isinstance(value, tuple):
        children = [_copied(child, copy_of, values) for child in value]
        if hasattr(value, "_make"):
            return value._make(children)
        return type(value)(children)
    return copy.deepcopy(value)


def _copied_tensor(tensor: torch.Tensor, copy_of: dict[int, torch.Tensor]) -> torch.Tensor:
    if _has_bytes(tensor):
        return copy_of[id(tensor)]
    parts = _parts(tensor)
    if parts:
        inner = {
            name: _copied_tensor(part, copy_of) if isinstance(part, torch.Tensor) else part
            for name, part in parts.items()
        }
        _, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        return type(tensor).__tensor_unflatten__(inner, context, tensor.size(), tensor.stride())  # type: ignore
    if tensor.device.type == "meta":
        return tensor
    if isinstance(tensor, ShardedTensor):
        return copy.deepcopy(tensor) if tensor.device.type == "cpu" else tensor.cpu()
    return tensor.detach().to("cpu", copy=True)


def _has_bytes(tensor: torch.Tensor) -> bool:
    return is_plain(tensor) and tensor.device.type != "meta"


def _parts(tensor: torch.Tensor) -> dict[str, Any]:
    """What a tensor of a subclass is made of; empty for those that do not tell."""
    # The parts of a collective's result are not there yet; the tensor itself waits for them.
    if not hasattr(tensor, "__tensor_flatten__") or hasattr(tensor, "trigger_wait"):
        return {}
    return {name: getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]}
