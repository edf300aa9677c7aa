# SPDX-License-Identifier: Apache-2.0
"""What ``install`` changes in torch DCP."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from inspect import getattr_static
from typing import Any

from torch.distributed.checkpoint import staging, state_dict_saver
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

from ckpt_fast.doors.dcp.executors import in_this_process, meet_processes, meet_threads
from ckpt_fast.doors.dcp.places import StrPath, is_object_url, is_served
from ckpt_fast.doors.dcp.planning.planners import SAVE_METHODS, InstalledSavePlanner
from ckpt_fast.doors.dcp.reader import FastStorageReader
from ckpt_fast.doors.dcp.writer import FastStorageWriter
from ckpt_fast.doors.substitution import Arguments, Constructed, Rebound, Substitution, refused

_VALIDATE = "validate_checkpoint_id"
# Some versions of torch have one of them, or neither.
_EXECUTORS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "THREAD": ("_ThreadBasedAsyncCheckpointExecutor", meet_threads),
    "PROCESS": ("_ProcessBasedAsyncCheckpointExecutor", meet_processes),
}


class InstalledReader(FastStorageReader):
    """A reader in the place of torch's. What is asked for is the framework's business, and no warning."""

    def __init__(self, path: StrPath, _extension_registry: Any = None) -> None:
        super().__init__(path, _extension_registry)
        self.partial = True


class _Storage(Constructed):
    """A storage object of torch, where all that torch calls of it is implemented by ours."""

    def __init__(self, stock: type, ours: type, protocol: type, suits: Any) -> None:
        methods = [name for name in vars(protocol) if not name.startswith("_")]
        super().__init__(stock, ours, ["__init__", *methods], suits)
        self._protocol = methods

    def check(self) -> None:
        super().check()
        for name in self._protocol:
            if getattr_static(self.ours, name) is getattr_static(self.stock, name):
                raise refused(f"{self.name} has {name}, which ckpt_fast does not implement")


class _Chosen:
    """A storage class says to torch, which asks, that ``msc://`` URLs are for it; derived ones do not.

    Args:
        stock: the class.
    """

    def __init__(self, stock: type) -> None:
        self._stock = stock
        self._method: Any = None  # None: the class inherits it

    @property
    def name(self) -> str:
        return f"{self._stock.__module__}.{self._stock.__qualname__}.{_VALIDATE}"

    def check(self) -> None:
        if not isinstance(getattr_static(self._stock, _VALIDATE, None), classmethod):
            raise refused(f"there is no class method {self.name}")

    def make(self) -> None:
        stock, method = self._stock, getattr_static(self._stock, _VALIDATE)

        @functools.wraps(method.__func__)
        def validate(cls: type, checkpoint_id: StrPath) -> bool:
            is_ours = cls is stock and is_object_url(checkpoint_id)
            return is_ours or bool(method.__func__(cls, checkpoint_id))

        self._method = vars(stock).get(_VALIDATE)
        setattr(stock, _VALIDATE, classmethod(validate))

    def undo(self) -> None:
        if self._method is None:
            delattr(self._stock, _VALIDATE)
        else:
            setattr(self._stock, _VALIDATE, self._method)


def substitutions() -> Sequence[Substitution]:
    """The changes, none of them made.

    Raises:
        CheckpointError: torch has another kind of background save.
    """
    found: list[Substitution] = [
        _Storage(FileSystemWriter, FastStorageWriter, StorageWriter, _is_written_by_us),
        _Storage(FileSystemReader, InstalledReader, StorageReader, _is_read_by_us),
        _Chosen(FileSystemWriter),
        _Chosen(FileSystemReader),
        Constructed(DefaultSavePlanner, InstalledSavePlanner, ("__init__", *SAVE_METHODS)),
    ]
    if hasattr(staging, "DefaultStager"):
        from ckpt_fast.doors.dcp.stager import FastStager

        found.append(Constructed(staging.DefaultStager, FastStager, ("__init__", "stage", "close")))
    for kind in getattr(state_dict_saver, "AsyncCheckpointerType", ()):
        if kind.name not in _EXECUTORS:
            raise refused(f"{state_dict_saver.__name__} has a checkpointer {kind.name}")
        executor, meet = _EXECUTORS[kind.name]
        ours = functools.partial(in_this_process, meet)
        found.append(Rebound(state_dict_saver.__name__, executor, ours, "execute_save"))
    return found


def _is_read_by_us(arguments: Arguments) -> bool:
    return is_served(arguments["path"])


def _is_written_by_us(arguments: Arguments) -> bool:
    form = getattr(arguments.get("serialization_format"), "value", "torch_save")
    return is_served(arguments["path"]) and not arguments.get("_extensions") and form == "torch_save"
