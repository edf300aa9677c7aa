# SPDX-License-Identifier: Apache-2.0
"""What operating systems differ in, behind functions that are the same on all of them.

Training runs on Linux. On macOS and Windows, checkpoints are looked at, converted, loaded and saved with the
engine's Python twin.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import shutil
import sys
from functools import cache

if sys.platform != "win32":
    import fcntl
    import resource

_MADV_WIPEONFORK = 18  # of Linux; Python has no name for it


def open_flags(*names: str) -> int:
    """Those of the named flags of ``os.open`` that this system has, and the one for unchanged line ends."""
    flags = 0
    for name in (*names, "O_BINARY"):
        flags |= getattr(os, name, 0)
    return flags


def error_numbers(*names: str) -> tuple[int, ...]:
    """The numbers of the named errors that this system has."""
    return tuple(getattr(errno, name) for name in names if hasattr(errno, name))


def sync_file(descriptor: int) -> None:
    """Make what was written to a file durable. On Windows the descriptor must be open for writing."""
    if sys.platform == "darwin":
        # There, fsync leaves the bytes in the cache of the drive.
        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.EINVAL, errno.ENOTTY):
                raise
    os.fsync(descriptor)


def open_directory(path: str) -> int | None:
    """A descriptor of a directory, no link to one; None on Windows, which opens none."""
    descriptor = None
    if sys.platform != "win32":
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    return descriptor


def lock(descriptor: int, *, exclusively: bool) -> None:
    """Lock a directory until its descriptor is closed, however that comes about.

    Exclusively without waiting; shared after waiting for whoever has it exclusively, which is for a moment.

    Raises:
        OSError: it is locked, or there are no locks.
    """
    if sys.platform != "win32":
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB if exclusively else fcntl.LOCK_SH)


def sync_directory(path: str) -> None:
    """Make the names in a directory durable. Windows has no call for that: nothing happens there."""
    if sys.platform != "win32":
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            sync_file(descriptor)
        finally:
            os.close(descriptor)


def disk_space(path: str) -> tuple[int, int]:
    """(free, total) bytes of a file system, as this user may use them; (0, 0) if it has no size.

    Raises:
        OSError: it cannot be asked.
    """
    if sys.platform == "win32":
        usage = shutil.disk_usage(path)
        free, total = usage.free, usage.total
    else:
        status = os.statvfs(path)
        free, total = status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize
    return free, total


def give_group_of(path: str, model: str) -> None:
    """Let a file belong to the group of another, where files have groups and this user may."""
    if sys.platform != "win32":
        with contextlib.suppress(OSError):
            os.chown(path, -1, os.stat(model).st_gid)


def anonymous_memory(nbytes: int) -> mmap.mmap:
    """Zeroed memory of this process alone: huge pages if there are any, and no copy for forked processes.

    A data loader's worker, forked while it exists, gets zeros instead of sharing the pages. Sharing would
    cost the next snapshot a copy of every page, and the memory twice as long as the worker lives.

    Raises:
        OSError: there is none.
    """
    if sys.platform == "win32":
        mapping = mmap.mmap(-1, nbytes)
    else:
        mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        for advice in (_MADV_WIPEONFORK, mmap.MADV_HUGEPAGE):
            # Kernels without huge pages, or older than the advice, refuse it: then it is not to be had.
            with contextlib.suppress(OSError):
                mapping.madvise(advice)
    return mapping


@cache
def c_library() -> ctypes.CDLL:
    """The C library; it sets ``ctypes.get_errno()``. Functions that it does not have are AttributeErrors."""
    return ctypes.CDLL("msvcrt" if sys.platform == "win32" else None, use_errno=True)


def usable_cores() -> int:
    """The number of cores that this process may use."""
    cores = os.cpu_count() or 1
    if sys.platform == "linux":
        cores = len(os.sched_getaffinity(0))
    return cores


def memory_nbytes() -> int | None:
    """The bytes of memory that the machine has; None if that is not known."""
    if sys.platform != "win32":
        with contextlib.suppress(OSError, ValueError):
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def soft_limit(name: str) -> int | None:
    """This process's soft limit of a resource, such as "RLIMIT_NOFILE"; None if there is none."""
    limit = None
    if sys.platform != "win32":
        soft, _ = resource.getrlimit(getattr(resource, name))
        limit = None if soft == resource.RLIM_INFINITY else soft
    return limit
