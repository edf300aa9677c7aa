# SPDX-License-Identifier: Apache-2.0
"""The directory of a spool: locked while its process lives, so that whoever finds it knows whether it does.

The lock is the kernel's (``flock`` of the directory): it ends with the process, however that ends, and cannot
be mistaken for that of another process with the same id. Windows locks no directories: what a killed process
has left there stays.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import secrets
import shutil
import socket
import stat
import sys

from ckpt_fast import system

logger = logging.getLogger(__name__)

# Somebody may be removing what has just been made, and is not locked yet.
_ATTEMPTS = 100
# A spool must be made where locks do not work, too; nobody sweeps there.
_NO_LOCKS = system.error_numbers("ENOLCK", "ENOTSUP", "ENOSYS", "EINVAL", "EBADF")


class SpoolDirectory:
    """A directory of this process alone.

    Args:
        parent: where it will be.
    """

    def __init__(self, parent: str) -> None:
        self._parent = parent
        self._owner = os.getpid()
        self._path: str | None = None
        self._lock: int | None = None

    def create(self) -> str:
        """Create it, after removing those of this user and host whose processes are dead; returns its path.

        Raises:
            OSError: it cannot be created.
        """
        _sweep(self._parent)
        for _ in range(_ATTEMPTS):
            self._path = os.path.join(self._parent, f"{_prefix()}{secrets.token_hex(8)}")
            os.mkdir(self._path, 0o700)
            with contextlib.suppress(FileNotFoundError):
                self._lock = system.open_directory(self._path)
                if self._lock is None:
                    return self._path
                try:
                    system.lock(self._lock, exclusively=False)
                except OSError as error:
                    if error.errno not in _NO_LOCKS:
                        raise
                if os.path.samestat(os.fstat(self._lock), os.stat(self._path)):
                    return self._path
            self._unlock()
        raise FileNotFoundError(errno.ENOENT, "somebody removes it again and again", self._path)

    def remove(self) -> None:
        """Remove it with all that is in it, if it is there."""
        # A process that was forked has a copy of everything but the directory.
        if os.getpid() == self._owner and self._path is not None:
            shutil.rmtree(self._path, ignore_errors=True)
            self._unlock()

    def _unlock(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)


def _prefix() -> str:
    """How the names of this host's spools begin: others may share the file system, but not its locks."""
    host = re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname())
    return f"ckpt_fast-{host}-"


def _sweep(parent: str) -> None:
    """Remove the spools of this user and host that are locked by nobody."""
    try:
        with os.scandir(parent) as entries:
            found = [entry.path for entry in entries if _is_own(entry)]
    except OSError:  # the spool cannot be made there either, which is said then
        return
    for path in found:
        if _remove_if_left(path):
            logger.warning("removed %s, the spool of a process that was killed", path)


def _is_own(entry: os.DirEntry[str]) -> bool:
    name = entry.name
    if not re.fullmatch(re.escape(_prefix()) + "[0-9a-f]{16}", name):
        return False
    try:
        status = entry.stat(follow_symlinks=False)
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and (sys.platform == "win32" or status.st_uid == os.getuid())


def _remove_if_left(path: str) -> bool:
    try:
        lock = system.open_directory(path)
    except OSError:
        return False
    if lock is None:
        return False
    try:
        system.lock(lock, exclusively=True)
        shutil.rmtree(path, ignore_errors=True)
    except OSError:  # somebody's lock, or there are no locks
        return False
    finally:
        os.close(lock)
    return not os.path.exists(path)
