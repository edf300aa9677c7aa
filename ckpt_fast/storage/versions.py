# SPDX-License-Identifier: Apache-2.0
"""Versions: does a file stay what it was while a load reads it?"""

from __future__ import annotations

import os
from collections.abc import Iterable

from ckpt_fast.errors import CheckpointCorruptError


class FileVersions:
    """Versions of a checkpoint's files from before anything was read from them.

    Another save changes the inode, length or modification time, whether it writes in place, replaces files or
    renames directories.

    Args:
        directory: the checkpoint.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._noted: dict[str, tuple[int, ...]] = {}

    def note(self, names: Iterable[str]) -> None:
        """To be called before the files are read. Nothing for those noted before, or not there."""
        for name in dict.fromkeys(names):
            if name not in self._noted and (version := self._version(name)) is not None:
                self._noted[name] = version

    def require_unchanged(self) -> None:
        """To be called when all is read.

        Raises:
            CheckpointCorruptError: a file that was noted is another one, or gone.
        """
        for name, version in self._noted.items():
            if self._version(name) != version:
                raise CheckpointCorruptError(
                    f"{self._directory} was replaced or removed while it was being read ({name} is no longer "
                    "what it was), so that the values may be of two saves. Load again, from a directory that "
                    "nobody saves to."
                )

    def _version(self, name: str) -> tuple[int, ...] | None:
        try:
            status = os.stat(os.path.join(self._directory, name))
        except OSError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns
