# SPDX-License-Identifier: Apache-2.0
"""Object storage through multi-storage-client, which is imported here: the objects of one checkpoint."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
from typing import Any

from ckpt_fast.errors import StorageError, UnavailableError
from ckpt_fast.storage.objects.errors import ObjectErrors, lacks_bucket
from ckpt_fast.storage.spool import Spool

SCHEME = "msc://"


def as_url(path: str | os.PathLike[str]) -> str:
    """A path as a string; an URL as it was before somebody, as Megatron-Core does, made a Path of it."""
    return re.sub(f"^{SCHEME[:-1]}(?!/)", SCHEME, os.fspath(path))


def import_client() -> Any:
    """The multistorageclient module.

    Raises:
        UnavailableError: it is not installed.
    """
    try:
        return importlib.import_module("multistorageclient")
    except ModuleNotFoundError as error:
        if error.name != "multistorageclient":
            raise
        raise UnavailableError(
            f"a path that begins with {SCHEME} is in object storage: install multi-storage-client"
        ) from error


def client_and_key(msc: Any, path: str) -> tuple[Any, str]:
    """The client of the profile that a path belongs to, and the path's name within it.

    Raises:
        StorageError: the configuration of multi-storage-client has no such profile, or it makes no sense.
    """
    try:
        client, key = msc.resolve_storage_client(path)
    except (ValueError, TypeError, ImportError) as error:
        raise StorageError(f"cannot reach {path}: {error}") from error
    return client, str(key)


class ObjectStore:
    """``Remote`` storage of one checkpoint, through multi-storage-client. Its errors are that package's.

    Args:
        msc: the multistorageclient module.
        path: of the checkpoint.
    """

    def __init__(self, msc: Any, path: str) -> None:
        self._client, key = client_and_key(msc, path)
        self._prefix = (key.strip("/") + "/").lstrip("/")

    def put(self, name: str, path: str) -> None:
        """Create or replace an object by the local file ``path``."""
        self._client.upload_file(self._prefix + name, path)

    def write(self, name: str, content: bytes) -> None:
        """Create or replace an object."""
        self._client.write(self._prefix + name, content)

    def get(self, name: str, path: str) -> None:
        """Copy an object to the local ``path``; FileNotFoundError if there is none in the bucket."""
        try:
            self._client.download_file(self._prefix + name, path)
        except FileNotFoundError as error:
            if lacks_bucket(error):
                raise StorageError("the bucket does not exist") from error
            raise

    def delete(self, name: str) -> None:
        """Remove an object; nothing if there is none."""
        with contextlib.suppress(FileNotFoundError):
            self._client.delete(self._prefix + name)

    def sizes(self) -> dict[str, int]:
        """Name to length of every object of the checkpoint."""
        objects = self._client.list(path=self._prefix)
        return {each.key.lstrip("/").removeprefix(self._prefix): each.content_length for each in objects}


def object_files(msc: Any, path: str) -> Spool:
    """The files of a checkpoint in object storage; the caller closes them.

    Args:
        msc: the multistorageclient module.
        path: of the checkpoint.

    Raises:
        StorageError: see ``client_and_key``.
    """
    return Spool(path, ObjectStore(msc, path), ObjectErrors())
