# SPDX-License-Identifier: Apache-2.0
"""``retention.stored``: how long nothing has changed in a directory."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ckpt_fast.retention import stored


@pytest.mark.parametrize("ahead_s", [7200.0, -7200.0])
def test_the_clock_is_the_file_systems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead_s: float
) -> None:
    """A node whose clock is wrong does not take a save in the making for one that died long ago."""
    (tmp_path / "iter_0000001").mkdir()
    monkeypatch.setattr(stored, "time", SimpleNamespace(time=lambda: time.time() + ahead_s))
    assert stored.unchanged_s(str(tmp_path / "iter_0000001")) < 60
    monkeypatch.chdir(tmp_path)
    assert stored.unchanged_s("iter_0000001") < 60
    os.utime(tmp_path / "iter_0000001", (0, 0))
    assert stored.unchanged_s("iter_0000001") > 1e9
    assert os.listdir(tmp_path) == ["iter_0000001"]


def test_where_nothing_may_be_created_the_nodes_clock_is_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    file = tmp_path / "iter_0000001/file"
    file.parent.mkdir()
    file.touch()
    os.utime(file.parent, (0, 0))
    os.utime(file, (time.time() - 50, time.time() - 50))
    assert 49 < stored.unchanged_s(str(file.parent)) < 3600
