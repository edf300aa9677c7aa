# SPDX-License-Identifier: Apache-2.0
"""Objects as the bytes of ``torch.save``, encoded once where they are plain values, or have one small tensor.

What a load would refuse is refused here already: nobody learns only at the end of a run that its checkpoints
cannot be read.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import io
import logging
import os
import pickle
import threading
import types
from collections.abc import Iterable
from typing import Any

import torch

from ckpt_fast import native, settings
from ckpt_fast.errors import UnsafeCheckpointError
from ckpt_fast.format.archive import TYPED_STORAGES
from ckpt_fast.format.inert.saved import require_readable
from ckpt_fast.once import first_time

logger = logging.getLogger(__name__)

# Of pickled plain values. Most objects of a run are far smaller, and hundreds of them are equal.
_LONGEST = 4 << 10
# How far an error leads into what is refused.
_MOST_LEVELS = 16
# A pickle this short is not nested too deep, and without this opcode nothing in it occurs twice.
_SHORT, _REPEATED = 256, pickle.BINGET


def object_bytes(value: Any, name: str) -> bytes:
    """``torch.save`` in memory, of a value that can be loaded again.

    Most of a run's objects are small, and the same as at the last save. Those cost a fiftieth: plain values,
    and those with one small tensor, as the extra states of Transformer Engine's modules are.

    Args:
        value: what is to be saved.
        name: of the object, for errors.

    Raises:
        UnsafeCheckpointError: it cannot be pickled, or a load would refuse it. With
            ``CKPT_FAST_ON_UNLOADABLE=warn`` the latter is a warning.
    """
    try:
        payload, reason = _encoded(value)
    except Exception as error:
        raise unsaved(*_innermost(name, value, str(error))) from error
    if reason is not None and not settings.pickle_allowed():
        _report(*_innermost(name, value, reason))
    return payload


def encoded(value: Any) -> bytes:
    """``object_bytes`` of a value that has been loaded."""
    return _encoded(value, check=False)[0]


def require_loadable(payload: bytes, name: str) -> None:
    """``object_bytes`` for what has been encoded already: raises, or warns, if a load would refuse it."""
    reason = _refusal(payload)
    if reason is not None and not settings.pickle_allowed():
        _report(name, reason)


def unsaved(name: str, reason: str) -> UnsafeCheckpointError:
    """The error for an object that cannot be saved."""
    return UnsafeCheckpointError(
        f"{name} cannot be saved, because it could not be loaded again: {reason}. Convert it to numbers, "
        "strings, containers, arrays or tensors; or, for a class of yours, call ckpt_fast.allow_class with "
        "it where the checkpoint is saved and where it is loaded. With CKPT_FAST_ON_UNLOADABLE=warn it is "
        "saved nevertheless, where it can be pickled."
    )


def _report(name: str, reason: str) -> None:
    error = unsaved(name, reason)
    if settings.on_unloadable() == "refuse":
        raise error
    if first_time(str(error)):
        logger.warning("%s", error)


def _encoded(value: Any, check: bool = True) -> tuple[bytes, str | None]:
    """The bytes of ``torch.save``, and why a load would refuse them: None if it would not."""
    buffer = io.BytesIO()
    pickler = _PlainPickler(buffer, protocol=4)
    try:
        pickler.dump(value)
    except Exception:  # not plain, or not to be pickled at all, which torch.save says better
        pickled = None
    else:
        pickled = buffer.getvalue()
    if pickled is not None and len(pickled) <= _LONGEST:
        return _saved_small(pickled, pickler.has_tensor)
    payload = _torch_saved(value)
    return payload, _refusal(payload) if check else None


class _PlainPickler(pickle.Pickler):
    """Pickles Python's own values (numbers, strings, and containers of them) and one small tensor among them.

    Where the pickles are equal, so are the bytes of ``torch.save``. With two tensors those would depend on
    whether they share memory.

    Attributes:
        has_tensor: whether there is one.
    """

    has_tensor = False

    def reducer_override(self, obj: Any) -> Any:
        if obj is _tensor_of:
            return NotImplemented
        facts = None if self.has_tensor else _small_tensor(obj)
        if facts is None:
            raise pickle.PicklingError(f"{type(obj).__name__} is not plain")
        self.has_tensor = True
        return _tensor_of, facts


def _small_tensor(value: Any) -> tuple[str, tuple[int, ...], tuple[int, ...], bytes] | None:
    """All that ``torch.save`` stores of a small CPU tensor with a storage of its own; None for others."""
    if type(value) is not torch.Tensor or vars(value):
        return None
    with torch._C.DisableTorchFunction():
        if not value.is_cpu or value.layout != torch.strided or value.dtype not in TYPED_STORAGES:
            return None
        nbytes = value.nbytes
        if nbytes > _LONGEST or not value.is_contiguous():
            return None
        if value.requires_grad or value.is_conj() or value.is_neg():
            return None
        if value.storage_offset() or value.untyped_storage().nbytes() != nbytes:
            return None
        content = ctypes.string_at(value.data_ptr(), nbytes) if nbytes else b""
        return str(value.dtype), tuple(value.shape), value.stride(), content


def _tensor_of(dtype: str, shape: tuple[int, ...], stride: tuple[int, ...], content: bytes) -> torch.Tensor:
    kind: torch.dtype = getattr(torch, dtype.removeprefix("torch."))
    flat = (
        torch.frombuffer(bytearray(content), dtype=kind)
        if content
        else torch.empty(0, dtype=kind, device="cpu")
    )
    return flat.as_strided(shape, stride)


def _saved_small(pickled: bytes, has_tensor: bool) -> tuple[bytes, str | None]:
    found = _remembered.get(pickled)
    if found is None:
        payload = _torch_saved(pickle.loads(pickled))
        found = payload, _refusal(payload) if has_tensor else _growth(pickled)
        _remembered.add(pickled, found)
    return found


class _Remembered:
    """What became of pickles, of as many as fit in memory: those not used for longest go first. Thread-safe,
    for signal handlers as well, and in processes that are forked.

    Some of a run's objects are new at every save, and would fill any number of places.

    Args:
        most_nbytes: of pickles and payloads together.
    """

    def __init__(self, most_nbytes: int) -> None:
        self._most_nbytes, self._nbytes = most_nbytes, 0
        self._found: collections.OrderedDict[bytes, tuple[bytes, str | None]] = collections.OrderedDict()
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.RLock()

    def get(self, pickled: bytes) -> tuple[bytes, str | None] | None:
        with self._lock:
            found = self._found.get(pickled)
            if found is not None:
                self._found.move_to_end(pickled)
            return found

    def add(self, pickled: bytes, found: tuple[bytes, str | None]) -> None:
        with self._lock:
            if pickled in self._found:
                return
            self._found[pickled] = found
            self._nbytes += len(pickled) + len(found[0])
            while self._found and self._nbytes > self._most_nbytes:
                oldest, (payload, _) = self._found.popitem(last=False)
                self._nbytes -= len(oldest) + len(payload)


_remembered = _Remembered(4 << 20)


def _growth(pickled: bytes) -> str | None:
    """Why a plain value would be refused: nested too deep, or in itself."""
    if len(pickled) < _SHORT and _REPEATED not in pickled:
        return None
    try:
        native.check_pickle(pickled, archive=True)
    except ValueError as error:
        return str(error)
    return None


def _torch_saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _refusal(payload: bytes) -> str | None:
    try:
        require_readable(payload)
    except Exception as error:
        return str(error)
    return None


def _innermost(name: str, value: Any, reason: str) -> tuple[str, str]:
    """The part of a value that is refused, by its name and class, and the reason."""
    for _ in range(_MOST_LEVELS):
        for key, part in parts_of_value(value):
            try:
                found = _encoded(part)[1]
            except Exception as error:
                found = str(error)
            if found is not None:
                name, value, reason = f"{name}[{key!r}]", part, found
                break
        else:
            break
    return f"{name} (a {type(value).__module__}.{type(value).__qualname__})", reason


def parts_of_value(value: Any) -> Iterable[tuple[Any, Any]]:
    """Key and value of what a container holds; nothing, of other values."""
    found: Iterable[tuple[Any, Any]] = ()
    if type(value) in (dict, collections.OrderedDict):
        found = value.items()
    elif type(value) in (list, tuple):
        found = enumerate(value)
    elif type(value) in (argparse.Namespace, types.SimpleNamespace):
        found = vars(value).items()
    return found
