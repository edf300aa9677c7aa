# SPDX-License-Identifier: Apache-2.0
"""The description of one save that a door hands to the pipeline: shares, options and completion."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ckpt_fast.format.types import FileRecord, Shard, shard_nbytes
from ckpt_fast.pipeline.memory.device_copy import StagingPolicy
from ckpt_fast.pipeline.save.program import Prepared, ProgramCache
from ckpt_fast.storage.files import Files


def _nothing(*_: str) -> None:
    pass


def _no_files(_: str) -> Sequence[FileRecord]:
    return ()


class Divided(NamedTuple):
    """What a rank saves once the ranks have agreed on that; see ``Share``."""

    shards: Sequence[Shard]
    planner_data: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Share:
    """One rank's share of a save.

    Attributes:
        shards: what this rank saves. No two ranks save the same piece.
        common_files: name to content, written durably by the coordinator before the checkpoint is sealed.
        planner_data: torch DCP's name to path mapping, None for Megatron-Core; the coordinator's counts.
        files: where the checkpoint's files go; None: into its directory. Closed once they are written.
        write_beside: writes, durably, what this rank has to put beside the checkpoint, and returns what that
            is. Gets the directory of the files. Run in the writing thread.
        division: names the division of the work that ``shards`` follow; None where the ranks have to agree
            first which of them saves what: ``shards`` are then only what this rank could save.
        divide: gives this rank's part once the ranks have agreed. Collective; run by all ranks, before
            anything is touched, unless all of them name the same division.
    """

    shards: Sequence[Shard] | Prepared
    common_files: Mapping[str, bytes] = field(default_factory=dict)
    planner_data: Mapping[str, Any] | None = None
    files: Files | None = None
    write_beside: Callable[[str], Sequence[FileRecord]] = _no_files
    division: str | None = ""
    divide: Callable[[], Divided] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all shards' values."""
        return (
            self.shards.nbytes if isinstance(self.shards, Prepared) else sum(map(shard_nbytes, self.shards))
        )


@dataclass(frozen=True)
class SaveOptions:
    """Options of a save. All ranks use the same.

    Attributes:
        writers: files (and so streams to the file system) per rank; None: as many as are fastest there.
        snapshot: copy CPU tensors while staging, so that training may go on during the write.
        staging: how tensors on GPUs are copied for a snapshot; None follows ``CKPT_FAST_STAGING``.
        host_buffer: bound on the host buffers in use, in bytes; None follows ``CKPT_FAST_HOST_BUFFER``.
            With a bound smaller than the state, staging waits for the writes of all but the last waves.
        separate: shards whose name begins so get files of their own; see ``plan_save``.
        programs: of earlier saves, reused where the structure is the same; None: every save plans
            anew.
        partial: parts of tensors may be missing from what all ranks save together.
        replace: keep an older checkpoint in the directory until this one is sealed, where that can be.
        when_written: called in the writing thread once this rank has written its last byte, or has failed.
    """

    writers: int | None = None
    snapshot: bool = False
    staging: StagingPolicy | None = None
    host_buffer: int | None = None
    separate: str | None = None
    programs: ProgramCache | None = None
    partial: bool = False
    replace: bool = True
    when_written: Callable[[], None] = _nothing


@dataclass(frozen=True)
class Completion:
    """The coordinator's additional steps, in the order in which they run.

    ``prepare`` and ``finish`` get the directory of the files. If that is not the checkpoint's, an older
    checkpoint is still there, and is replaced before ``select``.

    Attributes:
        prepare: makes room beside the checkpoint.
        finish: writes, durably, what else belongs to the checkpoint, once all ranks have written; returns
            what that is.
        notes: what the manifest is to say besides.
        seal_files: name to content, published after ``.metadata`` in the order given; the last is the seal.
        select: makes others choose this checkpoint, which is published.
    """

    prepare: Callable[[str], None] = _nothing
    finish: Callable[[str], Sequence[FileRecord]] = _no_files
    notes: Mapping[str, Any] = field(default_factory=dict)
    seal_files: Mapping[str, bytes] = field(default_factory=dict)
    select: Callable[[], None] = _nothing
