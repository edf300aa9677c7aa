# SPDX-License-Identifier: Apache-2.0
"""``ckpt_fast.save``, ``async_save`` and ``load``: torch DCP's files, without its planners."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist

from ckpt_fast.doors.dcp.direct.background import SaveFuture, committers, wait_for_save
from ckpt_fast.doors.dcp.direct.load import load_state_dict
from ckpt_fast.doors.dcp.direct.local_state import plain_state_dict
from ckpt_fast.doors.dcp.direct.save import start_save
from ckpt_fast.doors.dcp.places import StrPath
from ckpt_fast.jobs import trace
from ckpt_fast.jobs.report import SaveReport, counted_from
from ckpt_fast.pipeline.save.parts import Completion, SaveOptions
from ckpt_fast.pipeline.save.save import Save
from ckpt_fast.ranks.group import ControlGroup
from ckpt_fast.storage.commit import refuse_overwriting
from ckpt_fast.storage.files import absolute, require_named


def save(
    state_dict: Mapping[str, Any],
    path: StrPath,
    *,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    thread_count: int | None = None,
    overwrite: bool = True,
) -> SaveReport:
    """Collective. Save a state dict in torch DCP's files; on return they are durable and published.

    ``torch.distributed.checkpoint.load`` reads them. Each DTensor or ShardedTensor is saved by the ranks that
    have its shards. What several ranks have (plain tensors, objects, replicated shards) is saved by one of
    them; such tensors are divided so that all ranks write about as many bytes. Objects with ``state_dict``
    and ``load_state_dict`` at the top level are asked for their state dict.

    The first save of a structure (names, shapes, strides, dtypes, devices, sharding) plans, and its plan is
    kept with the process group: about a kilobyte a tensor, of the last four structures, and no tensors. Later
    saves compare the structure and follow the plan.

    Args:
        state_dict: nested dicts and lists of tensors and objects.
        path: checkpoint directory, the same on every rank. An older checkpoint in it is one until this one
            replaces it.
        process_group: the ranks that save together; None means all. Not needed for a single process.
        no_dist: this rank saves alone, and calls no collectives; each tensor must be whole on it.
        thread_count: files per rank; None: as many as are fastest there.
        overwrite: False refuses a directory that holds a complete checkpoint.

    Returns:
        What this rank wrote, and how long each step took.

    Raises:
        CheckpointError: on every rank, naming the rank that failed. Nothing was published, and an older
            checkpoint is as it was.
    """
    with counted_from(time.perf_counter()):
        job = _started(state_dict, path, process_group, no_dist, overwrite, SaveOptions(writers=thread_count))
    job.write()
    return job.commit()


def async_save(
    state_dict: Mapping[str, Any],
    path: StrPath,
    *,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    thread_count: int | None = None,
    overwrite: bool = True,
) -> SaveFuture:
    """Collective. Copy a state dict to host memory, and save it in the background.

    On return everything is copied, or will be copied from a GPU before it can change: training may go on. (If
    ``CKPT_FAST_STAGING=overlapped``, call ``ckpt_fast.wait_staged()`` before changing GPU tensors.) The rest
    needs no further call: the checkpoint is published when all ranks have written. They find out through a
    process group of their own, which the first call creates (gloo, on the CPU). The host memory is used again
    by the next save.

    Saves may overlap; one to the same directory waits for the one before it. If the interpreter exits, it
    waits for saves in flight; keep the process group until then.

    Args:
        state_dict, path, process_group, no_dist, thread_count, overwrite: see ``save``.

    Returns:
        A ``concurrent.futures.Future`` with the report of the save. Its methods are not collective.

    Raises:
        CheckpointError: on every rank, naming the rank that failed; nothing is in flight. What fails later
            is raised by the future, on every rank, as AsyncSaveError.
    """
    return save_in_background(
        state_dict,
        path,
        process_group=process_group,
        no_dist=no_dist,
        thread_count=thread_count,
        overwrite=overwrite,
    )


def save_in_background(
    state_dict: Mapping[str, Any],
    path: StrPath,
    completion: Completion | None = None,
    *,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    thread_count: int | None = None,
    overwrite: bool = True,
    when_failed: Callable[[], None] | None = None,
) -> SaveFuture:
    """Collective. ``async_save`` with additional steps of the coordinator; see ``Completion``, and for
    ``when_failed`` ``Committer.finish``."""
    with counted_from(time.perf_counter()):
        group = ControlGroup.of_one() if no_dist else ControlGroup(process_group)
        committer = committers.get(group, process_group)
        committer.get_ready(group, process_group)
        options = SaveOptions(writers=thread_count, snapshot=True)
        job = _started(state_dict, path, process_group, no_dist, overwrite, options, completion)
    return committer.finish(job, when_failed)


def load(
    state_dict: dict[str, Any],
    path: StrPath,
    *,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    allow_partial_load: bool = False,
) -> None:
    """Collective. Fill a state dict in place from torch DCP's files, of ours or of torch's own.

    Each rank reads its own shards, however the tensors were sharded when they were saved. Tensors are filled
    where they are, and converted to their dtype; other values are replaced. At the end ``load_state_dict`` of
    the objects that have it is called. What is in the checkpoint and not in the state dict is ignored; where
    that is a whole section (a top-level key, an optimizer's moments), rank 0 logs a warning.

    Args:
        state_dict: nested dicts and lists of tensors and objects, as for ``save``.
        path: checkpoint directory, the same on every rank.
        process_group: the ranks that load together; None means all. Not needed for a single process.
        no_dist: this rank loads alone, and calls no collectives.
        allow_partial_load: leave as they are the values that the checkpoint does not have.

    Raises:
        CheckpointNotFoundError: there is no checkpoint.
        CheckpointMismatchError: the checkpoint lacks a name, or has another shape or kind of value for it.
            Nothing was changed on any rank.
        CheckpointCorruptError: the checkpoint is damaged, or was replaced meanwhile. If its metadata lacks a
            part of a tensor, nothing was changed on any rank.
        UnsafeCheckpointError: an object is more than tensors and plain data.

        All of these are raised on every rank, naming the rank that failed. After the latter two, tensors may
        be filled in part where nothing else is said.
    """
    group = ControlGroup.of_one() if no_dist else ControlGroup(process_group)
    directory = absolute(path)
    with trace.span("load", directory=directory):
        load_state_dict(state_dict, directory, group, allow_partial_load=allow_partial_load)


def _started(
    state_dict: Mapping[str, Any],
    path: StrPath,
    process_group: dist.ProcessGroup | None,
    no_dist: bool,
    overwrite: bool,
    options: SaveOptions,
    completion: Completion | None = None,
) -> Save:
    directory = absolute(path)
    wait_for_save(directory)

    def collect() -> dict[str, Any]:
        require_named(path)
        if not overwrite:
            refuse_overwriting(directory)
        return plain_state_dict(state_dict)

    return start_save(collect, directory, options, completion, process_group=process_group, no_dist=no_dist)
