# SPDX-License-Identifier: Apache-2.0
"""Which save a directory belongs to: one at a time, as far as this process knows.

A save that begins while another one in the same directory is not over would remove its files, and the
scheduler would decide which of them is published.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Protocol

from ckpt_fast import native, settings
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
        lasts: until nobody is ``at_work`` any more. A request to object storage that is under way cannot be
            taken back; in a file system no name changes once ``progress`` is stopped.
    """

    def __init__(self) -> None:
        self.progress: native.Progress | None = None
        self.lasts = False
        self._let_go = False
        self._at_work: list[str] = []

    def begin(self, what: str) -> None:
        """Somebody begins to work for the save, until ``end``."""
        self._at_work.append(what)

    def end(self, what: str) -> None:
        """See ``begin``."""
        self._at_work.remove(what)

    @contextlib.contextmanager
    def at_work(self, what: str) -> Iterator[None]:
        """A block that works for the save."""
        self.begin(what)
        try:
            yield
        finally:
            self.end(what)

    def let_go(self) -> None:
        """The save has ended, in whatever way."""
        self._let_go = True

    def is_over(self) -> bool:
        """See ``Owner``."""
        if self.lasts and self._at_work:
            return False
        return self.is_given_up and not (self.progress is not None and self.progress.renaming)

    @property
    def is_given_up(self) -> bool:
        """Whether it will not be published any more, or has been."""
        return self._let_go or (self.progress is not None and self.progress.stopped)


class _Removal:
    """Deletes a directory."""

    def __init__(self) -> None:
        self._ended = False

    def end(self) -> None:
        self._ended = True

    def is_over(self) -> bool:
        return self._ended


_lock = threading.Lock()
# A save with no remaining references is over.
_owners: dict[str, weakref.ref[Owner]] = {}
# The number of the save that has begun last in a directory, among all of this process.
_begun: dict[str, int] = {}
_numbers = itertools.count(1)
# A run saves to a new directory each time.
_MOST_KNOWN = 1000


def is_occupied(directory: str) -> bool:
    """Local. Whether a save of this process to the directory is not over."""
    with _lock:
        return _busy(_key(directory)) is not None


def newest_save(directory: str) -> int:
    """Local. The number of this process's save that has begun last in the directory; 0 if none is known."""
    with _lock:
        return _begun.get(_key(directory), 0)


@contextlib.contextmanager
def removing(directory: str) -> Iterator[bool]:
    """Local. A block that may delete a directory: saves of this process to it wait until the block ends.

    Yields:
        Whether it may; not while a save to it, or another deletion, is not over.
    """
    mine, key = _Removal(), _key(directory)
    with _lock:
        is_free = _busy(key) is None
        if is_free:
            _owners[key] = weakref.ref(mine)
    try:
        yield is_free
    finally:
        mine.end()


def occupy(directory: str, owner: Owner, wait_s: float = 0.0) -> None:
    """Local. From now on the directory is ``owner``'s, until that is over.

    While an old checkpoint in it is being deleted, this waits in any case, at most for CKPT_FAST_TIMEOUT.

    Args:
        directory: the checkpoint; not only a path, any name by which saves of this process know it.
        owner: held by weak reference.
        wait_s: how long to wait for the save before.

    Raises:
        CheckpointWriteError: errno EBUSY: another save is still at it; EAGAIN: it was given up, but has asked
            the storage for something that may still happen.
    """
    key = _key(directory)
    begin, said = time.monotonic(), False
    while True:
        with _lock:
            before = _busy(key)
            if before is None or before is owner:
                _owners[key] = weakref.ref(owner)
                _begun.pop(key, None)
                _begun[key] = next(_numbers)
                _forget()
                return
        is_given_up = isinstance(before, Hold) and before.is_given_up
        is_removal = isinstance(before, _Removal)
        del before
        waited = time.monotonic() - begin
        if is_removal and waited >= max(wait_s, settings.timeout_s()):
            raise CheckpointWriteError(
                f"the older checkpoint in {directory} is still being deleted by this process; nothing was "
                "saved. See whether the storage answers.",
                errno.EBUSY,
                directory,
            )
        if is_removal:
            time.sleep(_POLL_S)
            continue
        if waited >= wait_s and is_given_up:
            raise CheckpointWriteError(
                f"an earlier save of this process to {directory} was given up, but a request of it is still "
                "under way and could arrive in this one, which was not begun. See whether the storage "
                "answers.",
                errno.EAGAIN,
                directory,
            )
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


def _busy(key: str) -> Owner | None:
    """Whose the directory is, if that is not over. Under the lock."""
    reference = _owners.get(key)
    owner = reference() if reference is not None else None
    return None if owner is None or owner.is_over() else owner


def _forget() -> None:
    """Under the lock. Forget directories where no save is at work, if there are many: the oldest first."""
    while len(_begun) > _MOST_KNOWN:
        del _begun[next(iter(_begun))]
    if len(_owners) > _MOST_KNOWN:
        for key in [key for key in _owners if _busy(key) is None]:
            del _owners[key]


def _key(directory: str) -> str:
    return directory if "://" in directory else os.path.realpath(directory)
