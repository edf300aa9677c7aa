# SPDX-License-Identifier: Apache-2.0
"""Where checkpoints of torch DCP's door are: in directories, or as ``msc://`` URLs in object storage."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Sequence
from typing import Any, Protocol

from ckpt_fast.errors import CheckpointWriteError
from ckpt_fast.format.names import SEAL_FILE
from ckpt_fast.format.types import FileRecord
from ckpt_fast.storage import commit
from ckpt_fast.storage.files import Claim, Directory, Files, absolute
from ckpt_fast.storage.objects.client import SCHEME, as_url, import_client, object_files
from ckpt_fast.storage.space import has_room_beside, require_space

logger = logging.getLogger(__name__)

StrPath = str | os.PathLike[str]


def is_object_url(checkpoint_id: StrPath) -> bool:
    """Whether it is an ``msc://`` URL, or the Path that somebody has made of one."""
    return as_url(checkpoint_id).startswith(SCHEME)


def is_served(checkpoint_id: StrPath) -> bool:
    """Whether the door serves this checkpoint: in a directory, or through multi-storage-client."""
    return is_object_url(checkpoint_id) or "://" not in os.fspath(checkpoint_id)


def located(checkpoint_id: StrPath, start: str | None = None) -> str:
    """The absolute path, or the URL; for ``start`` see ``absolute``."""
    return absolute(as_url(checkpoint_id), start)


def torch_path(file_system: Any, checkpoint_id: StrPath) -> Any:
    """What torch's storage objects keep as their ``path``; an URL stays what it is."""
    return as_url(checkpoint_id) if is_object_url(checkpoint_id) else file_system.init_path(checkpoint_id)


def files_of(path: str) -> Files:
    """The files of a checkpoint; the caller closes them.

    Args:
        path: by ``located``.

    Raises:
        UnavailableError: multi-storage-client is needed, and is not installed.
        StorageError: its configuration has no such profile.
    """
    return object_files(import_client(), path) if is_object_url(path) else Directory(path)


class Place(Protocol):
    """What a save asks of the place it goes to. ``rank`` is given by one that saves without the others.

    Attributes:
        files: of the checkpoint.
    """

    @property
    def files(self) -> Files: ...

    def refuse_overwriting(self, seal: str) -> None:
        """Raise CheckpointWriteError if there is a checkpoint; ``seal`` is the file that makes it one."""

    def room(self) -> Claim | None:
        """Local. The room that this rank has, as a claim of nothing; None: the coordinator's is the same."""

    def make_room(self, claims: Sequence[Claim], seal: str, rank: int | None) -> None:
        """Coordinator. Get ready for what all ranks write; CheckpointWriteError if that cannot be."""

    def first_number(self, prefix: str, seal: str) -> int:
        """The number from which on files whose names begin with ``prefix`` can be written."""

    def superseded(self, seal: str, rank: int | None) -> set[str]:
        """The files that the next seal replaces; asked before it is written."""

    def remove(self, names: Collection[str]) -> None:
        """Remove such files; CheckpointWriteError if one cannot be removed."""


def place_of(path: str) -> Place:
    """The place of a save; errors as of ``files_of``."""
    return _ObjectStorage(path) if is_object_url(path) else _Directory(path)


class _Directory:
    """An older checkpoint of torch DCP stays until the seal of the new one replaces its own."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.files = Directory(path)

    def refuse_overwriting(self, seal: str) -> None:
        commit.refuse_overwriting(self._path, seal)

    def room(self) -> Claim | None:
        return None

    def make_room(self, claims: Sequence[Claim], seal: str, rank: int | None) -> None:
        nbytes = sum(claim.nbytes for claim in claims)
        can_stay = self._can_stay(seal)
        if can_stay and has_room_beside(self._path, nbytes):
            commit.remove_partial_files(self._path, rank)
            return
        require_space(self._path, nbytes)
        if can_stay:
            logger.warning(
                "%s is overwritten: the checkpoint in it ends now, and until this save is whole there is "
                "none. There is no room for both.",
                self._path,
            )
        commit.invalidate(self._path, rank=rank)

    def first_number(self, prefix: str, seal: str) -> int:
        return commit.first_free_number(self._path, prefix, seal)

    def superseded(self, seal: str, rank: int | None) -> set[str]:
        return commit.superseded(self._path, seal, rank)

    def remove(self, names: Collection[str]) -> None:
        commit.remove_files(self._path, names)

    def _can_stay(self, seal: str) -> bool:
        """Whether there is an older checkpoint that is replaced by the new seal alone."""
        try:
            names = os.listdir(self._path)
        except OSError:
            return False
        return seal in names and SEAL_FILE not in names


class _ObjectStorage:
    """An older checkpoint ends before anything is written."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.files = object_files(import_client(), path)

    def refuse_overwriting(self, seal: str) -> None:
        if seal in self.files.names():
            raise commit.not_overwritten(self._path)

    def room(self) -> Claim | None:
        return self.files.room()

    def make_room(self, claims: Sequence[Claim], seal: str, rank: int | None) -> None:
        self.files.require_space(claims)
        self.files.invalidate(rank)

    def first_number(self, prefix: str, seal: str) -> int:
        return 0

    def superseded(self, seal: str, rank: int | None) -> set[str]:
        return set()

    def remove(self, names: Collection[str]) -> None:
        self.files.delete(names)


def require_own(files: Files, written: Collection[FileRecord]) -> None:
    """Check that files of this save are there: another process that saves there may have removed them."""
    for file, _ in files.missing(list(written)):
        raise CheckpointWriteError(
            f"{os.path.join(files.name, file.path)} was written by this save, but is gone or of another: "
            "something else saves to the same directory. This checkpoint was not published; let one "
            "process, or the ranks of one job, save there.",
            filename=files.name,
        )
