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


def remove_directory(path: str) -> None:
    """Local. Delete a checkpoint: its seal first, durably. A link is not followed.

    Raises:
        OSError: some of it is left, without a seal unless that could not be deleted; nothing of what a link
            leads to has been touched (ELOOP).
    """
    if os.path.islink(path):
        raise OSError(errno.ELOOP, "it is a symbolic link, and is left alone", path)
    is_durable = False
    for name in SEALS:
        file = os.path.join(path, name)
        if not os.path.exists(file):
            continue
        os.unlink(file)
        if not is_durable:  # what goes after the first seal may come back, if that does not
            fsync_directory(path)
            is_durable = True
    shutil.rmtree(path)
