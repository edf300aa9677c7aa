# SPDX-License-Identifier: Apache-2.0
"""The commit protocol: when a checkpoint comes into existence, and how files appear completely or not at all.

A directory is a checkpoint once its *seal* exists: ``.metadata`` for torch DCP, ``metadata.json`` on top of
it for Megatron-Core. The order is always

1. ``invalidate``: an older checkpoint in the same directory loses its seal before any of its bytes change;
2. every rank writes and fsyncs its data files;
3. the status of every rank is known to rank 0, which alone goes on, and only if all succeeded;
4. ``write_in_order``: each remaining file is written beside its name, fsynced and renamed, the seal last.

The rename of ``.metadata`` is followed by an fsync of the directory, which covers all names before it, and so
is that of every file that says that others are there. So the order holds after power loss as well.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping

from ckpt_fast import native, settings, system
from ckpt_fast.errors import CheckpointError, CheckpointWriteError
from ckpt_fast.format.manifest import split_manifest
from ckpt_fast.format.names import DATA_SUFFIX, METADATA_FILE, SEAL_FILE, SIDECAR_FILE
from ckpt_fast.storage.small_files import LARGEST_FILE, read_small_file

_PARTIAL_SUFFIX = ".partial"
# A save that has written nothing for so long is dead.
_LONG_S = 3600.0
_RANK_METADATA = re.compile(r"__[0-9]+\.metadata")


@contextlib.contextmanager
def renaming(path: str, progress: native.Progress | None) -> Iterator[None]:
    """A block that gives ``path`` its content. Whoever stops the job before it knows that it will not begin.

    Raises:
        OSError: errno ECANCELED: the job is stopped.
    """
    if progress is None:
        yield
        return
    if not progress.begin_rename():
        raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED), path)
    try:
        yield
    finally:
        progress.end_rename()


def write_file_atomic(
    path: str, data: bytes, progress: native.Progress | None = None, *, sync_name: bool = True
) -> None:
    """Create or replace ``path`` so that a crash leaves the old content or the new, never a mixture.

    Args:
        path: the file; its directory exists.
        data: the whole content.
        progress: of the job that this is a part of.
        sync_name: False where a later file in the directory makes the names durable, before one of them
            counts.

    Raises:
        CheckpointWriteError: with errno and path (ECANCELED once the job is stopped); ``path`` is unchanged
            then, unless only the sync of its directory failed: the text says so.
    """
    directory, name = os.path.split(path)
    temporary = os.path.join(directory, f".{name}.{secrets.token_hex(4)}{_PARTIAL_SUFFIX}")
    state = "The previous content, if any, is untouched"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            fsync(file.fileno())
        with renaming(path, progress):
            os.replace(temporary, path)
        state = "It was replaced, but may not outlive a power failure"
        if sync_name:
            fsync_directory(directory)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if not isinstance(error, OSError):
            raise
        remedy = f"{state}; check the directory's permissions and free space."
        if error.errno == errno.ENOENT and not os.path.isdir(directory):
            remedy = "Its directory was deleted (ckpt-fast prune, or by hand)."
        raise CheckpointWriteError(
            f"cannot write {path}: {error.strerror or error}. {remedy}",
            error.errno,
            path,
        ) from error


def partial_files(directory: str, prefix: str) -> list[str]:
    """Paths of what ``write_file_atomic`` has not finished of the files whose names begin so."""
    names = os.listdir(directory)
    return [
        os.path.join(directory, name)
        for name in names
        if name.startswith(f".{prefix}") and name.endswith(_PARTIAL_SUFFIX)
    ]


def fsync_directory(path: str) -> None:
    """Make the names in a directory durable (a rename is not, until its directory is synced)."""
    if settings.fsync_enabled():
        system.sync_directory(path or ".")


def fsync(descriptor: int) -> None:
    """fsync unless the user has given durability up (``CKPT_FAST_FSYNC=0``)."""
    if settings.fsync_enabled():
        system.sync_file(descriptor)


def invalidate(directory: str, rank: int | None = None, *, sync_names: bool = True) -> None:
    """Empty ``directory`` of an earlier checkpoint's payload, its seal first; create it when missing.

    Only files that a checkpoint payload consists of are removed; foreign files stay.

    Args:
        directory: the checkpoint.
        rank: given by a rank that saves without the others; of the data files it removes just its own.
        sync_names: make the name of a directory that is created durable; else somebody does so later, with
            ``make_directory``.

    Raises:
        CheckpointWriteError: the directory cannot be created or cleaned, or is not one of a file system.
    """
    if "://" in os.fspath(directory):
        raise CheckpointWriteError(
            f"cannot save to {directory}: this is a URL, and is written through multi-storage-client only "
            "(msc://), with ckpt_format='torch_dist' or 'fsdp_dtensor', or FastStorageWriter. Nothing was "
            "saved; install and enable it, or give a path.",
            filename=directory,
        )
    try:
        make_directory(os.path.abspath(directory), sync_names=sync_names)
        names = set(os.listdir(directory))
        for seal in seals_among(names, rank):
            if _unlink(os.path.join(directory, seal)):
                fsync_directory(directory)
        for name in names:
            if is_payload_of(name, rank):
                _unlink(os.path.join(directory, name))
    except OSError as error:
        raise CheckpointWriteError(
            f"cannot prepare the checkpoint directory {directory}: {error.strerror or error} "
            f"({error.filename or directory}). Nothing was saved; check that the path exists, is a directory "
            "and is writable for this user on the rank named above.",
            error.errno,
            error.filename or directory,
        ) from error


def first_free_number(directory: str, prefix: str, seal: str) -> int:
    """Local. The number from which on data files can be added to those of an older checkpoint.

    Args:
        directory: the checkpoint.
        prefix: start of the files' names.
        seal: what makes it a checkpoint; without it no name is taken.
    """
    if not os.path.exists(os.path.join(directory, seal)):
        return 0
    pattern = re.compile(f"{re.escape(prefix)}([0-9]+){re.escape(DATA_SUFFIX)}")
    matches = filter(None, map(pattern.fullmatch, os.listdir(directory)))
    return max((int(match[1]) + 1 for match in matches), default=0)


def remove_partial_files(directory: str, rank: int | None = None) -> None:
    """Remove what saves that have ended did not finish; those of one rank only, if it is given.

    Raises:
        CheckpointWriteError: one cannot be removed.
    """
    prefix = "." if rank is None else f".__{rank}_"
    _remove(directory, lambda name: name.startswith(prefix) and name.endswith(_PARTIAL_SUFFIX))


def superseded(directory: str, seal: str, rank: int | None = None) -> set[str]:
    """The files that the next seal of ``directory`` replaces; determined before it is published.

    These are the files of the checkpoint there, and leftovers of saves that died long before it. Data files
    that it does not name may belong to another process that is saving there now.

    Args:
        directory: the checkpoint.
        seal: the file that makes it one.
        rank: given by a rank that saves without the others; of the files it counts just its own.
    """
    try:
        sealed = os.stat(os.path.join(directory, seal)).st_mtime
        manifest = split_manifest(read_small_file(os.path.join(directory, seal), LARGEST_FILE))[1]
    except (CheckpointError, OSError, ValueError):
        return set()
    named = set(manifest.files) if manifest is not None else set()
    before = sealed - (_LONG_S if manifest is not None else 0.0)
    found = set(seals_among(os.listdir(directory), rank)) - {seal}
    for entry in os.scandir(directory):
        if is_payload(entry.name) and (rank is None or entry.name.startswith(f"__{rank}_")):
            with contextlib.suppress(FileNotFoundError):
                if entry.name in named or entry.stat().st_mtime <= before:
                    found.add(entry.name)
    return found


def remove_files(directory: str, names: Collection[str]) -> None:
    """Remove files of a directory, ignoring those that do not exist.

    Raises:
        CheckpointWriteError: one cannot be removed.
    """
    _remove(directory, lambda name: name in names)


def _remove(directory: str, is_wanted: Callable[[str], bool]) -> None:
    try:
        for name in os.listdir(directory):
            if is_wanted(name):
                _unlink(os.path.join(directory, name))
    except OSError as error:
        raise CheckpointWriteError(
            f"cannot remove what was left in {directory}: {error.strerror or error} "
            f"({error.filename or directory}). See that this user may, on the rank named above.",
            error.errno,
            error.filename or directory,
        ) from error


def seals_among(names: Collection[str], rank: int | None = None) -> list[str]:
    """Those of ``names`` that make a directory a checkpoint, in the order in which they must be deleted.

    Args:
        names: files of a directory.
        rank: given by a rank that saves without the others; of their metadata it takes just its own.
    """
    if rank is None:
        ranks = sorted(name for name in names if _RANK_METADATA.fullmatch(name))
    else:
        ranks = [rank_metadata_file(rank)]
    return [name for name in (SEAL_FILE, METADATA_FILE, *ranks, SIDECAR_FILE) if name in names]


def is_payload(name: str) -> bool:
    """Whether a file of this name is one that a checkpoint consists of, seals and metadata aside."""
    return name.endswith((DATA_SUFFIX, _PARTIAL_SUFFIX)) or name == "common.pt"


def is_payload_of(name: str, rank: int | None) -> bool:
    """``is_payload``; with a rank that saves without the others, whether it is that rank's."""
    return is_payload(name) and (rank is None or name.startswith((f"__{rank}_", f".__{rank}_")))


def rank_metadata_file(rank: int) -> str:
    """The metadata of a rank that saves without the others, as torch DCP names it."""
    return f"__{rank}{METADATA_FILE}"


def _unlink(path: str) -> bool:
    """Remove a file, unless another rank just did."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True


# Directories whose names, with all above them, this process has made durable. Not of a run's whole life: what
# is not known is synced again.
_durable: set[str] = set()
_MOST_DURABLE = 1000


def make_directory(path: str, *, sync_names: bool = True) -> None:
    """Create a directory, and those above it that are missing, so that they outlive a power failure.

    So do those that were there: the program may have made them, or a save that ended before it synced them.

    Args:
        path: the directory.
        sync_names: without it, what is created may be gone after a power failure.
    """
    if not os.path.isdir(path):
        parent = os.path.dirname(path)
        if not os.path.isdir(parent):
            make_directory(parent, sync_names=sync_names)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path)
        if not os.path.isdir(path):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        _durable.discard(path)  # it was removed, if it was there
    if sync_names:
        _sync_names_above(path)


def sync_names(path: str) -> None:
    """Make the name of a directory durable, and those above it; see ``make_directory``.

    Raises:
        FileNotFoundError: there is no such directory (any more).
    """
    if not os.path.isdir(path):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    _sync_names_above(path)


def _sync_names_above(path: str) -> None:
    """Make the name of a directory durable, and those of all above it in its file system, once."""
    while path not in _durable and not os.path.ismount(path):
        above = os.path.dirname(path)
        try:
            fsync_directory(above)
        except OSError as error:  # of others, and older than this run; or one of a kind that knows no sync
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EINVAL, errno.EROFS):
                raise
        if len(_durable) >= _MOST_DURABLE:
            _durable.clear()
        _durable.add(path)
        path = above


def write_in_order(
    directory: str,
    files: Mapping[str, bytes],
    progress: native.Progress | None = None,
    *,
    sync_names: bool = True,
) -> None:
    """Write ``files`` (name to content) into ``directory`` one after the other; the last one is the seal.

    See ``write_file_atomic``.
    """
    for name, data in files.items():
        write_file_atomic(os.path.join(directory, name), data, progress, sync_name=sync_names)


def refuse_overwriting(directory: str, seal_name: str = METADATA_FILE) -> None:
    """Local. Check that a directory holds no checkpoint.

    Args:
        directory: the checkpoint.
        seal_name: the file that would make it one.

    Raises:
        CheckpointWriteError: it holds one.
    """
    if os.path.exists(os.path.join(directory, seal_name)):
        raise not_overwritten(directory)


def not_overwritten(name: str) -> CheckpointWriteError:
    """The error of a save to a place that holds a checkpoint, and must not lose it."""
    return CheckpointWriteError(
        f"{name} holds a checkpoint and overwrite is False; choose another directory", filename=name
    )
