# SPDX-License-Identifier: Apache-2.0
"""What can be deleted by somebody who does not know what the run is doing: a cron job, or a user.

The run may have gone back, and be saving a checkpoint of an older iteration than the selected one.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any

from ckpt_fast import settings
from ckpt_fast.errors import CheckpointError, DamagedFileError
from ckpt_fast.retention.choice import Choice
from ckpt_fast.retention.policies import Policy
from ckpt_fast.retention.stored import Stored, unchanged_s
from ckpt_fast.storage.objects.client import object_storage
from ckpt_fast.trainer.places.catalog import NOTHING, published
from ckpt_fast.trainer.places.locate import _NON_PERSISTENT_CKPT_SUBDIR
from ckpt_fast.trainer.places.paths import get_checkpoint_name, join_paths
from ckpt_fast.trainer.places.retention import choose_in, stored_at

# A directory in which nothing has changed for so long is not being written.
_IN_THE_MAKING_S = 600


def choose_old(save_dir: str, policies: Sequence[Policy], *, with_abandoned: bool = False) -> Choice[Stored]:
    """Local. Which of the checkpoints directly in ``save_dir`` are to be deleted.

    What the trackers name is kept, or without trackers the newest whole one; and what a newer one was resumed
    from. Checkpoints newer than that may be in the making, and are neither kept nor deleted. One of a later
    branch that has just been sealed is kept: the trackers are about to name it.

    Args:
        save_dir: the directory of the checkpoints and their trackers.
        policies, with_abandoned: see ``choose``.

    Raises:
        DamagedFileError: a tracker is damaged, and no iteration is whole.
        StorageError: object storage does not let anyone tell.
        CheckpointError: after a roll-back, an older iteration than the selected one may be in the making.
        OSError, ValueError: the directory or a tracker in it cannot be read.
    """
    newest = published(save_dir)
    selected = None if newest.is_release or newest.iteration == NOTHING else newest.iteration
    choice = choose_in(save_dir, policies, selected, with_abandoned=with_abandoned)
    for each in choice.removed:
        if not object_storage(each.path) and not each.is_sealed and unchanged_s(each.path) < _IN_THE_MAKING_S:
            raise CheckpointError(
                f"{each.path} is being written, or was left by a save that died less than "
                f"{_IN_THE_MAKING_S // 60} minutes ago; nobody can tell what such a save came from. Nothing "
                "was deleted: prune again when the run has saved, or later."
            )
    stay = _goes_on_from(save_dir, choice, selected) if selected is not None else set()
    return choose_in(save_dir, policies, selected, stay, with_abandoned=with_abandoned) if stay else choice


def _goes_on_from(save_dir: str, choice: Choice[Any], selected: int) -> set[int]:
    """The iterations that a run which went back may go on from, although the trackers do not say so."""
    now = stored_at(get_checkpoint_name(save_dir, selected), selected).noted
    later = [each for each in choice.removed if each.is_sealed and _is_fresh(each)]
    recovery = join_paths(save_dir, _NON_PERSISTENT_CKPT_SUBDIR)
    with contextlib.suppress(DamagedFileError):
        newest = published(recovery).iteration
        if newest != NOTHING:
            later.append(stored_at(get_checkpoint_name(recovery, newest), newest))
    later = [each for each in later if each.noted.may_succeed(now)]
    origins = {each.resumed_from for each in later if each.resumed_from is not None}
    return {*origins, *(each.iteration for each in later)}


def _is_fresh(checkpoint: Stored) -> bool:
    """Whether it may have been sealed in the last minutes."""
    if not object_storage(checkpoint.path):
        return unchanged_s(checkpoint.path) < _IN_THE_MAKING_S
    saved_at = checkpoint.noted.saved_at
    return saved_at is not None and time.time() - saved_at < _IN_THE_MAKING_S + settings.timeout_s()
