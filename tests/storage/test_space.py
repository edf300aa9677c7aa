# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that cannot fit is refused before anything of the old one is touched."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ckpt_fast.errors import CheckpointWriteError
from ckpt_fast.storage.space import require_space
from tests.helpers import run_ranks
from tests.pipeline.layouts import same, whole
from tests.pipeline.save.test_save import FILES, loaded
from tests.saves import save

pytestmark = pytest.mark.usefixtures("no_fsync")
TENSOR = torch.arange(100_000.0)


def file_system(monkeypatch: pytest.MonkeyPatch, free: int, blocks: int = 1000) -> None:
    status = SimpleNamespace(f_blocks=blocks, f_bavail=free, f_frsize=1)
    monkeypatch.setattr(os, "statvfs", lambda path: status)


def test_refused_with_both_sizes_and_nothing_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save([whole("w", TENSOR)], str(tmp_path), **FILES)
    before = {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(tmp_path)}
    file_system(monkeypatch, free=3000)
    with pytest.raises(
        CheckpointWriteError, match=r"rank 0: .*takes about 0\.0[0-9]+ GB.* 0\.00 GB free"
    ) as caught:
        save([whole("w", TENSOR.repeat(20))], str(tmp_path), **FILES)
    assert caught.value.errno == errno.ENOSPC
    assert {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(tmp_path)} == before


def test_what_is_replaced_counts_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save([whole("w", TENSOR)], str(tmp_path), **FILES)
    file_system(monkeypatch, free=10_000)
    save([whole("w", TENSOR + 1)], str(tmp_path), **FILES)
    assert same(loaded(tmp_path, "w", torch.zeros_like(TENSOR)), TENSOR + 1)


def test_what_a_backup_of_hard_links_keeps_does_not_become_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save([whole("w", TENSOR)], str(tmp_path / "a"), **FILES)
    (tmp_path / "backup").mkdir()
    for path in (tmp_path / "a").iterdir():
        os.link(path, tmp_path / "backup" / path.name)
    file_system(monkeypatch, free=10_000)
    with pytest.raises(CheckpointWriteError, match="no checkpoint was touched"):
        save([whole("w", TENSOR + 1)], str(tmp_path / "a"), **FILES)
    monkeypatch.undo()
    assert same(loaded(tmp_path / "a", "w", torch.zeros_like(TENSOR)), TENSOR)


@pytest.mark.parametrize("how", ["unknown size", "switched off", "no answer"])
def test_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    file_system(monkeypatch, free=0, blocks=0 if how == "unknown size" else 1000)
    if how == "switched off":
        monkeypatch.setenv("CKPT_FAST_SPACE_CHECK", "0")
    if how == "no answer":

        def fail(path: str) -> None:
            raise OSError(errno.ENOSYS, "no statvfs")

        monkeypatch.setattr(os, "statvfs", fail)
    require_space(str(tmp_path), 1 << 60)


def test_of_a_directory_that_does_not_exist_yet(tmp_path: Path) -> None:
    with pytest.raises(CheckpointWriteError, match="Nothing was written"):
        require_space(str(tmp_path / "a" / "b"), 1 << 60)


def save_too_much(rank: int, directory: str) -> str:
    """Save so much that only one rank's part would fit; return the error."""
    with pytest.MonkeyPatch.context() as patch:
        file_system(patch, free=500_000)
        with pytest.raises(CheckpointWriteError) as caught:
            save([whole(f"w{rank}", TENSOR)], directory, **FILES)
    return str(caught.value)


def test_all_ranks_together_are_asked_for(tmp_path: Path) -> None:
    first, second = run_ranks(save_too_much, 2, str(tmp_path / "new"))
    assert first == second and "cannot save to" in first
    assert not (tmp_path / "new").exists()
