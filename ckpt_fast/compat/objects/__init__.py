# SPDX-License-Identifier: Apache-2.0
"""Small requests to object storage, by URL: trackers, seals, lists.

Each is tried again while its error may pass, for as long as ``CKPT_FAST_OUTAGE`` says. What fails in the end
is a StorageError, so that an outage is neither taken for damage nor for a checkpoint that is not there; a
CheckpointWriteError if something was to be written.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any, TypeVar

from ckpt_fast import settings
from ckpt_fast.compat.storage import object_storage
from ckpt_fast.errors import CheckpointWriteError, StorageError
from ckpt_fast.storage.objects import as_url, client_and_key
from ckpt_fast.storage.objects.errors import ObjectErrors, lacks_bucket
from ckpt_fast.storage.patience import insist

T = TypeVar("T")

_ERRORS = ObjectErrors()


def kind_of(path: str) -> str | None:
    """ "file" for an object, "directory" for a prefix of objects; None if there is neither.

    Raises:
        StorageError: nobody can tell, or there is no such bucket.
    """
    client, key = _resolve(path)

    def look() -> str | None:
        try:
            return str(client.info(key).type)
        except FileNotFoundError as error:
            if lacks_bucket(error):
                raise
            return None

    return _asked(f"look for {path}", look)


def read(path: str) -> bytes:
    """The content of an object.

    Raises:
        FileNotFoundError: there is none.
        StorageError: it cannot be read, or there is no such bucket.
    """
    client, key = _resolve(path)
    return _asked(f"read {path}", lambda: bytes(client.read(key)))


def names_in(directory: str, pattern: str) -> list[str]:
    """URLs of what matches a glob pattern in a directory.

    Raises:
        StorageError: it cannot be listed, or there is no such bucket.
    """
    msc = object_storage(directory)
    assert msc is not None
    return _asked(f"list {directory}", lambda: [str(each) for each in msc.Path(directory).glob(pattern)])


def write(path: str, content: bytes) -> None:
    """Create or replace an object.

    Raises:
        CheckpointWriteError: it is as it was.
    """
    client, key = _resolve(path)
    _written(f"write {path}", path, lambda: client.write(key, content))


def append(path: str, content: bytes) -> None:
    """Replace an object by one that has more at its end. Nobody else may do so at the same time.

    Raises:
        CheckpointWriteError, StorageError: it is as it was.
    """
    try:
        before = read(path)
    except FileNotFoundError:
        before = b""
    write(path, before + content)


def delete(path: str, *, recursive: bool = False) -> None:
    """Remove an object, or all below a prefix; nothing if there is none.

    Raises:
        CheckpointWriteError: it is there, or parts of it.
    """
    client, key = _resolve(path)

    def remove() -> None:
        with contextlib.suppress(FileNotFoundError):
            client.delete(key, recursive=recursive)

    _written(f"delete {path}", path, remove)


def _resolve(path: str) -> tuple[Any, str]:
    return client_and_key(object_storage(path), as_url(path))


def _asked(what: str, request: Callable[[], T]) -> T:
    try:
        return insist(what, request, _ERRORS, time.monotonic() + settings.outage_s())
    except Exception as error:
        if isinstance(error, FileNotFoundError) and not lacks_bucket(error):
            raise
        raise StorageError(
            f"cannot {what}: {_ERRORS.cause_of(error)}. That says nothing about the checkpoints there. See "
            "that the storage can be reached, and read with the credentials of the profile, on this rank."
        ) from error


def _written(what: str, path: str, request: Callable[[], T]) -> T:
    try:
        return insist(what, request, _ERRORS, time.monotonic() + settings.outage_s())
    except Exception as error:
        raise CheckpointWriteError(
            f"cannot {what}: {_ERRORS.cause_of(error)}. See that the storage can be reached, and written to "
            "with the credentials of the profile, on this rank.",
            getattr(error, "errno", None),
            path,
        ) from error
