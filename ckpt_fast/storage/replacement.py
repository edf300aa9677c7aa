# SPDX-License-Identifier: Apache-2.0
"""A directory that replaces an older one: filled next to it, and exchanged with it once complete.

Beside ``iter_0000005`` that is ``.iter_0000005.<8 hex digits>.ckpt_fast-new``. No reader looks at such names.
After the exchange the older one has that name, until it is removed. Where the file system cannot exchange two
names (network file systems mostly), the older one is renamed to ``.ckpt_fast-old`` first; who finds only this
puts it back. Where a directory cannot be renamed at all, the older one ends, and the files are moved.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import re
import secrets
import shutil
from collections.abc import Collection
from functools import cache
from pathlib import PurePosixPath
from typing import Any

from ckpt_fast import system
from ckpt_fast.errors import CheckpointError, CheckpointWriteError
from ckpt_fast.format.manifest import split_manifest
from ckpt_fast.format.names import METADATA_FILE
from ckpt_fast.storage import owners
from ckpt_fast.storage.commit import fsync_directory, invalidate, is_payload, make_directory, seals_among
from ckpt_fast.storage.small_files import LARGEST_FILE, read_small_file

logger = logging.getLogger(__name__)

_NEW, _OLD = ".ckpt_fast-new", ".ckpt_fast-old"
_BESIDE = re.compile(rf"\.(?P<name>.+)\.(?P<token>[0-9a-f]{{8}})(?P<kind>{_NEW}|{_OLD})")
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# What renameat2 says where the kernel, or the file system, has no exchange.
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)
# What a rename says where a directory cannot be renamed, but the files in it can: in a lower layer of an
# overlay, of another user in a directory with the sticky bit, mounted, in a bucket that is mounted.
_NO_RENAME = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EBUSY, errno.EMFILE, errno.EOPNOTSUPP)
# So often another process may put the older directory back between two renames.
_ATTEMPTS = 5


def begin(directory: str, token: str | None = None) -> str | None:
    """An empty directory next to ``directory``, to be exchanged with it.

    Args:
        directory: need not exist.
        token: that of another directory that is exchanged along with this one.

    Returns:
        None where that cannot be: ``directory`` is a mount point, or this user may not write in it or beside.

    Raises:
        CheckpointWriteError: it cannot be made for another reason.
    """
    real = os.path.realpath(directory)
    if _is_mount_point(real) or (os.path.isdir(real) and not os.access(real, os.W_OK)):
        return None
    path, parent = beside(real, token or secrets.token_hex(4)), os.path.dirname(real)
    try:
        make_directory(parent)
        os.mkdir(path)
        if os.path.isdir(real):
            system.give_group_of(path, real)
            shutil.copymode(real, path)
        # What lies in it may be all that there is of a position whose checkpoint has been exchanged already.
        fsync_directory(parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.rmdir(path)
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return None
        raise CheckpointWriteError(
            f"cannot create {path}: {error.strerror or error}. Nothing was saved; {directory} is as before.",
            error.errno,
            path,
        ) from error
    return path


def beside(directory: str, token: str) -> str:
    """The path that ``begin`` makes of a directory."""
    parent, name = os.path.split(directory)
    return os.path.join(parent, f".{name}.{token}{_NEW}")


def token_of(path: str) -> str | None:
    """The token of a path that ``begin`` created next to a directory; None for other paths."""
    match = _BESIDE.fullmatch(os.path.basename(path))
    return match["token"] if match else None


def exchange(new: str, directory: str) -> None:
    """Durably replace the content of ``directory`` by that of ``new``, and remove the old content.

    Files in it that belong to no checkpoint keep their names. See ``swap``.
    """
    swap(new, directory)
    if os.path.lexists(new):
        discard(new, os.path.realpath(directory))


def swap(new: str, directory: str) -> None:
    """``new`` and ``directory`` change places, durably.

    Where two names cannot be exchanged there is a moment without ``directory``; see ``put_back``. Where
    directories cannot be renamed, what was in ``directory`` is gone.

    Args:
        new: beside ``directory``; its files are durable.
        directory: a path or a link to it; need not exist.

    Raises:
        CheckpointWriteError: it was not exchanged, or that may not outlive a power failure.
    """
    real = os.path.realpath(directory)
    try:
        fsync_directory(new)
        try:
            _exchange(new, real)
        except OSError as error:
            if error.errno not in _NO_RENAME or not os.path.isdir(new) or not os.path.isdir(real):
                raise
            _move_into(real, new, error)
        fsync_directory(os.path.dirname(real))
    except OSError as error:
        raise CheckpointWriteError(
            f"cannot put {new} in the place of {directory}: {error.strerror or error}. One of the two is "
            "what was there; see that both can be renamed by this user on the rank named above, then save "
            "again.",
            error.errno,
            directory,
        ) from error


def discard(left: str, directory: str) -> None:
    """Remove a directory that lies beside ``directory``; what in it is no checkpoint's goes there.

    A failure is logged: it costs disk space only.
    """
    try:
        if not os.path.isdir(left) or os.path.islink(left):
            os.unlink(left)
            return
        names = os.listdir(left)
        # Without a seal it is of a save that did not come to its end.
        if seals_among(names) and os.path.isdir(directory):
            kept = _keep_foreign(left, names, directory)
            if kept:
                logger.warning("%s is not removed: %s in it are of no checkpoint", left, ", ".join(kept))
                return
        shutil.rmtree(left)
    except OSError as error:
        logger.warning("cannot remove %s: %s", left, error)


def put_back(directory: str) -> None:
    """If a crash has left ``directory`` under another name only, give it its own again.

    Raises:
        OSError: that could not be done.
    """
    real = os.path.realpath(directory)
    if os.path.lexists(real):
        return
    for path in _beside(real, _OLD):
        os.rename(path, real)
        fsync_directory(os.path.dirname(real))
        logger.warning("%s was found as %s, where an interrupted save has left it", directory, path)
        return


def sweep(directory: str) -> None:
    """Remove what saves that have ended left beside ``directory``, which is in its place."""
    real = os.path.realpath(directory)
    for path in _beside(real):
        discard(path, real)


def replaced_in(root: str) -> set[str]:
    """The paths in ``root`` beside which something lies that no save of this process is at."""
    matches = filter(None, map(_BESIDE.fullmatch, os.listdir(root)))
    paths = {os.path.join(root, match["name"]) for match in matches}
    return {path for path in paths if not owners.is_occupied(path)}


def try_exchange(one: str, other: str) -> bool:
    """Exchange the names of two directories in one step; returns whether the file system has such a step.

    Raises:
        OSError: they cannot be renamed.
    """
    if _renameat2() is None:
        return False
    paths = os.fsencode(one), os.fsencode(other)
    if _renameat2()(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code not in _NO_EXCHANGE:
        raise OSError(code, os.strerror(code), other)
    return False


def places(directory: str) -> list[str]:
    """``directory``, if it exists, and the directories that replacements left next to it."""
    return [path for path in (directory, *_beside(directory)) if os.path.isdir(path)]


def left_beside(directory: str) -> list[str]:
    """The directories that replacements left next to ``directory``, which need not exist."""
    return _beside(directory)


def _beside(directory: str, *kinds: str) -> list[str]:
    parent, name = os.path.split(os.path.abspath(directory))
    with contextlib.suppress(OSError):
        matches = filter(None, map(_BESIDE.fullmatch, os.listdir(parent)))
        return [
            os.path.join(parent, match[0])
            for match in matches
            if match["name"] == name and match["kind"] in (kinds or (_NEW, _OLD))
        ]
    return []


def _keep_foreign(left: str, names: Collection[str], directory: str) -> list[str]:
    """Bring what is of no checkpoint from ``left`` to ``directory``; returns what could not be brought."""
    recorded, own = _recorded(left), seals_among(names)
    folders = {str(parent) for path in recorded for parent in PurePosixPath(path).parents} - {"."}
    stuck = []
    for parent, inner, files in os.walk(left):
        below = os.path.relpath(parent, left).replace(os.sep, "/")
        prefix = "" if below == "." else f"{below}/"
        for name in [*files, *inner]:
            path, is_top = prefix + name, not prefix
            target = os.path.join(directory, path)
            if path in recorded or path in folders or (is_top and (name in own or is_payload(name))):
                continue
            if os.path.lexists(target):
                continue
            try:
                os.makedirs(os.path.dirname(target), exist_ok=True)
                os.rename(os.path.join(left, path), target)
            except OSError:
                stuck.append(path)
        inner[:] = [name for name in inner if prefix + name in folders]
    fsync_directory(directory)
    return stuck


def _recorded(directory: str) -> set[str]:
    """The files that its manifest, if it has one, counts as the checkpoint's, or as a position beside it."""
    try:
        content = read_small_file(os.path.join(directory, METADATA_FILE), LARGEST_FILE)
        manifest = split_manifest(content)[1]
    except (CheckpointError, OSError, ValueError):
        return set()
    if manifest is None:
        return set()
    return {*manifest.files, *(os.path.basename(path) for path in manifest.beside)}


def _exchange(new: str, directory: str) -> None:
    if not os.path.lexists(directory):
        os.rename(new, directory)
        return
    if try_exchange(new, directory):
        return
    parent, name = os.path.split(directory)
    old = os.path.join(parent, f".{name}.{token_of(new) or secrets.token_hex(4)}{_OLD}")
    for attempt in reversed(range(_ATTEMPTS)):
        os.rename(directory, old)
        try:
            os.rename(new, directory)
            break
        except OSError as error:
            # Whoever found nothing in its place has put the older one back.
            was_put_back = error.errno in (errno.ENOTEMPTY, errno.EEXIST)
            with contextlib.suppress(FileNotFoundError):
                os.rename(old, directory)
            if not attempt or not was_put_back:
                raise
    with contextlib.suppress(OSError):
        os.rename(old, new)


def _move_into(directory: str, new: str, error: OSError) -> None:
    """If directories cannot be exchanged: invalidate the older checkpoint, then move the new files."""
    logger.warning(
        "%s is overwritten: the checkpoint in it ends now, as it cannot be exchanged with %s: %s",
        directory,
        new,
        error.strerror or error,
    )
    invalidate(directory)
    names = os.listdir(new)
    seals = seals_among(names)  # in the order in which they go
    for name in [name for name in names if name not in seals]:
        target = os.path.join(directory, name)
        if os.path.isdir(target) and not os.path.islink(target):
            shutil.rmtree(target)
        os.rename(os.path.join(new, name), target)
    fsync_directory(directory)
    for name in reversed(seals):
        os.rename(os.path.join(new, name), os.path.join(directory, name))
        fsync_directory(directory)


@cache
def _renameat2() -> Any:
    """The function of the C library; None where it has none."""
    return getattr(system.c_library(), "renameat2", None)


def _is_mount_point(path: str) -> bool:
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", "rb") as file:
        escaped = re.sub(rb"[ \t\n\\]", lambda match: b"\\%03o" % match[0][0], os.fsencode(path))
        return any(line.split(b" ", 5)[4] == escaped for line in file)
    return os.path.ismount(path)
