# SPDX-License-Identifier: Apache-2.0
"""The pickle in ``.metadata`` becomes torch DCP's metadata: no code is run, no length believed."""

from __future__ import annotations

import collections
import enum
import functools
import importlib
import io
import pathlib
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from ckpt_fast import native, settings
from ckpt_fast.errors import UnsafeCheckpointError

REMEDY = (
    "If you trust where the checkpoint comes from, set CKPT_FAST_ALLOW_PICKLE=1: loading may then run code "
    "that the checkpoint names."
)
_DCP = "torch.distributed.checkpoint"
# All that a .metadata file of torch DCP, Megatron-Core or ckpt_fast names. They hold data and do nothing.
_ALLOWED = {
    f"{_DCP}.metadata": {
        "Metadata",
        "StorageMeta",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "_MEM_FORMAT_ENCODING",
    },
    f"{_DCP}.filesystem": {"_StorageInfo"},
    f"{_DCP}.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict", "defaultdict"},
    "pathlib": {"PosixPath", "PurePosixPath", "Path"},
    "pathlib._local": {"PosixPath", "PurePosixPath", "Path"},
}
# Two keys are compared if they have the same hash: never, or somebody has looked for such.
_MOST_COMPARISONS = 64
_RETIRED = "megatron.core.dist_checkpointing.strategies.torch"  # before 0.16
# Plans; and where the writer of multi-storage-client has saved to, which the reader knows better.
_IGNORED = {(_RETIRED, "MCoreSavePlan"), ("multistorageclient.pathlib", "MultiStoragePath")}


def unpickle_metadata(content: bytes | memoryview) -> tuple[Metadata, int]:
    """The metadata that ``content`` begins with, and the length of its pickle; what is behind that is not
    looked at.

    Raises:
        UnsafeCheckpointError: it names something other than torch DCP's data classes.
        Exception: of whatever kind, if it is no pickle of metadata, or one that asks for more memory or time
            than its length justifies.
    """
    end = native.check_pickle(content)
    # All of it, where that is one: no copy is made then.
    pickled = content if end == len(content) else memoryview(content)[:end]
    unpickler = _MetadataUnpickler(io.BytesIO(pickled))
    metadata = unpickler.load()
    for index in unpickler.indices:
        object.__setattr__(index, "__class__", MetadataIndex)
    if not isinstance(metadata, Metadata):
        raise TypeError(f"it holds a {type(metadata).__name__}, not checkpoint metadata")
    for name in metadata.state_dict_metadata:
        if type(name) is not str:
            raise TypeError(f"a {type(name).__name__} stands where the name of a tensor or object should")
    return metadata, end


class _MetadataUnpickler(pickle.Unpickler):
    """Attributes: indices: every MetadataIndex made, of a class that counts how often it is compared."""

    def __init__(self, content: io.BytesIO) -> None:
        super().__init__(content)
        self.indices: list[MetadataIndex] = []
        self._counting = _counting_index()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == (f"{_DCP}.metadata", "MetadataIndex"):
            return _stand_in_for(self._counting, self.indices.append)
        if name in _ALLOWED.get(module, ()):
            return _stand_in(module, name)
        # Looked up without getattr, for which torch imports modules.
        if module == "torch" and (name == "Size" or isinstance(vars(torch).get(name), torch.dtype)):
            return vars(torch)[name]
        if (module, name) == (_RETIRED, "MCoreMetadata"):
            return _stand_in(f"{_DCP}.metadata", "Metadata")
        if (module, name) in _IGNORED:
            return _Ignored
        if settings.pickle_allowed():
            return super().find_class(module, name)
        raise UnsafeCheckpointError(
            f"refused to load {module}.{name}, which checkpoint metadata never needs. {REMEDY}"
        )


def _known(module: str, name: str) -> Any:
    # Python moved pathlib's classes between versions; collections and torch's have stayed.
    if module.startswith("pathlib"):
        return getattr(pathlib, name)
    if module == "collections":
        return getattr(collections, name)
    return getattr(importlib.import_module(module), name)


class _StandIn(type):
    """Stands in for a class or function while unpickling, and makes what ``real`` makes.

    A pickle may set attributes of anything on its stack. It must not get hold of the real class.
    """

    real: Any

    def __call__(cls, *args: Any) -> Any:
        return cls.real(*args)

    def __setstate__(cls, _state: Any) -> None:
        raise UnsafeCheckpointError(f"refused to change {cls.real!r}, as checkpoint metadata never does")


def _counting_index() -> type[MetadataIndex]:
    comparisons = 0

    class CountingIndex(MetadataIndex):
        __hash__ = MetadataIndex.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal comparisons
            comparisons += 1
            if comparisons > _MOST_COMPARISONS:
                raise ValueError("the names of too many items have the same hash")
            return super().__eq__(other)

    return CountingIndex


def _stand_in_for(kind: type, made: Callable[[Any], object]) -> _StandIn:
    def remembered(instance: Any) -> Any:
        made(instance)
        return instance

    def make(*args: Any) -> Any:
        return remembered(kind(*args))

    def new(_cls: type, *args: Any) -> Any:
        return remembered(kind.__new__(kind, *args))

    return _StandIn(kind.__name__, (), {"real": staticmethod(make), "__new__": new})


@functools.cache
def _stand_in(module: str, name: str) -> _StandIn:
    real = _known(module, name)

    def new(_cls: type, *args: Any) -> Any:
        # That would look a member up, of which there is one for the whole process, and BUILD could change it.
        if isinstance(real, enum.EnumMeta):
            raise UnsafeCheckpointError(f"refused to make a {name}, which has its values already")
        return real.__new__(real, *args)

    return _StandIn(name, (), {"real": real, "__new__": new})


class _Ignored:
    """Stands in for a class whose data is not used."""

    def __setstate__(self, _state: Any) -> None: ...
