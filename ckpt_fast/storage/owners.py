# SPDX-License-Identifier: Apache-2.0
"""Which save a directory belongs to: one at a time, as far as this process knows.

A save that begins while another one in the same directory is not over would remove its files, and the
scheduler would decide which of them is published.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
import weakref
from typing import Protocol

from ckpt_fast import native
from ckpt_fast.errors import CheckpointWriteError

logger = logging.getLogger(__name__)
_POLL_S = 0.02
_SILENT_S = 1.0


class Owner(Protocol):
    """A save, from the moment it touches its directory."""

    def is_over(self) -> bool:
        """Whether it neither will be published any more nor can still give a file its name."""


class Hold:
    """A save's hold on its directory.

    Attributes:
        progress: of its writing; None until there is one.
    """

    def __init__(self) -> None:
        self.progress: native.Progress | None = None
        self._let_go = False

    def let_go(self) -> None:
        """The save has ended, in whatever way."""
        self._let_go = True

    def is_over(self) -> bool:
        """See ``Owner``."""
        progress = self.progress
        if progress is None:
            return self._let_go
        return (self._let_go or progress.stopped) and not progress.renaming


_lock = threading.Lock()
# A save with no remaining references is over.
_owners: dict[str, weakref.ref[Owner]] = {}


def is_occupied(directory: str) -> bool:
    """Local. Whether a save of this process to the directory is not over."""
    with _lock:
        reference = _owners.get(_key(directory))
        owner = reference() if reference is not None else None
        return owner is not None and not owner.is_over()


def occupy(directory: str, owner: Owner, wait_s: float = 0.0) -> None:
    """Local. From now on the directory is ``owner``'s, until that is over.

    Args:
        directory: the checkpoint; not only a path, any name by which saves of this process know it.
        owner: held by weak reference.
        wait_s: how long to wait for the save before.

    Raises:
        CheckpointWriteError: errno EBUSY: another save is still at it.
    """
    key = _key(directory)
    begin, said = time.monotonic(), False
    while True:
        with _lock:
            reference = _owners.get(key)
            before = reference() if reference is not None else None
            if before is None or before is owner or before.is_over():
                _owners[key] = weakref.ref(owner)
                return
        del before
        waited = time.monotonic() - begin
        if waited >= wait_s:
            raise CheckpointWriteError(
                f"another save of this process to {directory} is not over: this one would destroy it, and "
                "was not begun. Let the other end first (await what it returned, or call "
                "maybe_finalize_async_save(..., blocking=True)), or save to another directory.",
                errno.EBUSY,
                directory,
            )
        if waited > _SILENT_S and not said:
            said = True
            logger.warning("a save to %s waits for the one before it to the same directory", directory)
        time.sleep(_POLL_S)


def _key(directory: str) -> str:
    return directory if "://" in directory else os.path.realpath(directory)
