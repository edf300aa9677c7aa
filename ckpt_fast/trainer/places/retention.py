# SPDX-License-Identifier: Apache-2.0
"""Deleting old checkpoints, without ever deleting the one to resume from.

Whatever is asked, these stay: the iterations that the trackers of the directory name, and checkpoints newer
than the last published save, which may still be in the making. A checkpoint loses its seal before anything
else of it, so a crash while deleting never leaves a half that passes for a whole.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ckpt_fast.compat import object_storage, objects
from ckpt_fast.errors import CheckpointError, CheckpointWriteError
from ckpt_fast.format.manifest import file_record
from ckpt_fast.format.names import DATA_SUFFIX, METADATA_FILE, SEAL_FILE, SIDECAR_FILE
from ckpt_fast.format.types import FileRecord
from ckpt_fast.pipeline.load.decode import decode_object, read_contents
from ckpt_fast.ranks.world import get_rank_safe, note_rank_0
from ckpt_fast.storage import owners, replacement
from ckpt_fast.storage.commit import fsync_directory, is_payload
from ckpt_fast.storage.small_files import read_small_file
from ckpt_fast.trainer.places.catalog import damage_of, iterations_in, published
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

# What our saves leave besides data, and no other library's alone.
_OWN_NAMES = {METADATA_FILE, SEAL_FILE, SIDECAR_FILE, CONFIG_FILE, TRAIN_STATE_FILE}


@dataclass(frozen=True)
class _Checkpoint:
    iteration: int
    path: str


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
            Only whole ones count; what a save that died has left is deleted as soon as it is old.
        do_async: delete in a background thread, which a normal exit of the process waits for.
        max_iteration: the last published iteration; newer checkpoints are neither counted nor deleted.
            None: the iteration that the trackers name, if any.
    """
    if get_rank_safe() != 0 or leave_ckpt_num is None or leave_ckpt_num < 0:
        return
    try:
        removed, kept = _choose(save_dir, leave_ckpt_num, max_iteration)
    except Exception:
        logger.exception("cannot tell which checkpoints in %s are old: none is deleted", save_dir)
        return
    if not removed:
        return
    note_rank_0(f"Checkpoints scheduled for removal: {_names(removed)}")
    note_rank_0(f"Checkpoints kept: {_names(kept)}")
    paths = [settled(each.path) for each in removed]
    if not do_async:
        _remove_checkpoints(paths)
    elif paths:
        threading.Thread(target=_remove_checkpoints, args=(paths,)).start()


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
    removed = [each.path for each in old if each.iteration not in needed]
    _remove_checkpoints(removed)
    for path in removed:
        if not object_storage(path):
            replacement.sweep(path)


def choose_old(save_dir: str, keep: int, keep_every: int = 0) -> tuple[list[str], list[str]]:
    """Local. Paths of the checkpoints directly in ``save_dir`` to delete, and of those to keep, oldest first.

    What the trackers name is kept, or without trackers the newest whole one. Checkpoints newer than that may
    be in the making, and are in neither list.

    Args:
        save_dir: the directory of the checkpoints and their trackers.
        keep: how many of the newest whole ones are kept.
        keep_every: iterations that are a multiple of it are kept as well; 0: none for that reason.

    Raises:
        DamagedFileError: a tracker is damaged, and no iteration is whole.
        StorageError: object storage does not let anyone tell.
        OSError, ValueError: the directory or a tracker in it cannot be read.
    """
    selected = published(save_dir).iteration

    def is_exempt(iteration: int) -> bool:
        return iteration == selected or (keep_every > 0 and iteration % keep_every == 0)

    removed, kept = _choose(save_dir, keep, None, is_exempt)
    return [each.path for each in removed], [each.path for each in kept]


def delete_checkpoints(paths: Iterable[str]) -> list[str]:
    """Local. Delete checkpoints, each so that at no time a part of it passes for the whole.

    Returns:
        One line for each that could not be deleted.
    """
    return _remove_checkpoints([settled(path) for path in paths])


def _none_exempt(_: int) -> bool:
    return False


def _choose(
    save_dir: str,
    leave: int,
    max_iteration: int | None,
    is_exempt: Callable[[int], bool] = _none_exempt,
) -> tuple[list[_Checkpoint], list[_Checkpoint]]:
    """(to delete, to keep), oldest first; checkpoints too new to be judged are in neither.

    Raises:
        Exception: the directory or a tracker in it cannot be read.
    """
    tracked = _tracked_iterations(save_dir)
    newest = max_iteration if max_iteration is not None else max(tracked, default=None)
    old = [each for each in _list_checkpoints(save_dir) if newest is None or each.iteration <= newest]
    kept = {each for each in old if each.iteration in tracked or is_exempt(each.iteration)}
    whole = 0
    for each in reversed(old):
        if whole < leave and _counts(each.path):
            kept.add(each)
            whole += 1
    if whole == 0:
        # There is nothing to compare with: the newest may be of a kind that is not known here.
        kept.update(old[max(0, len(old) - leave) :])
    return [each for each in old if each not in kept], [each for each in old if each in kept]


def _counts(path: str) -> bool:
    """Whether a directory is one of the checkpoints that are to be kept: a whole one, or another library's.

    What is neither was left by a save that died, or by a deletion: nobody can resume from it.
    """
    if damage_of(path) is None:
        return True
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


def _names(checkpoints: list[_Checkpoint]) -> list[str]:
    return [os.path.basename(each.path) for each in checkpoints]


def _list_checkpoints(save_dir: str) -> list[_Checkpoint]:
    """The directories ``iter_<number>`` in ``save_dir``, oldest first; other names are not ours to delete.

    Nor are links: a checkpoint elsewhere is somebody's own arrangement.
    """
    found = (_Checkpoint(iteration, path) for iteration, path in iterations_in(save_dir))
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


def _remove_checkpoints(paths: list[str]) -> list[str]:
    failed = []
    with _CHECKPOINT_CLEANUP_LOCK:
        for path in paths:
            try:
                if file_exists(path):
                    _remove_checkpoint(path)
            except Exception as error:
                logger.exception("cannot delete the old checkpoint %s", path)
                failed.append(f"{path} is not deleted: {error}")
    return failed


def _remove_checkpoint(path: str) -> None:
    is_durable, storage = False, object_storage(path)
    for seal in (SEAL_FILE, METADATA_FILE, SIDECAR_FILE):
        file = join_paths(path, seal)
        if not file_exists(file):
            continue
        if storage:
            objects.delete(file)
        else:
            os.unlink(file)
            if not is_durable:  # what goes after the first seal may come back, if that does not
                fsync_directory(path)
                is_durable = True
    if storage:
        objects.delete(path, recursive=True)
    else:
        shutil.rmtree(path)
