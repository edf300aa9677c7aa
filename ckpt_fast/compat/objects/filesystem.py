# SPDX-License-Identifier: Apache-2.0
"""The writer and reader of multi-storage-client for torch DCP, over requests that are tried again.

A file is written to a spool and uploaded from there: what torch has serialized can be uploaded twice.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import IO, Any, TypeVar

from ckpt_fast import settings
from ckpt_fast.compat.optional import safe_import
from ckpt_fast.errors import CheckpointWriteError, StorageError
from ckpt_fast.storage.objects.errors import ObjectErrors, lacks_bucket
from ckpt_fast.storage.patience import insist
from ckpt_fast.storage.spool_directory import SpoolDirectory

T = TypeVar("T")

_ERRORS = ObjectErrors()


def object_writer(directory: str) -> tuple[Any, Callable[[Callable[[], bool]], None]]:
    """A storage writer for a checkpoint in object storage; from here on, time runs for the save.

    Returns:
        The writer; and what takes a function that says whether the save is still wanted: once it is not,
        nothing is tried again.
    """
    # What is in the spool need not outlive a power failure.
    writer = _module().MultiStorageFileSystemWriter(directory, sync_files=False)
    writer.fs = files = _file_system()(time.monotonic() + settings.timeout_s())
    return writer, files.ask


def object_reader(directory: str) -> Any:
    """A storage reader for a checkpoint in object storage."""
    reader = _module().MultiStorageFileSystemReader(directory, thread_count=2)
    reader.fs = _file_system()(None)
    return reader


def _module() -> Any:
    return safe_import("multistorageclient.contrib.torch.filesystem")[0]


@cache
def _file_system() -> Any:
    """The class, which is derived from one of a package that may not be installed."""
    base: Any = _module().MultiStorageFileSystem

    class PatientFileSystem(base):  # type: ignore[misc]
        """Paths are multi-storage-client's.

        Args:
            deadline: when the save counts as failed; None: nothing is saved.
        """

        def __init__(self, deadline: float | None) -> None:
            super().__init__()
            self._deadline = deadline
            self._is_wanted: Callable[[], bool] = lambda: True

        def ask(self, is_wanted: Callable[[], bool]) -> None:
            self._is_wanted = is_wanted

        @contextlib.contextmanager
        def create_stream(self, path: Any, mode: str) -> Iterator[IO[bytes]]:
            if mode != "wb":
                with self._asked(f"read {path}", partial(_open, path, mode)) as stream:
                    yield stream
                return
            spool = SpoolDirectory(settings.spool_directory() or tempfile.gettempdir())
            try:
                local = os.path.join(spool.create(), os.path.basename(str(path)))
                with open(local, "wb") as file:
                    yield file
                self._written(f"upload {path}", path, partial(_upload, path, local))
            finally:
                spool.remove()

        def exists(self, path: Any) -> bool:
            return bool(self._asked(f"look for {path}", partial(super().exists, path)))

        def ls(self, path: Any) -> list[str]:
            return list(self._asked(f"list {path}", partial(super().ls, path)))

        def rm_file(self, path: Any) -> None:
            self._written(f"delete {path}", path, partial(_unlink, path))

        def rename(self, path: Any, new_path: Any) -> None:
            self._written(f"write {new_path}", new_path, partial(_rename, path, new_path))

        def _insist(self, what: str, request: Callable[[], T]) -> T:
            until = self._deadline or time.monotonic() + settings.outage_s()
            return insist(what, request, _ERRORS, until, self._is_wanted)

        def _asked(self, what: str, request: Callable[[], T]) -> T:
            try:
                return self._insist(what, request)
            except Exception as error:
                if isinstance(error, FileNotFoundError) and not lacks_bucket(error):
                    raise
                raise StorageError(
                    f"cannot {what}: {_ERRORS.cause_of(error)}. That says nothing about the checkpoint: look "
                    "at the storage, and load again."
                ) from error

        def _written(self, what: str, path: Any, request: Callable[[], object]) -> None:
            try:
                self._insist(what, request)
            except Exception as error:
                raise CheckpointWriteError(
                    f"cannot {what}: {_ERRORS.cause_of(error)}. The checkpoint was not published; those "
                    "under other names are untouched. See that the storage can be reached and written to "
                    "with the credentials of its profile on this rank, then save again.",
                    getattr(error, "errno", None),
                    str(path),
                ) from error

    return PatientFileSystem


def _client_and_key(path: Any) -> tuple[Any, str]:
    client, key = safe_import("multistorageclient")[0].resolve_storage_client(str(path))
    return client, str(key)


def _open(path: Any, mode: str) -> Any:
    client, key = _client_and_key(path)
    stream = client.open(key, mode=mode, prefetch_file=True)
    try:
        stream.seekable()  # waits for the download, and raises its error
    except BaseException:
        stream.close()
        raise
    return stream


def _upload(path: Any, local: str) -> None:
    client, key = _client_and_key(path)
    client.upload_file(key, local)


def _unlink(path: Any) -> None:
    client, key = _client_and_key(path)
    with contextlib.suppress(FileNotFoundError):
        client.delete(key)


def _rename(path: Any, new_path: Any) -> None:
    """Give an object another name; it may have it already, if that was tried before."""
    client, key = _client_and_key(path)
    _, new_key = _client_and_key(new_path)
    try:
        client.copy(key, new_key)
        client.delete(key)
    except FileNotFoundError as error:
        if lacks_bucket(error) or client.info(new_key) is None:
            raise
