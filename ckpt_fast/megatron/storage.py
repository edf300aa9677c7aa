# SPDX-License-Identifier: Apache-2.0
"""Object storage through multi-storage-client, which is used exactly where Megatron-Core would use it."""

from __future__ import annotations

import os
from typing import Any

from megatron.core.msc_utils import MultiStorageClientFeature


def object_storage(path: str | os.PathLike[str]) -> Any | None:
    """The multistorageclient module if ``path`` is not an ordinary local one, else None.

    Paths are its own when they are URLs (``msc://profile/...``) or when its configuration maps them to a
    profile. Ordinary paths never pass through it: only then are files replaced atomically and fsynced.
    """
    if not MultiStorageClientFeature.is_enabled():
        return None
    msc = MultiStorageClientFeature.import_package()
    name = os.fspath(path)
    if "://" in name or not msc.resolve_storage_client(os.path.abspath(name))[0].is_default_profile():
        return msc
    return None
