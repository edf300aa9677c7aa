# SPDX-License-Identifier: Apache-2.0
"""Object storage through multi-storage-client, which is used exactly where Megatron-Core would use it."""

from __future__ import annotations

import os
from typing import Any

from megatron.core.msc_utils import MultiStorageClientFeature

from ckpt_fast.megatron.optional import UnavailableError, safe_import

_SCHEME = "msc://"


def object_storage(path: str | os.PathLike[str]) -> Any | None:
    """The multistorageclient module if ``path`` is not an ordinary local one, else None.

    Paths are its own when they are URLs (``msc://profile/...``) or when its configuration maps them to a
    profile. Ordinary paths never pass through it: only then are files replaced atomically and fsynced.

    Raises:
        UnavailableError: an ``msc://`` path, and multi-storage-client is not installed or not switched on.
    """
    name = os.fspath(path)
    if not MultiStorageClientFeature.is_enabled():
        if name.startswith(_SCHEME):
            raise UnavailableError(f"{name} is in object storage: {_remedy()}")
        return None
    msc = MultiStorageClientFeature.import_package()
    if "://" in name or not msc.resolve_storage_client(os.path.abspath(name))[0].is_default_profile():
        return msc
    return None


def _remedy() -> str:
    if not safe_import("multistorageclient")[1]:
        return "install multi-storage-client"
    return "call megatron.core.msc_utils.MultiStorageClientFeature.enable() first (Megatron-LM: --enable-msc)"
