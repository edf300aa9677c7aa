# SPDX-License-Identifier: Apache-2.0
"""``ckpt-fast ls`` and ``ckpt-fast prune``."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from ckpt_fast.retention import removal
from ckpt_fast.retention.policies import KeepNewest
from ckpt_fast.tools.listing import list_directory, prune
from tests.cli.running import in_pipe, on_terminal


@pytest.fixture
def root(runs: dict[str, Path], tmp_path: Path) -> Path:
    """A directory with iterations 1 to 3, of which 3 is selected, to be changed."""
    place = tmp_path / "run"
    shutil.copytree(runs["ours"], place)
    return place


def left(root: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in root.glob("iter_*"))


def test_what_is_listed(root: Path) -> None:
    (root / "iter_0000004").mkdir()  # of a save that is going on
    (root / "iter_0000004" / "__0_0.distcp").write_bytes(b"x" * 10)
    os.truncate(root / "iter_0000001" / "__0_0.distcp", 100)
    shutil.copytree(root / "iter_0000002", root / "non_persistent" / "iter_0000002")
    found = {(each["iteration"], each["is_recovery"]): each for each in in_pipe("ls", root, "--json").value}
    assert set(found) == {(1, False), (2, False), (3, False), (4, False), (2, True)}
    assert [each["is_complete"] for each in found.values()] == [False, True, True, False, True]
    assert [key for key, each in found.items() if each["is_selected"]] == [(3, False), (2, True)]
    assert found[2, False]["format"] == "torch_dist"
    files = [path for path in (root / "iter_0000002").rglob("*") if path.is_file()]
    assert found[2, False]["nbytes"] == sum(path.stat().st_size for path in files)
    assert "100 bytes instead of" in found[1, False]["damage"]
    plain = in_pipe("ls", root)
    assert plain.status == 0 and "iter_0000001: " in plain.out
    assert "iter_0000003" in on_terminal("ls", root).text


def test_stock_and_other_names(runs: dict[str, Path], dcp_checkpoints: dict[str, Path]) -> None:
    (found,) = list_directory(runs["stock"])
    assert (found.iteration, found.is_complete, found.is_selected) == (3, True, True)
    others = list_directory(dcp_checkpoints["stock"].parent)
    assert [(os.path.basename(each.path), each.format) for each in others] == [
        ("fsdp", "fsdp_dtensor"),
        ("ours", "dcp"),
        ("stock", "dcp"),
    ]
    assert all(each.is_complete and not each.is_selected for each in others)


def test_prune_keeps_the_newest_and_multiples(root: Path) -> None:
    for copy in (4, 6, 8):
        shutil.copytree(root / "iter_0000003", root / f"iter_{copy:07}")
    (root / "latest_train_state.pt").unlink()
    (root / "latest_checkpointed_iteration.txt").write_text("8")
    dry = in_pipe("prune", root, "--keep", 1, "--keep-every", 4, "--dry-run")
    assert dry.status == 0 and "would delete 4" in dry.out and left(root) == [1, 2, 3, 4, 6, 8]
    value = in_pipe("prune", root, "--keep", 1, "--keep-every", 4, "--json").value
    assert [os.path.basename(path) for path in value["removed"]] == [
        f"iter_{number:07}" for number in (1, 2, 3, 6)
    ]
    assert value["nbytes"] > 0 and left(root) == [4, 8]
    assert "kept 2" in on_terminal("prune", root, "--keep", 1, "--keep-every", 4).text


def test_prune_never_deletes_the_selected_one_or_what_is_newer(root: Path) -> None:
    (root / "latest_train_state.pt").unlink()
    (root / "latest_checkpointed_iteration.txt").write_text("2")
    assert in_pipe("prune", root, "--keep", 0).status == 0
    assert left(root) == [2, 3]
    (root / "latest_checkpointed_iteration.txt").unlink()
    assert in_pipe("prune", root, "--keep", 0).status == 0
    assert left(root) == [3], "without trackers, a run resumes from the newest whole one"


def test_prune_deletes_nothing_if_the_tracker_makes_no_sense(root: Path) -> None:
    (root / "latest_train_state.pt").write_bytes(b"rubbish")
    ran = in_pipe("prune", root, "--keep", 1)
    assert ran.status in (1, 2) and ran.err and "Traceback" not in ran.err
    assert left(root) == [1, 2, 3]


def test_prune_ended_anywhere_leaves_nothing_that_passes_for_whole(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(path: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(removal.shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            prune(root, [KeepNewest(1)])
    states = {each.iteration: each.is_complete for each in list_directory(root)}
    assert states == {1: False, 2: True, 3: True}
    refused = in_pipe("prune", root, "--keep", 1)
    assert refused.status == 2 and "is being written, or was left by a save that died" in refused.err
    assert left(root) == [1, 2, 3]
    for path in (root / "iter_0000001", *(root / "iter_0000001").iterdir()):
        os.utime(path, (0, 0))
    assert in_pipe("prune", root, "--keep", 1).status == 0
    assert left(root) == [3]


def test_what_cannot_be_deleted_is_said(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(removal.shutil, "rmtree", fail)
    ran = in_pipe("prune", root, "--keep", 1)
    assert ran.status == 2 and "iter_0000001 is not deleted" in ran.err


def test_wrong_use(tmp_path: Path) -> None:
    assert in_pipe("ls", tmp_path / "nowhere").status == 2
    assert in_pipe("prune", tmp_path / "nowhere", "--keep", 1).status == 2
    assert in_pipe("prune", tmp_path).status == 2, "nothing says what is to be kept"
    for option, value in (
        ("--keep", "-1"),
        ("--keep-every", "-1"),
        ("--keep-for", "soon"),
        ("--max-size", "big"),
    ):
        assert in_pipe("prune", tmp_path, option, value).status == 2
    with pytest.raises(ValueError, match="negative"):
        KeepNewest(-1)
    assert in_pipe("ls", tmp_path).status == 0
