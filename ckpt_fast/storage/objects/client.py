# SPDX-License-Identifier: Apache-2.0
"""Object storage through multi-storage-client, which is used exactly where Megatron-Core would use it.

Where Megatron-Core is not imported, that is for paths that name it: ``msc://profile/...``.
"""

from __future__ import annotations

import contextlib
import os
import re
from typing import Any, Protocol

from ckpt_fast.errors import StorageError, UnavailableError
from ckpt_fast.optional import safe_import
from ckpt_fast.storage.files import Directory, Files
from ckpt_fast.storage.objects.errors import ObjectErrors, lacks_bucket
from ckpt_fast.storage.spool import Spool

SCHEME = "msc://"


class Switch(Protocol):
    """What says whether a program uses multi-storage-client."""

    def enable(self) -> None: ...

    def is_enabled(self) -> bool: ...


_switch: Switch | None = None


def follow_switch(switch: Switch) -> None:
    """From here on, object storage is used where ``switch`` is on, and nowhere else."""
    global _switch
    _switch = switch


def object_storage(path: str | os.PathLike[str]) -> Any | None:
    """The multistorageclient module if ``path`` is not an ordinary local one, else None.

    Paths are its own when they are URLs (``msc://profile/...``) or, with Megatron-Core's switch on, when its
    configuration maps them to a profile. Ordinary paths never pass through it: only then are files replaced
    atomically and fsynced.

    Raises:
        UnavailableError: an ``msc://`` path, and multi-storage-client is not installed or not switched on.
    """
    name = as_url(path)
    is_url = name.startswith(SCHEME)
    if not (is_url if _switch is None else _switch.is_enabled()):
        if is_url:
            raise UnavailableError(f"{name} is in object storage: {_remedy()}")
        return None
    msc, is_installed = safe_import("multistorageclient")
    if not is_installed:
        raise UnavailableError(f"{name} is in object storage: {_remedy()}")
    if "://" in name or not msc.resolve_storage_client(os.path.abspath(name))[0].is_default_profile():
        return msc
    return None


def enable_object_storage() -> None:
    """Let ``msc://`` paths name object storage, where the user has asked for it by naming one.

    Raises:
        UnavailableError: multi-storage-client is not installed.
    """
    import_client()
    if _switch is not None:
        _switch.enable()


def import_client() -> Any:
    """The multistorageclient module.

    Raises:
        UnavailableError: it is not installed.
    """
    msc, is_installed = safe_import("multistorageclient")
    if not is_installed:
        raise UnavailableError(
            f"a path that begins with {SCHEME} is in object storage: install multi-storage-client"
        )
    return msc


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


def checkpoint_files(path: str | os.PathLike[str]) -> Files:
    """The files of a checkpoint, wherever it is; the caller closes them.

    Raises:
        UnavailableError: see ``object_storage``.
        StorageError: see ``client_and_key``.
    """
    name, msc = as_url(path), object_storage(path)
    return Directory(name) if msc is None else object_files(msc, name)


def object_files(msc: Any, path: str) -> Spool:
    """The files of a checkpoint in object storage; the caller closes them.

    Args:
        msc: the multistorageclient module.
        path: of the checkpoint.

    Raises:
        StorageError: see ``client_and_key``.
    """
    return Spool(path, ObjectStore(msc, path), ObjectErrors())


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


def as_url(path: str | os.PathLike[str]) -> str:
    """A path as a string; an URL as it was before somebody, as Megatron-Core does, made a Path of it."""
    return re.sub(f"^{SCHEME[:-1]}(?!/)", SCHEME, os.fspath(path))


def _remedy() -> str:
    if not safe_import("multistorageclient")[1]:
        return "install multi-storage-client"
    return "call megatron.core.msc_utils.MultiStorageClientFeature.enable() first (Megatron-LM: --enable-msc)"
