# SPDX-License-Identifier: Apache-2.0
"""How FastLoadPlanner and FastStorageReader find each other: torch passes metadata and plans between them."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any, NamedTuple, Protocol

from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from ckpt_fast.pipeline.load.index import CheckpointIndex


class Source(Protocol):
    """A checkpoint that is being read."""

    @property
    def checkpoint_id(self) -> str:
        """Its directory."""

    @property
    def index(self) -> CheckpointIndex:
        """Its table of contents, once the reader is set up."""


class Wanted(NamedTuple):
    """What a rank loads: names of tensors and objects, None for all. In the local plan."""

    asked: list[str] | None


class ReadFrom(StorageMeta):
    """The storage entry of metadata that a reader of ours has read. Copies of it are torch's own."""

    def __init__(self, entry: StorageMeta | None, source: Source) -> None:
        super().__init__()
        vars(self).update(vars(entry) if entry is not None else {})
        self._source = weakref.ref(source)

    def __reduce__(self) -> tuple[Any, ...]:
        return StorageMeta, tuple(getattr(self, field.name) for field in dataclasses.fields(StorageMeta))

    @property
    def source(self) -> Source | None:
        """The reader, while there is one."""
        return self._source()


def source_of(metadata: Metadata | None) -> Source | None:
    """The reader of ours that has read this metadata; None if another has, or torch before 2.4 wrote it.

    That torch gave other names to what is in lists; DefaultLoadPlanner knows them.
    """
    entry = getattr(metadata, "storage_meta", None)
    if not isinstance(entry, ReadFrom) or getattr(metadata, "version", None) is None:
        return None
    return entry.source
