# SPDX-License-Identifier: Apache-2.0
"""Storage for the files of one checkpoint: a directory, or (``spool``) a store of whole objects.

The engine reads and writes local files. ``Files`` is what the rest of a save or load asks of the place that
these files belong to.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import NamedTuple, Protocol

from ckpt_fast import native
from ckpt_fast.errors import CheckpointWriteError
from ckpt_fast.format.types import FileRecord
from ckpt_fast.storage import commit, replacement
from ckpt_fast.storage.small_files import LARGEST_FILE, read_small_file
from ckpt_fast.storage.space import has_room_beside, require_space

logger = logging.getLogger(__name__)


class Claim(NamedTuple):
    """The space one rank needs: bytes to write, which machine's file system, and free space if known."""

    nbytes: int
    file_system: str = ""
    free: int | None = None


class Files(Protocol):
    """The files of one checkpoint, by their names in it. As a context it is closed at the end."""

    # The checkpoint's name in messages.
    name: str
    # Whether what is in ``directory`` must outlive a power failure.
    durable: bool

    @property
    def directory(self) -> str:
        """The local directory in which the engine writes, and in which it reads what was fetched."""

    def claim(self, nbytes: int) -> Claim:
        """Local. Get ready to write; what this rank wants of which file system."""

    def prepare(self, claims: Sequence[Claim], *, replace: bool) -> str | None:
        """Coordinator. Look whether there is room for all, and make it.

        Args:
            claims: of all ranks.
            replace: let an older checkpoint in the same place be one until ``take_place``, if that can be.

        Returns:
            For ``write_to``: where all ranks are to write meanwhile. None: an older one is invalidated.
        """

    def sync_names(self) -> None:
        """Coordinator. What ``prepare`` has created outlives a power failure from now on."""

    def write_to(self, place: str) -> None:
        """Local. What ``prepare`` has returned to the coordinator."""

    def take_place(self) -> None:
        """Coordinator. The files are a checkpoint: they replace the older one that ``prepare`` has kept."""

    def withdraw(self) -> None:
        """Coordinator. They will not be one: what ``prepare`` has made for them goes."""

    def hand_over(self, files: Sequence[FileRecord], go_on: Callable[[], bool]) -> None:
        """Local. Bring what the engine has written to where it belongs; stop soon if ``go_on`` says no."""

    def write_in_order(
        self,
        files: Mapping[str, bytes],
        progress: native.Progress | None = None,
        *,
        sync_names: bool = True,
    ) -> None:
        """Write ``files`` (name to content) one after the other, each whole or not at all.

        Once the job that ``progress`` is of is stopped, nothing appears any more. ``sync_names`` is False for
        what a seal follows.
        """

    def delete(self, names: Iterable[str]) -> None:
        """Remove files, ignoring missing ones; OSError if one cannot be removed."""

    def fetch(self, names: Iterable[str]) -> None:
        """Local. Have these files in ``directory``, if there are such."""

    def read(self, name: str, limit: int = LARGEST_FILE) -> bytes:
        """Local. The content of a small file; errors as of ``read_small_file``."""

    def missing(self, files: Sequence[FileRecord]) -> list[tuple[FileRecord, int | None]]:
        """The files that are missing (None), or have another length (that length)."""

    def require_kept(self, files: Sequence[FileRecord]) -> None:
        """Nobody has deleted these files since they were written, as far as telling costs next to nothing."""

    def named(self) -> AbstractContextManager[None]:
        """A block whose errors name the checkpoint, wherever ``directory`` is."""

    def close(self) -> None:
        """Nothing is asked any more. May be called again."""

    def __enter__(self) -> Files:
        """The files."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """``close``."""


def absolute(path: str | os.PathLike[str], start: str | None = None) -> str:
    """A path that keeps its meaning if the program changes its directory; an URL stays as it is.

    ``..`` stays too: it may lead out of a link.

    Args:
        path: absolute, or relative to ``start``.
        start: an absolute path; None: the current directory.

    Raises:
        FileNotFoundError: the current directory has been deleted.
    """
    name = os.fspath(path)
    if "://" in name or os.path.isabs(name):
        return name
    try:
        return os.path.join(start or os.getcwd(), name)
    except FileNotFoundError as error:
        text = "the path is relative, and the current directory has been deleted"
        raise FileNotFoundError(error.errno, text, name) from error


def require_named(path: str | os.PathLike[str]) -> None:
    """Nothing, unless a path to save to is empty, as that of a variable which is not set.

    Raises:
        CheckpointWriteError: it is; that would be the current directory.
    """
    if not os.fspath(path):
        raise CheckpointWriteError(
            "the path to save to is empty; nothing was saved. Give a directory: '.' is the current one."
        )


class Directory:
    """Files of a file system, where the engine's own are the checkpoint's.

    Args:
        path: the checkpoint; need not exist.

    Attributes:
        directory: the same; while an older checkpoint there is being replaced, one beside it.
    """

    durable = True

    def __init__(self, path: str) -> None:
        self.name = self.directory = path

    def claim(self, nbytes: int) -> Claim:
        """The space that this rank needs."""
        return Claim(nbytes)

    def prepare(self, claims: Sequence[Claim], *, replace: bool) -> str | None:
        """See ``replacement.begin``; otherwise ``require_space`` and ``commit.invalidate``.

        Raises:
            CheckpointWriteError: there is no room, or the directory cannot be prepared.
        """
        nbytes = sum(claim.nbytes for claim in claims)
        why_not = None
        if self._is_checkpoint():
            replacement.sweep(self.name)
            if replace:
                why_not = "There is no room for both"
                if has_room_beside(self.name, nbytes):
                    place = replacement.begin(self.name)
                    if place is not None:
                        return place
                    why_not = "Nothing can be put beside it"
        require_space(self.name, nbytes)
        if why_not is not None:
            logger.warning(
                "%s is overwritten: the checkpoint in it ends now, and until this save is whole there is "
                "none. %s.",
                self.name,
                why_not,
            )
        # A sync waits for whatever else is being written, and training would wait with it.
        commit.invalidate(self.name, sync_names=False)
        return None

    def sync_names(self) -> None:
        """Make the name of the directory that ``prepare`` may have created durable.

        Raises:
            CheckpointWriteError: it cannot be done, or somebody has deleted the directory.
        """
        if self.directory != self.name:  # created beside an older one, and synced then
            return
        try:
            commit.sync_names(os.path.abspath(self.directory))
        except FileNotFoundError as error:
            raise CheckpointWriteError(
                f"{self.name} was deleted while it was being written (ckpt-fast prune, or by hand). The "
                "checkpoint was not published; those under other names are untouched.",
                error.errno,
                self.name,
            ) from error
        except OSError as error:
            raise CheckpointWriteError(
                f"cannot make the directory {self.directory} durable: {error.strerror or error} "
                f"({error.filename}). The checkpoint was not published.",
                error.errno,
                error.filename or self.directory,
            ) from error

    def write_to(self, place: str) -> None:
        """``directory`` is ``place`` from now on."""
        self.directory = place

    def take_place(self) -> None:
        """See ``replacement.exchange``.

        Raises:
            CheckpointWriteError: the older checkpoint is where it was.
        """
        place, self.directory = self.directory, self.name
        if place != self.name:
            replacement.exchange(place, self.name)

    def withdraw(self) -> None:
        """Remove what lies beside the checkpoint."""
        place, self.directory = self.directory, self.name
        if place != self.name:
            replacement.discard(place, self.name)

    def _is_checkpoint(self) -> bool:
        with contextlib.suppress(OSError):  # an invalid directory is reported when it is used
            replacement.put_back(self.name)
            seals = commit.seals_among(os.listdir(self.name))
            # A directory of such a name is somebody's, and in the way.
            return bool(seals) and all(os.path.isfile(os.path.join(self.name, seal)) for seal in seals)
        return False

    def hand_over(self, files: Sequence[FileRecord], go_on: Callable[[], bool]) -> None:
        """Nothing: they are where they belong."""

    def write_in_order(
        self,
        files: Mapping[str, bytes],
        progress: native.Progress | None = None,
        *,
        sync_names: bool = True,
    ) -> None:
        """See ``commit.write_in_order``."""
        commit.write_in_order(self.directory, files, progress, sync_names=sync_names)

    def delete(self, names: Iterable[str]) -> None:
        """Remove files, durably.

        Raises:
            OSError: naming the first that cannot be removed.
        """
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self.directory, name))
        commit.fsync_directory(self.directory)

    def fetch(self, names: Iterable[str]) -> None:
        """Nothing: they are there."""

    def read(self, name: str, limit: int = LARGEST_FILE) -> bytes:
        """The content of a small file; errors as of ``read_small_file``."""
        return read_small_file(os.path.join(self.directory, name), limit)

    def missing(self, files: Sequence[FileRecord]) -> list[tuple[FileRecord, int | None]]:
        """The files that do not exist (None), or have another length (that length)."""
        found = ((file, self._nbytes(file.path)) for file in files)
        return [(file, nbytes) for file, nbytes in found if nbytes != file.nbytes]

    def require_kept(self, files: Sequence[FileRecord]) -> None:
        """See ``Files``. It costs a listing of each folder, and no look at a file in it.

        Raises:
            CheckpointWriteError: naming the first file that is gone.
        """
        there: set[str] = set()
        for folder in {os.path.dirname(file.path) for file in files}:
            with contextlib.suppress(FileNotFoundError):
                there.update(os.path.join(folder, name) for name in os.listdir(self._path(folder)))
        for file in files:
            # A network file system may list what was there a moment ago.
            if file.path not in there and self._nbytes(file.path) is None:
                raise CheckpointWriteError(
                    f"{os.path.join(self.name, file.path)} was deleted before the checkpoint was complete "
                    "(ckpt-fast prune, or by hand). The checkpoint was not published; those under other "
                    "names are untouched.",
                    errno.ENOENT,
                    self.name,
                )

    def named(self) -> AbstractContextManager[None]:
        """A block whose errors name the checkpoint, as they do anyway."""
        return contextlib.nullcontext()

    def close(self) -> None:
        """Nothing: the files stay."""

    def __enter__(self) -> Directory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def _nbytes(self, name: str) -> int | None:
        try:
            return os.stat(self._path(name)).st_size
        except FileNotFoundError:
            return None
