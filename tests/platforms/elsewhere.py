# SPDX-License-Identifier: Apache-2.0
"""Makes this process what it would be on another system: without what that system lacks, and with its rules.

python -m tests.platforms.elsewhere darwin|win32 DIRECTORY

runs every function of ``tests.platforms.uses`` in a directory of its own, and prints its name if it works.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import fcntl
import io
import mmap
import os
import shutil
import sys
from collections import namedtuple
from types import SimpleNamespace
from typing import Any, NoReturn

# Before anything is taken away: what torch and others import is for them to sort out.
import click
import numpy as np
import rich.console
import rich.progress
import rich.table
import torch
import torch.distributed.checkpoint as dcp
import yaml

from tests.platforms.here import run_all

LIBRARIES = (click, np, rich.console, rich.progress, rich.table, torch, dcp, yaml)

OF_LINUX = {
    "os": "O_DIRECT O_NOATIME O_PATH O_TMPFILE copy_file_range eventfd fdatasync memfd_create pidfd_open "
    "posix_fadvise posix_fallocate preadv pwritev sched_getaffinity sched_setaffinity sendfile splice",
    "errno": "EUCLEAN",
    "mmap": "MADV_HUGEPAGE MADV_DONTFORK MADV_WIPEONFORK",
}
OF_POSIX = {
    "os": "O_ASYNC O_CLOEXEC O_DIRECTORY O_DSYNC O_NDELAY O_NOCTTY O_NOFOLLOW O_NONBLOCK O_RSYNC O_SYNC "
    "chown chroot fchown fork forkpty fstatvfs getegid geteuid getgid getgroups getloadavg getpgid getpgrp "
    "getpriority getuid killpg lchown lockf major mkfifo mknod nice openpty posix_spawn pread pwrite readv "
    "register_at_fork sched_yield setsid statvfs sync sysconf sysconf_names ttyname uname wait wait3 wait4 "
    "waitid writev",
    "errno": "ENOTSUP",
    "mmap": "MAP_ANON MAP_ANONYMOUS MAP_PRIVATE MAP_SHARED PROT_READ PROT_WRITE",
}
MODULES_OF_POSIX = ("fcntl", "grp", "pty", "pwd", "resource", "termios")
HIDDEN = ("/proc", "/sys", "/dev/shm")
DiskUsage = namedtuple("DiskUsage", "total used free")


class Windows:
    """What calls of ``os`` do otherwise on Windows."""

    def __init__(self) -> None:
        self._os = {name: getattr(os, name) for name in dir(os)}
        self._fcntl, self._getfl = fcntl.fcntl, fcntl.F_GETFL
        self._directory_flag = os.O_DIRECTORY

    def install(self) -> None:
        for name in ("open", "fsync", "kill", "rename", "replace", "unlink", "remove", "rmdir"):
            setattr(os, name, getattr(self, name))
        shutil.disk_usage = self.disk_usage  # type: ignore[assignment]
        shutil._use_fd_functions = False  # type: ignore[attr-defined]
        # Since Python 3.12, shutil.which asks the system whether programs are looked for here first.
        shutil._winapi = SimpleNamespace(  # type: ignore[attr-defined]
            NeedCurrentDirectoryForExePath=self.needs_current_directory
        )

    def open(self, path: Any, flags: int, mode: int = 0o777, **more: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "directories cannot be opened", path)
        descriptor: int = self._os["open"](path, flags, mode, **more)
        return descriptor

    def fsync(self, descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        if self._fcntl(number, self._getfl) & 3 == os.O_RDONLY:
            raise OSError(errno.EBADF, "it is not open for writing")
        self._os["fsync"](descriptor)

    def kill(self, process: int, number: int) -> NoReturn:
        raise AssertionError(f"signal {number} to {process}: this would be a Ctrl-C, or kill it")

    def rename(self, source: Any, target: Any) -> None:
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "rename replaces nothing", target)
        self._require_closed(source)
        self._os["rename"](source, target)

    def replace(self, source: Any, target: Any) -> None:
        if os.path.isdir(target):
            raise PermissionError(errno.EACCES, "directories are not replaced", target)
        for path in (source, target):
            self._require_closed(path)
        self._os["replace"](source, target)

    def unlink(self, path: Any, **more: Any) -> None:
        self._require_closed(path)
        self._os["unlink"](path, **more)

    remove = unlink

    def rmdir(self, path: Any, **more: Any) -> None:
        self._require_closed(path)
        self._os["rmdir"](path, **more)

    def disk_usage(self, path: Any) -> DiskUsage:
        status = self._os["statvfs"](path)
        sizes = [blocks * status.f_frsize for blocks in (status.f_blocks, status.f_bfree, status.f_bavail)]
        return DiskUsage(sizes[0], sizes[0] - sizes[1], sizes[2])

    def needs_current_directory(self, program: str) -> bool:
        return "\\" in program or "NoDefaultCurrentDirectoryInExePath" not in os.environ

    def _require_closed(self, path: Any) -> None:
        """Neither the file nor one in the directory is open."""
        whole = os.path.realpath(os.fsdecode(path))
        for number in self._os["listdir"]("/proc/self/fd"):
            try:
                opened = self._os["readlink"](f"/proc/self/fd/{number}")
            except OSError:
                continue
            if opened == whole or opened.startswith(whole + os.sep):
                raise PermissionError(errno.EACCES, f"{opened} is open", path)


class WindowsMapping(mmap.mmap):
    """A mapping with the arguments of Windows."""

    def __new__(
        cls, fileno: int, length: int, tagname: str | None = None, access: int = 0, offset: int = 0
    ) -> WindowsMapping:
        return super().__new__(cls, fileno, length, access=access, offset=offset)

    @property
    def madvise(self) -> NoReturn:  # type: ignore[override]
        raise AttributeError("madvise")


def library_of(platform: str) -> type:
    """The C library of another system, by the name under which it is found there."""

    class Library(ctypes.CDLL):
        def __init__(self, name: str | None, **more: Any) -> None:
            if (name is None) == (platform == "win32"):
                raise TypeError(f"{name} is no library here")
            super().__init__(None, **more)

        def __getattr__(self, name: str) -> Any:
            if name == "renameat2" or (platform == "win32" and name not in ("memcmp", "memcpy")):
                raise AttributeError(name)
            return super().__getattr__(name)

    return Library


def hide_file_systems_of_linux() -> None:
    real = builtins.open

    def opened(file: Any, *arguments: Any, **more: Any) -> Any:
        if isinstance(file, (str, os.PathLike)) and str(file).startswith(HIDDEN):
            raise FileNotFoundError(errno.ENOENT, "this is not Linux", str(file))
        return real(file, *arguments, **more)

    builtins.open = io.open = opened
    exists = os.access
    os.access = lambda path, *more, **named: not str(path).startswith(HIDDEN) and exists(path, *more, **named)


def become(platform: str) -> None:
    """From here on this process is on another system. ckpt_fast has not been imported."""
    assert not any(name.split(".")[0] == "ckpt_fast" for name in sys.modules)
    windows = Windows()
    if platform == "darwin":
        fcntl.F_FULLFSYNC = 51  # unknown to Linux, which refuses it as network file systems do
    missing = [OF_LINUX, OF_POSIX] if platform == "win32" else [OF_LINUX]
    for names in missing:
        for module, listed in names.items():
            for name in listed.split():
                if hasattr(sys.modules[module], name):
                    delattr(sys.modules[module], name)
    hide_file_systems_of_linux()
    ctypes.CDLL = library_of(platform)  # type: ignore[misc]
    if platform == "win32":
        for name in MODULES_OF_POSIX:
            sys.modules[name] = None  # type: ignore[assignment]
        mmap.mmap = WindowsMapping  # type: ignore[misc]
        windows.install()
    # There is no engine for it.
    for name in ("_engine", "_cuda"):
        sys.modules[f"ckpt_fast.native.{name}"] = None  # type: ignore[assignment]
    sys.platform = platform


if __name__ == "__main__":
    become(sys.argv[1])
    sys.exit(run_all(sys.argv[2]))
