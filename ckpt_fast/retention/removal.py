# SPDX-License-Identifier: Apache-2.0
"""Deletion of a checkpoint on a file system, so that a crash never leaves a half that passes for a whole."""

from __future__ import annotations

import errno
import os
import shutil

from ckpt_fast.format.names import METADATA_FILE, SEAL_FILE, SIDECAR_FILE
from ckpt_fast.storage.commit import fsync_directory

# In this order: whoever has the later ones must not find the earlier.
SEALS = (SEAL_FILE, METADATA_FILE, SIDECAR_FILE)
# Each meets at least one file that somebody else has just deleted.
_MOST_TRIES = 100


def remove_directory(path: str) -> None:
    """Local. Delete a checkpoint: its seal first, durably. A link is not followed.

    Others may delete it at the same time: what is gone is no failure.

    Raises:
        OSError: some of it is left, without a seal unless that could not be deleted; nothing of what a link
            leads to has been touched (ELOOP).
    """
    if os.path.islink(path):
        raise OSError(errno.ELOOP, "it is a symbolic link, and is left alone", path)
    is_durable = False
    for name in SEALS:
        try:
            os.unlink(os.path.join(path, name))
            if not is_durable:  # what goes after the first seal may come back, if that does not
                fsync_directory(path)
                is_durable = True
        except (FileNotFoundError, NotADirectoryError):
            continue
    for _ in range(_MOST_TRIES):
        try:
            shutil.rmtree(path)
        except FileNotFoundError:  # of a file in it, or of itself
            if not os.path.lexists(path):
                return
        else:
            return
    shutil.rmtree(path)
