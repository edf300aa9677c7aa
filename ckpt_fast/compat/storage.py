# SPDX-License-Identifier: Apache-2.0
"""Object storage where Megatron-Core would use it: it has a switch for it, and knows mapped paths."""

from __future__ import annotations

import os
from typing import Any

from megatron.core.msc_utils import MultiStorageClientFeature

from ckpt_fast.compat.optional import safe_import
from ckpt_fast.errors import UnavailableError
from ckpt_fast.storage.files import Directory, Files
from ckpt_fast.storage.objects import SCHEME, as_url, import_client, object_files


def object_storage(path: str | os.PathLike[str]) -> Any | None:
    """The multistorageclient module if ``path`` is not an ordinary local one, else None.

    Paths are its own when they are URLs (``msc://profile/...``) or when its configuration maps them to a
    profile. Ordinary paths never pass through it: only then are files replaced atomically and fsynced.

    Raises:
        UnavailableError: an ``msc://`` path, and multi-storage-client is not installed or not switched on.
    """
    name = as_url(path)
    if not MultiStorageClientFeature.is_enabled():
        if name.startswith(SCHEME):
            raise UnavailableError(f"{name} is in object storage: {_remedy()}")
        return None
    msc = MultiStorageClientFeature.import_package()
    if "://" in name or not msc.resolve_storage_client(os.path.abspath(name))[0].is_default_profile():
        return msc
    return None


def enable_object_storage() -> None:
    """Let ``msc://`` paths name object storage, where the user has asked for it by naming one.

    Raises:
        UnavailableError: multi-storage-client is not installed.
    """
    if not MultiStorageClientFeature.is_enabled():
        import_client()
        MultiStorageClientFeature.enable()


def checkpoint_files(path: str | os.PathLike[str]) -> Files:
    """The files of a checkpoint, wherever it is; the caller closes them.

    Raises:
        UnavailableError: see ``object_storage``.
        StorageError: see ``client_and_key``.
    """
    name, msc = as_url(path), object_storage(path)
    return Directory(name) if msc is None else object_files(msc, name)


def _remedy() -> str:
    if not safe_import("multistorageclient")[1]:
        return "install multi-storage-client"
    return "call megatron.core.msc_utils.MultiStorageClientFeature.enable() first (Megatron-LM: --enable-msc)"
