# SPDX-License-Identifier: Apache-2.0
"""Deleting old checkpoints, without ever deleting the one to resume from.

What stays is said in ``retention.choice``; here are the checkpoints of runs, with their trackers, also in
object storage. A checkpoint loses its seal before anything else of it, so a crash while deleting never leaves
a half that passes for a whole.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from ckpt_fast.compat import object_storage, objects
from ckpt_fast.doors.megatron.common_state import open_checkpoint
from ckpt_fast.errors import CheckpointError, CheckpointWriteError
from ckpt_fast.format.manifest import file_record
from ckpt_fast.format.names import DATA_SUFFIX, METADATA_FILE, SEAL_FILE, SIDECAR_FILE
from ckpt_fast.format.types import FileRecord
from ckpt_fast.pipeline.load.decode import decode_object, read_contents
from ckpt_fast.ranks.world import get_rank_safe, note_rank_0, print_rank_0
from ckpt_fast.retention.choice import Choice, choose
from ckpt_fast.retention.policies import KeepNewest, Policy
from ckpt_fast.retention.removal import SEALS, remove_directory
from ckpt_fast.retention.stored import Stored, age_of, head_at, nbytes_below
from ckpt_fast.storage import owners, replacement
from ckpt_fast.storage.commit import is_payload
from ckpt_fast.storage.objects import ObjectStore
from ckpt_fast.storage.small_files import read_small_file
from ckpt_fast.trainer.places.catalog import damage_of, iterations_in, seal_of
from ckpt_fast.trainer.places.paths import (
    CONFIG_FILE,
    TRACKER_PREFIX,
    TRAIN_STATE_FILE,
    file_exists,
    get_checkpoint_tracker_filename,
    get_checkpoint_train_state_filename,
    join_paths,
    names_in,
    read_file,
    settled,
)

logger = logging.getLogger(__name__)

# Deletions of overlapping saves run one after the other, so that none sees another's half-deleted state.
_CHECKPOINT_CLEANUP_LOCK = threading.Lock()

_notes_of_objects: dict[str, Mapping[str, Any]] = {}

# What our saves leave besides data, and no other library's alone.
_OWN_NAMES = {METADATA_FILE, SEAL_FILE, SIDECAR_FILE, CONFIG_FILE, TRAIN_STATE_FILE}


class CheckpointOfRun(Stored):
    """One of the checkpoints of a run, in a directory or in object storage."""

    @cached_property
    def notes(self) -> Mapping[str, Any]:
        """In object storage, for which all of ``.metadata`` is read, as this process saw them first."""
        if not object_storage(self.path):
            head = head_at(self.path)
            return head.notes if head is not None else {}
        if self.path not in _notes_of_objects:
            try:
                with open_checkpoint(self.path) as checkpoint:
                    manifest = checkpoint.manifest
                    _notes_of_objects[self.path] = manifest.notes if manifest is not None else {}
            except (CheckpointError, OSError):  # as good as none; whether it is whole is another question
                return {}
        return _notes_of_objects[self.path]

    @cached_property
    def nbytes(self) -> int:
        storage = object_storage(self.path)
        if storage is None:
            return nbytes_below(self.path)
        return sum(ObjectStore(storage, self.path).sizes().values())

    @cached_property
    def age_s(self) -> float | None:
        return None if object_storage(self.path) else age_of(self.path)

    @cached_property
    def is_sealed(self) -> bool:
        return seal_of(self.path) is not None or _is_foreign(self.path)

    @cached_property
    def is_whole(self) -> bool:
        """Also another library's; what is neither was left by a save that died, or by a deletion."""
        return damage_of(self.path) is None or _is_foreign(self.path)


def cleanup_old_non_persistent_checkpoint(
    save_dir: str,
    leave_ckpt_num: int | None = 1,
    do_async: bool = False,
    *,
    max_iteration: int | None = None,
) -> None:
    """Delete all but the newest ``iter_*`` checkpoints directly in ``save_dir``. Rank 0 acts, others return.

    A deletion that fails is logged and costs disk space, not the save that asked for it.

    Args:
        save_dir: the directory of the checkpoints and their trackers.
        leave_ckpt_num: how many to keep; 0 deletes all that may be deleted, None or a negative number none.
            Only whole ones count that the newest came from; what a save that died has left is deleted as
            soon as it is old, and so is what an abandoned branch has left.
        do_async: delete in a background thread, which a normal exit of the process waits for.
        max_iteration: the last published iteration; newer checkpoints are neither counted nor deleted.
            None: the iteration that the trackers name, if any.
    """
    if leave_ckpt_num is not None and leave_ckpt_num >= 0:
        delete_old(save_dir, [KeepNewest(leave_ckpt_num)], do_async=do_async, max_iteration=max_iteration)


def delete_old(
    save_dir: str,
    policies: Sequence[Policy],
    *,
    do_async: bool = False,
    max_iteration: int | None = None,
    protected: Collection[int] = (),
) -> None:
    """Delete the checkpoints ``iter_*`` in ``save_dir`` that no policy keeps. Rank 0 acts, others return.

    Args:
        save_dir, do_async, max_iteration: see ``cleanup_old_non_persistent_checkpoint``.
        policies: see ``choose``.
        protected: iterations that stay in any case.
    """
    if get_rank_safe() != 0:
        return
    try:
        choice = choose_in(save_dir, policies, max_iteration, protected)
    except Exception:
        logger.exception("cannot tell which checkpoints in %s are old: none is deleted", save_dir)
        return
    if choice.removed:
        note_rank_0(f"Checkpoints scheduled for removal: {_names(choice.removed)}")
        note_rank_0(f"Checkpoints kept: {_names(choice.kept)}")
    if choice.abandoned:
        print_rank_0(f"Checkpoints of an abandoned branch, which do not count: {_names(choice.abandoned)}")
    for each in choice.removed:
        each.path = settled(each.path)
    if not do_async:
        _remove_checkpoints(choice.removed)
    elif choice.removed:
        threading.Thread(target=_remove_checkpoints, args=(choice.removed,)).start()


def cleanup_old_dataloader_states(states_dir: str, checkpoint_roots: Sequence[str], newest: int) -> None:
    """Delete the data loader states whose checkpoints are gone. Rank 0 acts, others return.

    Those of iterations after ``newest`` stay, and the two newest of the others: they may belong to local
    checkpoints, which are in no shared directory.

    Args:
        states_dir: has a directory ``iter_*`` for each save.
        checkpoint_roots: where the checkpoints are.
        newest: the last published iteration.
    """
    if get_rank_safe() != 0:
        return
    try:
        old = [each for each in _list_checkpoints(states_dir) if each.iteration <= newest][:-2]
        needed = {iteration for root in checkpoint_roots for iteration, _ in iterations_in(root)}
    except Exception:
        logger.exception("cannot tell which data loader states in %s are old: none is deleted", states_dir)
        return
    removed = [each for each in old if each.iteration not in needed]
    _remove_checkpoints(removed)
    for each in removed:
        if not object_storage(each.path):
            replacement.sweep(each.path)


def stored_at(path: str, iteration: int) -> Stored:
    """Local. A checkpoint as policies see it, also in object storage."""
    return CheckpointOfRun(iteration, path)


def delete_checkpoints(checkpoints: Iterable[Stored]) -> list[str]:
    """Local. Delete checkpoints, each so that at no time a part of it passes for the whole.

    Returns:
        One line for each that could not be deleted, or has been saved again since it was found.
    """
    return _remove_checkpoints(checkpoints)


def choose_in(
    save_dir: str,
    policies: Sequence[Policy],
    selected: int | None,
    protected: Collection[int] = (),
    *,
    with_abandoned: bool = False,
) -> Choice[Any]:
    """Local. ``choose`` for a directory with trackers, which may name others than the selected one.

    Args:
        save_dir: the directory of the checkpoints and their trackers.
        policies, with_abandoned: see ``choose``.
        selected: the iteration that was published last; None: the newest that the trackers name.
        protected: iterations that stay in any case, besides those.

    Raises:
        Exception: the directory or a tracker in it cannot be read.
    """
    tracked = _tracked_iterations(save_dir)
    newest = selected if selected is not None else max(tracked, default=None)
    found = _list_checkpoints(save_dir)
    if object_storage(save_dir):
        _limit_reading(found, newest)
    newer = [each for each in found if newest is not None and each.iteration > newest]
    origins = {each.resumed_from for each in newer if each.is_compared and each.resumed_from is not None}
    return choose(
        found, policies, newest, protected={*tracked, *protected, *origins}, with_abandoned=with_abandoned
    )


def _limit_reading(found: Iterable[CheckpointOfRun], newest: int | None) -> None:
    """Let only those be compared with the line of the selected one that can be of a branch which it has left.

    What the run came from when it was resumed, and what is older, has been compared by earlier saves.
    """
    selected = next((each for each in found if each.iteration == newest), None)
    since = None
    if selected is not None:
        _notes_of_objects.pop(selected.path, None)  # it may have just been replaced
        since = selected.resumed_from
    for each in found:
        each.is_compared = each is selected or (since is not None and each.iteration > since)


def _is_foreign(path: str) -> bool:
    """Whether a directory is a checkpoint that another library wrote in a way of its own."""
    names = names_in(path, "*")
    if SEAL_FILE in names and not names_in(path, f"*{DATA_SUFFIX}"):
        # Of a backend of Megatron-Core that keeps a directory for each tensor.
        return not file_exists(join_paths(path, METADATA_FILE))
    return bool(names) and not any(is_payload(name) or name in _OWN_NAMES for name in names)


def remove_replaced(root: str, checkpoint_roots: Iterable[str | None]) -> None:
    """Remove the leftovers next to an iteration of killed saves that were replacing it. Rank 0 acts.

    Args:
        root: a directory of checkpoints, or of data loader states.
        checkpoint_roots: where a save of this process may be at the same iteration just now.
    """
    if get_rank_safe() != 0 or object_storage(root) or not os.path.isdir(root):
        return
    try:
        for path in replacement.replaced_in(root):
            places = (os.path.join(each, os.path.basename(path)) for each in checkpoint_roots if each)
            if not any(map(owners.is_occupied, places)):
                replacement.put_back(path)
                _put_states_back(path, checkpoint_roots)
                replacement.sweep(path)
    except (OSError, CheckpointWriteError) as error:
        logger.warning("cannot remove what was left in %s: %s", root, error)


def _put_states_back(directory: str, checkpoint_roots: Iterable[str | None]) -> None:
    """If a crash has left the data loader states of a checkpoint beside ``directory``, put them there.

    A save that replaces an iteration gives the checkpoint its place first, and its data loader states theirs.

    Raises:
        CheckpointWriteError: that could not be done.
    """
    for root in checkpoint_roots:
        if not root or object_storage(root):
            continue
        try:
            manifest = read_contents(os.path.join(root, os.path.basename(directory))).manifest
        except CheckpointError:  # no checkpoint that anyone could load
            continue
        records = list(manifest.beside.values()) if manifest is not None else []
        place = next((each for each in replacement.places(directory) if _holds(each, records)), None)
        if records and place is not None:
            if place != directory:
                replacement.exchange(place, directory)
            return


def _holds(directory: str, records: Iterable[FileRecord]) -> bool:
    """Whether all these files are in a directory, as they were written."""
    try:
        return all(
            file_record(record.path, read_small_file(join_paths(directory, os.path.basename(record.path))))
            == record
            for record in records
        )
    except (OSError, CheckpointError):
        return False


def _names(checkpoints: Iterable[Stored]) -> list[str]:
    return [os.path.basename(each.path) for each in checkpoints]


def _list_checkpoints(save_dir: str) -> list[CheckpointOfRun]:
    """The directories ``iter_<number>`` in ``save_dir``, oldest first; other names are not ours to delete.

    Nor are links: a checkpoint elsewhere is somebody's own arrangement.
    """
    found = (CheckpointOfRun(iteration, path) for iteration, path in iterations_in(save_dir))
    return [each for each in found if object_storage(each.path) or not os.path.islink(each.path)]


def _tracked_iterations(save_dir: str) -> set[int]:
    """The iterations that a resuming run would load.

    Raises:
        Exception: a tracker exists and cannot be understood.
    """
    tracked = set()
    train_state = get_checkpoint_train_state_filename(save_dir, prefix=TRACKER_PREFIX)
    if file_exists(train_state):
        content = decode_object(read_file(train_state), train_state, verify=True)
        tracked.add(int(content["step"].item()))
    megatron_lm = get_checkpoint_tracker_filename(save_dir)
    if file_exists(megatron_lm):
        text = read_file(megatron_lm).decode().strip()
        if text != "release":
            tracked.add(int(text))
    return tracked


def _remove_checkpoints(checkpoints: Iterable[Stored]) -> list[str]:
    failed = []
    with _CHECKPOINT_CLEANUP_LOCK:
        for path, checkpoint in ((each.path, each) for each in checkpoints):
            try:
                with checkpoint.removing() as is_same:
                    if not file_exists(path):
                        continue
                    if is_same:
                        _remove_checkpoint(path)
                        continue
                # After a roll-back, a save may be of an iteration before the one that was published last.
                failed.append(f"{path} is not deleted: it is being saved again, or was")
            except Exception as error:
                logger.exception("cannot delete the old checkpoint %s", path)
                failed.append(f"{path} is not deleted: {error}")
    return failed


def _remove_checkpoint(path: str) -> None:
    if not object_storage(path):
        remove_directory(path)
        return
    for name in SEALS:
        if file_exists(join_paths(path, name)):
            objects.delete(join_paths(path, name))
    objects.delete(path, recursive=True)
