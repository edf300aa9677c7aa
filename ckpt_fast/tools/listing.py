# SPDX-License-Identifier: Apache-2.0
"""The checkpoints in a directory: which are whole, which one is selected, and which can go."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass

from ckpt_fast.errors import CheckpointError, CheckpointNotFoundError, DamagedFileError
from ckpt_fast.format.names import METADATA_FILE
from ckpt_fast.pipeline.load.opened import OpenCheckpoint
from ckpt_fast.retention.line import Line, line_in, resumed_from_in
from ckpt_fast.retention.policies import Policy
from ckpt_fast.storage.objects.client import checkpoint_files, object_storage
from ckpt_fast.tools import opening
from ckpt_fast.tools.streaming import Progress, no_progress
from ckpt_fast.trainer.places.catalog import (
    NOTHING,
    Published,
    Tier,
    checkpoints_in,
    damage_of,
    published,
)
from ckpt_fast.trainer.places.locate import _NON_PERSISTENT_CKPT_SUBDIR
from ckpt_fast.trainer.places.paths import is_directory, join_paths
from ckpt_fast.trainer.places.pruning import choose_old
from ckpt_fast.trainer.places.retention import delete_checkpoints, stored_at


@dataclass(frozen=True)
class Listed:
    """A checkpoint in a directory.

    Attributes:
        path: its own directory.
        iteration: the training step; None if the name does not say.
        format: see ``Inspection``; None where its small files cannot be read.
        is_complete: whether all its files are there with their lengths; see ``damage``.
        is_selected: whether a run resumes from it: the trackers name it, or it is the newest whole one.
        is_recovery: whether it was saved to recover from (``non_persistent``).
        nbytes: of its files.
        age_s: seconds since it was completed; None where the storage does not say.
        damage: why it is not complete; None if it is.
        resumed_from: the iteration that the run which saved it was resumed from; None if it began anew, or
            nobody noted that.
        is_abandoned: whether it is of a branch that the run has left: the selected one did not come from it.
    """

    path: str
    iteration: int | None
    format: str | None
    is_complete: bool
    is_selected: bool
    is_recovery: bool
    nbytes: int
    age_s: float | None
    damage: str | None
    resumed_from: int | None = None
    is_abandoned: bool = False


@dataclass(frozen=True)
class Pruned:
    """What was deleted, or would be.

    Attributes:
        removed, kept: paths, oldest first.
        nbytes: of the files removed.
        abandoned: those that an abandoned branch has left, removed or not.
        failures: one line for each checkpoint that could not be deleted; it is in ``removed`` as well.
    """

    removed: tuple[str, ...]
    kept: tuple[str, ...]
    nbytes: int
    abandoned: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()


def list_directory(directory: str | os.PathLike[str]) -> list[Listed]:
    """The checkpoints in a directory, oldest first; those to recover from come last. Local.

    These are the directories ``iter_*``, on disk also others with ``.metadata``.

    Args:
        directory: of the checkpoints and their trackers; also ``msc://...``.

    Raises:
        CheckpointNotFoundError: there is no such directory.
        StorageError: object storage does not let anyone tell.
    """
    root = os.fspath(directory)
    opening.in_object_storage(root)
    if not is_directory(root):
        raise CheckpointNotFoundError(f"{root} does not exist, or is no directory")
    found = [*_in_root(root, "persistent"), *_others(root)]
    recovery = join_paths(root, _NON_PERSISTENT_CKPT_SUBDIR)
    if is_directory(recovery):
        found += _in_root(recovery, "recovery")
    return found


def prune(
    directory: str | os.PathLike[str],
    policies: Sequence[Policy],
    *,
    with_abandoned: bool = False,
    dry_run: bool = False,
    progress: Progress = no_progress,
) -> Pruned:
    """Delete old checkpoints ``iter_*`` from a directory; what is not whole and old goes as well. Local.

    The selected one always stays, and so does what is newer than it: it may be in the making. Each checkpoint
    loses its seal first, durably, so that a crash leaves none that passes for whole; the next call removes
    the rest.

    Args:
        directory: of the checkpoints and their trackers; also ``msc://...``.
        policies: a checkpoint stays if one of them keeps it. They decide about the line of the selected one;
            what abandoned branches have left goes once it is older than that.
        with_abandoned: delete what abandoned branches have left although it is newer.
        dry_run: delete nothing.
        progress: called with the checkpoints deleted so far, and those to delete.

    Raises:
        CheckpointNotFoundError: there is no such directory.
        CheckpointError, OSError: nobody can tell which one is selected; nothing is deleted.
    """
    root = os.fspath(directory)
    opening.in_object_storage(root)
    if not is_directory(root):
        raise CheckpointNotFoundError(f"{root} does not exist, or is no directory")
    choice = choose_old(root, policies, with_abandoned=with_abandoned)
    nbytes, failures = 0, []
    for number, each in enumerate(choice.removed, start=1):
        size = each.nbytes
        failed = [] if dry_run else delete_checkpoints([each])
        failures += failed
        nbytes += 0 if failed else size
        progress(number, len(choice.removed))
    removed, kept, abandoned = (
        tuple(each.path for each in part) for part in (choice.removed, choice.kept, choice.abandoned)
    )
    return Pruned(removed, kept, nbytes, abandoned, tuple(failures))


def _in_root(root: str, tier: Tier) -> list[Listed]:
    try:
        selected = published(root)
    except DamagedFileError:
        selected = Published(NOTHING)
    found = [
        _listed(
            each.path,
            each.iteration,
            is_selected=not selected.is_release and each.iteration == selected.iteration,
            is_recovery=tier == "recovery",
        )
        for each in checkpoints_in(root, tier)
    ]
    line = next((line for each, line in found if each.is_selected), None)
    if line is None:
        return [each for each, _ in found]
    return [
        dataclasses.replace(
            each,
            is_abandoned=each.is_complete and line.has_left(selected.iteration, each.iteration or 0, other),
        )
        for each, other in found
    ]


def _others(root: str) -> list[Listed]:
    """Checkpoints with other names than ``iter_*``."""
    if object_storage(root) is not None:
        return []
    known = {each.path for each in checkpoints_in(root)}
    # Not scandir's is_dir, which fails for a link that leads to itself.
    paths = [os.path.join(root, name) for name in sorted(os.listdir(root)) if not name.startswith(".")]
    sealed = [path for path in paths if os.path.exists(os.path.join(path, METADATA_FILE))]
    return [_listed(path, None)[0] for path in sealed if path not in known]


def _listed(
    path: str, iteration: int | None, *, is_selected: bool = False, is_recovery: bool = False
) -> tuple[Listed, Line | None]:
    damage, kind, notes = damage_of(path), None, {}
    with (
        contextlib.suppress(CheckpointError, OSError),
        OpenCheckpoint(checkpoint_files(path)) as checkpoint,
    ):
        kind = opening.format_of(checkpoint)
        iteration = opening.iteration_of(checkpoint) if iteration is None else iteration
        notes = checkpoint.manifest.notes if checkpoint.manifest is not None else {}
    stored = stored_at(path, iteration or 0)
    listed = Listed(
        path=path,
        iteration=iteration,
        format=kind if damage is None else None,
        is_complete=damage is None,
        is_selected=is_selected,
        is_recovery=is_recovery,
        nbytes=stored.nbytes,
        age_s=stored.age_s,
        damage=damage,
        resumed_from=resumed_from_in(notes),
    )
    return listed, line_in(notes, iteration)
