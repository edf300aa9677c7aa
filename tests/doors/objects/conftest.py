# SPDX-License-Identifier: Apache-2.0
"""A bucket for torch DCP."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckpt_fast.compat import MultiStorageClientFeature
from tests.object_server import ObjectServer
from tests.trainer.objects.bucket import Bucket, new_bucket


@pytest.fixture
def bucket(object_server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """Yield a bucket, with Megatron-Core's switch off; nothing may be left in the spool, or where we are."""
    place = new_bucket(object_server, tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with place.in_use():
        monkeypatch.setattr(MultiStorageClientFeature, "_enabled", False)
        yield place
    object_server.clear()
    assert os.listdir(place.spool) == os.listdir() == []
