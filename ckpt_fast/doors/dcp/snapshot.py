# SPDX-License-Identifier: Apache-2.0
"""Snapshots for ``dcp.async_save``: copy a state dict to a reusable host buffer, continue training."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor

from ckpt_fast import settings
from ckpt_fast.errors import CheckpointError
from ckpt_fast.pipeline.memory.device_copy import BLOCKING, DeviceCopies, StagingPolicy
from ckpt_fast.pipeline.memory.host_buffer import HostBuffer, host_buffers
from ckpt_fast.pipeline.save.plan import is_plain
from ckpt_fast.pipeline.save.stage import copy_to_host

logger = logging.getLogger(__name__)

_IMMUTABLE = (bool, int, float, complex, str, bytes, type(None), torch.Size, torch.dtype, torch.device)


class Snapshot:
    """One state dict in host memory.

    Attributes:
        allocated_nbytes: host memory that was new for it.
        began: when copying began (``time.perf_counter``).
        seconds: how long it took.
    """

    def __init__(self, keep_buffer: bool, began: float) -> None:
        """``keep_buffer``: whether the buffer serves the next snapshot."""
        self.began = began
        self.allocated_nbytes = 0
        self.seconds = 0.0
        self._keep_buffer = keep_buffer
        self._lock = threading.RLock()  # a destructor may come while this thread holds it
        self._buffer: HostBuffer | None = None
        self._device_copies = DeviceCopies()
        self._readers = 0
        self._ended = False
        # Only what was made for this snapshot and can be in no other: tensors, by identity.
        self._tensors: dict[int, weakref.ref[torch.Tensor]] = {}

    def add(self, tensor: torch.Tensor) -> None:
        """``tensor`` was made for this snapshot."""
        self._tensors[id(tensor)] = weakref.ref(tensor)

    def hold(self, buffer: HostBuffer | None, device_copies: DeviceCopies) -> None:
        """The copies are, or will be, in ``buffer``, which is given back at the end."""
        self._buffer, self._device_copies = buffer, device_copies
        if buffer is not None and buffer.is_new:
            self.allocated_nbytes = buffer.nbytes

    def holds_any(self, values: Iterable[Any]) -> bool:
        """Whether one of the values was made for this snapshot."""
        for value in values:
            made = self._tensors.get(id(value))
            if made is not None and made() is value:
                return True
        return False

    def begin(self) -> None:
        """A save reads it.

        Raises:
            CheckpointError: another save has ended it.
        """
        with self._lock:
            if self._ended:
                raise CheckpointError(
                    "this copy of a state dict was saved already, and its memory may hold another by now; "
                    "stage the state dict again for another save"
                )
            self._readers += 1

    def end(self) -> None:
        """Mark that save as ended: the memory may be reused once nothing reads it."""
        with self._lock:
            self._readers -= 1
            if not self._readers:
                self.release()

    def release(self) -> None:
        """Release the memory: nothing reads it now, or ever will."""
        with self._lock:
            self._ended = True
            buffer, self._buffer = self._buffer, None
        if buffer is not None:
            # A device that has failed copies no more; whoever waited for it has the error.
            with contextlib.suppress(RuntimeError):
                self._device_copies.wait()
            host_buffers.give_back(buffer, self._keep_buffer)


class Snapshots:
    """The process's snapshots of which something is left. Thread-safe."""

    def __init__(self) -> None:
        self._all: dict[int, Snapshot] = {}
        self._numbers = itertools.count()

    def take(
        self,
        state_dict: dict[str, Any],
        keep_buffer: bool,
        device_copies: DeviceCopies | None = None,
        policy: StagingPolicy = BLOCKING,
    ) -> dict[str, Any]:
        """A copy of the state dict that no later change reaches.

        With ``device_copies`` and a policy that lets copies from GPUs go on, it is one when the caller has
        waited for them.

        Its memory is that of an earlier snapshot once that is written; with a bound on host memory there can
        be no more than fits. It is given back at the end of the save that reads it (``read``), or when
        nothing refers to it any more.

        An error must not keep this rank out of the save's collectives: the others would wait for it. What is
        returned then raises the error as soon as it is planned, and torch tells all ranks.
        """
        begin = time.perf_counter()
        try:
            return self._take(state_dict, keep_buffer, begin, device_copies or DeviceCopies(), policy)
        except Exception as error:
            logger.exception("cannot copy the state dict to host memory")
            return {"state dict": _Unstaged(error)}

    @contextlib.contextmanager
    def read(self, values: Iterable[Any]) -> Iterator[Snapshot | None]:
        """While a save reads ``values``, the snapshot that they are of, if any, keeps its memory.

        Raises:
            CheckpointError: a save of this snapshot has ended before.
        """
        values = list(values)
        found = next((each for each in list(self._all.values()) if each.holds_any(values)), None)
        if found is None:
            yield None
            return
        found.begin()
        try:
            yield found
        finally:
            found.end()

    def _take(
        self,
        state_dict: dict[str, Any],
        keep_buffer: bool,
        begin: float,
        device_copies: DeviceCopies,
        policy: StagingPolicy,
    ) -> dict[str, Any]:
        number, snapshot = next(self._numbers), Snapshot(keep_buffer, begin)

        def forget() -> None:
            self._all.pop(number, None)
            snapshot.release()

        tensors = list(_tensors(state_dict))
        bound = settings.host_buffer_bytes()
        buffer, copies = copy_to_host(tensors, bound, forget, device_copies, policy)
        snapshot.hold(buffer, device_copies)
        copy_of = {id(tensor): copied for tensor, copied in zip(tensors, copies, strict=True)}
        try:
            with torch.no_grad():
                staged: dict[str, Any] = _copied(state_dict, copy_of, snapshot)
        except BaseException:
            snapshot.release()
            raise
        snapshot.seconds = time.perf_counter() - begin
        if buffer is not None:
            self._all[number] = snapshot
        return staged


snapshots = Snapshots()


class _Unstaged(dict[str, Any]):
    """Placeholder for a state dict that could not be copied: accessing it raises the error."""

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


def _copied(value: Any, copy_of: dict[int, torch.Tensor], snapshot: Snapshot) -> Any:
    """``value`` with every plain tensor replaced by its copy; tensors made here are added to ``snapshot``."""
    if isinstance(value, torch.Tensor):
        tensor = _copied_tensor(value, copy_of)
        if tensor is not value:
            snapshot.add(tensor)
        return tensor
    if isinstance(value, dict):
        kind = OrderedDict if isinstance(value, OrderedDict) else dict
        return kind((key, _copied(child, copy_of, snapshot)) for key, child in value.items())
    if isinstance(value, _IMMUTABLE):
        return value
    if type(value) is list or isinstance(value, tuple):
        children = [_copied(child, copy_of, snapshot) for child in value]
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
    """The inner tensors of a tensor subclass; empty for those that do not expose them."""
    # The parts of a collective's result are not there yet; the tensor itself waits for them.
    if not hasattr(tensor, "__tensor_flatten__") or hasattr(tensor, "trigger_wait"):
        return {}
    return {name: getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]}
