# SPDX-License-Identifier: Apache-2.0
"""Ranks that see different directories: rank 0 decides, the others wait, and errors say who sees what."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ckpt_fast.checkpointing import _load_model_weights_from_checkpoint
from ckpt_fast.pipeline.load.fingerprint import Fingerprint, fingerprints
from ckpt_fast.pipeline.load.opened import OpenCheckpoint
from ckpt_fast.storage.files import Directory
from ckpt_fast.trainer.load import visibility
from tests.helpers import run_ranks
from tests.models import FLOPS, Run, Setup
from tests.trainer import training
from tests.trainer.training import error_of, require

SETUP = Setup()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Save iterations 1 and 2 on two ranks."""
    root = str(tmp_path_factory.mktemp("visibility") / "run")
    run_ranks(training.save_steps, 2, SETUP, root, 2, {})
    return root


@pytest.fixture
def root(sound: str, tmp_path: Path) -> Path:
    """Return a copy to hide parts of."""
    return Path(shutil.copytree(sound, tmp_path / "run"))


def test_fingerprints(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"123456789")
    checkpoint = OpenCheckpoint(Directory(str(tmp_path)))
    assert fingerprints(checkpoint, ["a", "b"]) == {"a": Fingerprint(0xCBF43926, 9), "b": None}
    assert fingerprints(OpenCheckpoint(Directory(str(tmp_path / "absent"))), ["a"]) == {"a": None}


def can_mount() -> bool:
    command = ["unshare", "-m", "sh", "-c", "mount --make-rprivate / && mount --bind /tmp /mnt"]
    is_there = bool(shutil.which("unshare"))
    return is_there and subprocess.run(command, check=False, capture_output=True).returncode == 0


needs_mounts = pytest.mark.skipif(not can_mount(), reason="needs mount namespaces")


def see_instead(root: str, view: str) -> None:
    """From now on this thread, and those that it starts, see ``view`` at ``root``."""
    new_mount_namespace = 0x00020000
    if ctypes.CDLL(None, use_errno=True).unshare(new_mount_namespace) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "--bind", view, root], check=True)


def load(rank: int, root: str, view: str, late: str | None, weights_of: str | None) -> Any:
    """Load while rank 1 sees ``view`` instead of ``root``; the file ``late`` appears there after 2 s."""
    if rank == 1:
        see_instead(root, view)
        if late is not None:
            threading.Timer(2.0, lambda: os.rename(f"{view}/{late}.late", f"{view}/{late}")).start()
    with Run(SETUP, load=root) as run:
        begin = time.monotonic()
        if weights_of is None:
            outcome = error_of(run.load)
        else:
            outcome = error_of(lambda: _load_model_weights_from_checkpoint(weights_of, run.model))
        return outcome, time.monotonic() - begin


@needs_mounts
@pytest.mark.parametrize("weights_alone", [False, True])
def test_a_rank_that_sees_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights_alone: bool
) -> None:
    monkeypatch.setenv("CKPT_FAST_VISIBLE_TIMEOUT", "1")
    view = tmp_path / "empty"
    view.mkdir()
    weights_of = str(root / "iter_0000002") if weights_alone else None
    (first, _), (second, _) = run_ranks(load, 2, str(root), str(view), None, weights_of, fresh=True)
    assert first == second
    require(
        first, "CheckpointError", "rank 1 (", "sees none", f"{root}/iter_0000002", "share", "VISIBLE_TIMEOUT"
    )
    assert "interrupted" not in first[1]


@needs_mounts
def test_a_rank_that_sees_another_save(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even an older one that all could load is chosen: rank 0 sees an intact one."""
    monkeypatch.setenv("CKPT_FAST_VISIBLE_TIMEOUT", "1")
    view = Path(shutil.copytree(root, tmp_path / "view"))
    metadata = view / "iter_0000002/.metadata"
    metadata.write_bytes(metadata.read_bytes() + b"of another save")
    (first, _), (second, _) = run_ranks(load, 2, str(root), str(view), None, None, fresh=True)
    assert first == second
    size = metadata.stat().st_size
    require(first, "CheckpointError", "rank 1 (", "sees another .metadata", f"{size} bytes", "share")


@needs_mounts
@pytest.mark.parametrize(
    "late", [".metadata", pytest.param("metadata.json", marks=pytest.mark.long), "common.pt"]
)
def test_what_appears_late_is_waited_for(root: Path, tmp_path: Path, late: str) -> None:
    view = Path(shutil.copytree(root, tmp_path / "view"))
    late = f"iter_0000002/{late}"
    (view / late).rename(view / f"{late}.late")
    answers = run_ranks(load, 2, str(root), str(view), late, None, fresh=True)
    assert [outcome for outcome, _ in answers] == [("no error", str((2, float(FLOPS))))] * 2
    assert all(seconds > 1.5 for _, seconds in answers)


def test_one_rank_looks_at_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visibility, "fingerprints", None)
    nowhere = OpenCheckpoint(Directory("/nowhere"))
    assert visibility.view_of(nowhere) is None
    visibility.wait_for_view(nowhere, None)
