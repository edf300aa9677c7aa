# SPDX-License-Identifier: Apache-2.0
"""A checkpoint on a file system, as retention sees it: each fact is looked up when asked for."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from ckpt_fast import system
from ckpt_fast.errors import CheckpointError
from ckpt_fast.format.manifest import Head, head_of
from ckpt_fast.format.names import METADATA_FILE
from ckpt_fast.pipeline.load.complete import require_complete
from ckpt_fast.pipeline.load.opened import OpenCheckpoint
from ckpt_fast.retention.line import Line, Noted, metrics_in, noted_in, resumed_from_in
from ckpt_fast.storage import owners
from ckpt_fast.storage.files import Directory


class Stored:
    """One checkpoint, as it is when this is made; see ``StoredCheckpoint``.

    Args:
        iteration: the training step.
        path: its directory.

    Attributes:
        is_compared: whether its line is compared with that of the selected one; otherwise it counts.
    """

    is_compared = True

    def __init__(self, iteration: int, path: str) -> None:
        self.iteration = iteration
        self.path = path
        # Before any fact is looked up: whatever is saved there from now on is another checkpoint.
        self._newest_save, self._version = owners.newest_save(path), _version(path)
        self._is_occupied = owners.is_occupied(path)

    @contextlib.contextmanager
    def removing(self) -> Iterator[bool]:
        """Local. A block that may delete it: saves of this process to its directory wait for the end.

        Yields:
            Whether it may; not if something has been saved there in the meantime, or is being saved.
        """
        with owners.removing(self.path) as is_free:
            is_same = not self._is_occupied and self._newest_save == owners.newest_save(self.path)
            yield is_free and is_same and self._version == _version(self.path)

    @cached_property
    def notes(self) -> Mapping[str, Any]:
        """What its save has noted; read without verification, empty if there is nothing to read."""
        head = head_at(self.path)
        return head.notes if head is not None else {}

    @property
    def line(self) -> Line | None:
        """The line that it notes."""
        return self.noted.line

    @property
    def noted(self) -> Noted:
        """What it notes of its place among others."""
        return noted_in(self.notes, self.iteration)

    @property
    def resumed_from(self) -> int | None:
        """The iteration that its run was resumed from."""
        return resumed_from_in(self.notes)

    @property
    def metrics(self) -> dict[str, float]:
        """What was saved with it, by name."""
        return metrics_in(self.notes)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of its files."""
        return nbytes_below(self.path)

    @cached_property
    def age_s(self) -> float | None:
        """Seconds since it was completed."""
        return age_of(self.path)

    @cached_property
    def is_sealed(self) -> bool:
        """Whether its save has come to its end."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.stat(os.path.join(self.path, METADATA_FILE))
            return True
        return False

    @cached_property
    def damage(self) -> str | None:
        """Why it is not whole, as far as names, lengths and small files say; None if it is.

        An OSError says nothing about it, and is raised.
        """
        if not self.is_sealed:
            return f"{self.path} has no {METADATA_FILE}"
        try:
            with OpenCheckpoint(Directory(self.path)) as checkpoint:
                require_complete(checkpoint)
        except CheckpointError as error:
            return str(error)
        return None

    @cached_property
    def is_whole(self) -> bool:
        """Whether it is whole; see ``damage``."""
        return self.damage is None


def _version(path: str) -> tuple[int, ...] | None:
    """What differs if a checkpoint on a file system is replaced, or written to before it has a seal."""
    for name in (METADATA_FILE, ""):
        with contextlib.suppress(OSError):
            found = os.stat(os.path.join(path, name))
            return found.st_dev, found.st_ino, found.st_mtime_ns
    return None


def head_at(path: str) -> Head | None:
    """The head of the manifest of a checkpoint on a file system, from its last bytes; None if it has none.

    Raises:
        OSError: it cannot be read, which says nothing about it.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        flags = os.O_RDONLY | system.open_flags("O_CLOEXEC", "O_NONBLOCK", "O_BINARY")
        with open(os.open(os.path.join(path, METADATA_FILE), flags), "rb", buffering=0) as file:

            def read(offset: int, nbytes: int) -> bytes:
                file.seek(offset)
                return file.read(nbytes)

            return head_of(read, os.fstat(file.fileno()).st_size)
    return None


def nbytes_below(path: str) -> int:
    """Bytes of all files below a directory."""
    nbytes = 0
    for parent, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                nbytes += os.lstat(os.path.join(parent, name)).st_size
    return nbytes


def age_of(path: str) -> float | None:
    """Seconds since a checkpoint on a file system was completed; of what is none, since it was changed."""
    for name in (METADATA_FILE, ""):
        with contextlib.suppress(OSError):
            return max(0.0, time.time() - os.stat(os.path.join(path, name)).st_mtime)
    return None


def unchanged_s(path: str) -> float:
    """Seconds since anything in a directory was changed, by the clock of its file system."""
    newest = 0.0
    for parent, _, names in os.walk(path):
        for name in ("", *names):
            with contextlib.suppress(OSError):
                newest = max(newest, os.lstat(os.path.join(parent, name)).st_mtime)
    return max(0.0, _now_at(os.path.dirname(path) or ".") - newest)


def _now_at(directory: str) -> float:
    """The time by the clock that dates the files of a directory: on a network, that of the server.

    A node whose clock is ahead would take a save in the making for one that died long ago.
    """
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=directory, prefix=".ckpt_fast-") as file:
        return os.fstat(file.fileno()).st_mtime
    return time.time()
