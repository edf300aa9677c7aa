# SPDX-License-Identifier: Apache-2.0
"""Two runs that save to one directory: seen by the tracker that says what this one has not written.

It happens where a scheduler starts a job anew while the old one still lives. Each then deletes and replaces
what the other has saved; what is loaded is checked, so that nobody gets a mixture.
"""

from __future__ import annotations

import logging
import os
import threading

from ckpt_fast.errors import CheckpointError
from ckpt_fast.once import first_time
from ckpt_fast.storage.small_files import LARGEST_TEXT, read_small_file

logger = logging.getLogger(__name__)

_lock = threading.Lock()
# By path of a tracker, what this process has written to it last.
_written: dict[str, bytes] = {}


def warn_of_another(tracker: str) -> None:
    """Local. Log a warning, once for a tracker, if it is not as this process has left it.

    Args:
        tracker: in a file system; this process is about to replace it.
    """
    with _lock:
        own = _written.get(os.path.realpath(tracker))
    if own is None:
        return
    try:
        found = read_small_file(tracker, LARGEST_TEXT)
    except (OSError, CheckpointError):
        return
    if found != own and first_time(f"another writer of {tracker}"):
        logger.warning(
            "%s says %r, and this run has written %r: another run saves to the same directory. Each deletes "
            "and replaces checkpoints of the other. Stop one of them, or give each a directory of its own. "
            "(Whoever has edited the tracker by hand can ignore this: it is about to be replaced.)",
            tracker,
            found[:40].decode(errors="replace"),
            own.decode(errors="replace"),
        )


def note_written(tracker: str, content: bytes) -> None:
    """Local. This process has written a tracker."""
    with _lock:
        _written[os.path.realpath(tracker)] = content
