# SPDX-License-Identifier: Apache-2.0
"""What lies below a path, on a file system or in object storage, and what of it are checkpoints."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable

from ckpt_fast.errors import CheckpointError, CheckpointNotFoundError, StorageError
from ckpt_fast.format.names import DATA_SUFFIX, METADATA_FILE, SEAL_FILE
from ckpt_fast.storage.files import Directory, Files

COMMON_FILE = "common.pt"
CONFIG_FILE = "run_config.yaml"
TRAIN_STATE_FILE = "train_state.pt"
INTEGRITY_FILE = "integrity.json"

# Of nvidia-resiliency-ext: the local checkpoint of one rank is one file.
LOCAL_FILE = re.compile(r"iter_(?P<iteration>\d+)_(?P<rank>\d+)_local\.pt")
LOCAL_DIRECTORY = re.compile(r"iter_(?P<iteration>\d+)_(?P<rank>\d+)_local")
_ITERATION = re.compile(r"iter_(\d+)")
_RANK_METADATA = re.compile(r"__\d+\.metadata")
# Any of them says that a directory is a checkpoint, or was to become one.
_MARKERS = (METADATA_FILE, SEAL_FILE, COMMON_FILE, CONFIG_FILE, TRAIN_STATE_FILE)


class Tree:
    """The files below a path.

    Args:
        path: a directory, a file or an URL of object storage.

    Attributes:
        path: as given, without a slash at the end.
        sizes: length of each file, by its name relative to the path; "" if the path is a file itself.
        directories: on a file system, the directories below, by their names; empty ones too.

    Raises:
        CheckpointNotFoundError: nothing is there.
        OSError: it cannot be read; a StorageError if that is due to object storage.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        name = os.fspath(path)
        self.path = name if name.strip("/") == "" else name.rstrip("/")
        self.sizes: dict[str, int] = {}
        self.directories: set[str] = set()
        self._is_remote = "://" in name
        if self._is_remote:
            self._list_objects()
        else:
            self._scan()

    def files(self, below: str = "") -> Files:
        """The files of a checkpoint in here; the caller closes them."""
        path = self.join(below)
        if not self._is_remote:
            return Directory(path)
        from ckpt_fast.compat.storage import checkpoint_files

        return checkpoint_files(path)

    def join(self, name: str) -> str:
        """The path of what is in here under a name."""
        return f"{self.path.rstrip('/')}/{name}" if name else self.path

    def within(self, below: str) -> dict[str, int]:
        """``sizes`` of what is in a directory, by names relative to it."""
        prefix = f"{below}/" if below else ""
        return {name[len(prefix) :]: size for name, size in self.sizes.items() if name.startswith(prefix)}

    def _list_objects(self) -> None:
        from ckpt_fast.compat.storage import object_storage
        from ckpt_fast.storage.objects import ObjectStore

        msc = object_storage(self.path)
        if msc is None:
            raise StorageError(f"{self.path} cannot be read: of URLs only those of multi-storage-client can")
        try:
            self.sizes = ObjectStore(msc, self.path).sizes()
        except CheckpointError:
            raise
        except Exception as error:  # those of the storage's client
            raise StorageError(f"cannot list {self.path} ({error}), which says nothing about it") from error
        if not self.sizes:
            raise CheckpointNotFoundError(f"{self.path} does not exist: there are no objects below it")

    def _scan(self) -> None:
        status = os.stat(self.path) if os.path.lexists(self.path) else None
        if status is None:
            raise CheckpointNotFoundError(
                f"{self.path} does not exist; a checkpoint is a directory with {METADATA_FILE}"
            )
        if not stat.S_ISDIR(status.st_mode):
            self.sizes[""] = status.st_size
            return
        seen = {(status.st_dev, status.st_ino)}
        pending = [""]
        while pending:
            below = pending.pop()
            with os.scandir(self.join(below)) as entries:
                for entry in entries:
                    name = f"{below}/{entry.name}" if below else entry.name
                    try:
                        found = entry.stat()
                    except FileNotFoundError:  # a link to nothing, or just removed
                        continue
                    if not stat.S_ISDIR(found.st_mode):
                        self.sizes[name] = found.st_size
                    elif (found.st_dev, found.st_ino) not in seen:
                        seen.add((found.st_dev, found.st_ino))
                        self.directories.add(name)
                        pending.append(name)


def is_checkpoint(names: Iterable[str]) -> bool:
    """Whether files of these names make a directory a checkpoint, whole or not."""
    return any(name in _MARKERS or is_data_file(name) or _RANK_METADATA.fullmatch(name) for name in names)


def is_data_file(name: str) -> bool:
    """Whether a file of this name has items."""
    return name.endswith(DATA_SUFFIX) and "/" not in name


def metadata_names(names: Iterable[str]) -> list[str]:
    """The metadata of a checkpoint: one, or one of each rank if the ranks have saved without each other."""
    own = sorted(name for name in names if _RANK_METADATA.fullmatch(name))
    return [METADATA_FILE] if METADATA_FILE in names or not own else own


def iteration_of(name: str) -> int | None:
    """The number in the name of a directory of one iteration; None if it has another name."""
    match = _ITERATION.fullmatch(os.path.basename(name))
    return int(match[1]) if match else None


def checkpoints_below(tree: Tree) -> list[str]:
    """The names of the checkpoints in a directory that is none itself, and of local files; in order.

    Directories of iterations count even if nothing is in them. What is hidden does not.
    """
    holders: dict[str, list[str]] = {}
    for path in tree.sizes:
        parent, _, name = path.rpartition("/")
        holders.setdefault(parent, []).append(name)
    found = {below for below, names in holders.items() if below and is_checkpoint(names)}
    found |= {below for below in tree.directories if iteration_of(below) is not None}
    found |= {path for path in tree.sizes if LOCAL_FILE.fullmatch(os.path.basename(path))}
    # The states of data loaders are kept by iteration, too, and belong to checkpoints elsewhere.
    visible = {each for each in found if not any(part.startswith(".") for part in each.split("/"))}
    visible = {each for each in visible if "energon" not in each.split("/")[:-1]}
    return sorted(each for each in visible if not any(each.startswith(f"{other}/") for other in visible))
