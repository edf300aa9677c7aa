# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint of which tier a run goes on from after it went back: that of the branch it is on."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest

from ckpt_fast.retention.line import SAVED_AT, Lineage
from ckpt_fast.trainer.places.catalog import Found, published
from ckpt_fast.trainer.places.locate import choose_checkpoint, older_checkpoints
from tests.trainer.places.branches import RECOVERY, Branches


@pytest.fixture
def branches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Branches:
    for variable in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(variable, raising=False)
    return Branches(tmp_path)


def test_a_newer_recovery_checkpoint_of_the_branch_that_was_left(
    branches: Branches, caplog: pytest.LogCaptureFixture
) -> None:
    first = branches.begin()
    for iteration in (5, 10):
        branches.save(first, iteration)
    branches.save(first, 12, RECOVERY)
    assert branches.chosen() == ("recovery", 12)
    branches.save(branches.begin(5), 8)
    assert branches.chosen() == ("persistent", 8)
    printed = caplog.text
    assert printed.count("Passed over") == 1 and "the recovery one of iteration 12 (load=" in printed
    assert "older than" not in printed


def test_a_recovery_checkpoint_of_the_branch_that_the_run_is_on(
    branches: Branches, caplog: pytest.LogCaptureFixture
) -> None:
    """It has a lower iteration than the persistent one, which the tracker still names."""
    first = branches.begin()
    for iteration in (5, 10):
        branches.save(first, iteration)
    branches.save(branches.begin(5), 7, RECOVERY)
    assert branches.chosen() == ("recovery", 7)
    assert "the persistent one of iteration 10 (ckpt_step=10 loads it)" in caplog.text
    assert branches.chosen(step=10) == ("persistent", 10), "the user knows better"
    path = f"{branches.root}/{RECOVERY}/iter_0000007"
    assert branches.older(Found("recovery", f"{branches.root}/{RECOVERY}", 7, path)) == [("persistent", 5)]


def test_on_one_line_the_newest_counts(branches: Branches, caplog: pytest.LogCaptureFixture) -> None:
    first = branches.begin()
    branches.save(first, 5)
    branches.save(first, 7, RECOVERY)
    assert branches.chosen() == ("recovery", 7)
    second = branches.begin(7, RECOVERY)
    branches.save(second, 8)
    assert branches.chosen() == ("persistent", 8)
    branches.save(second, 8, RECOVERY)
    assert branches.chosen() == ("recovery", 8), "a tie"
    assert "Passed over" not in caplog.text


def test_of_two_branches_of_one_leg_that_which_was_saved_later_counts(branches: Branches) -> None:
    first = branches.begin()
    branches.save(first, 5)
    branches.save(branches.begin(5), 12, RECOVERY)
    branches.save(branches.begin(5), 8)
    assert branches.chosen() == ("persistent", 8)
    branches.without_times(8)
    assert branches.chosen() == ("recovery", 12), "nothing says which was later"


def test_a_branch_of_the_same_iteration(branches: Branches) -> None:
    first = branches.begin()
    branches.save(first, 5)
    branches.save(first, 8, RECOVERY)
    branches.save(branches.begin(5), 8)
    assert branches.chosen() == ("persistent", 8)


def test_what_was_resumed_and_saved_once_more(branches: Branches) -> None:
    """The run goes on from the recovery checkpoint, a tie. Where that is lost, the persistent one is left."""
    first = branches.begin()
    branches.save(first, 8, RECOVERY)
    branches.save(branches.begin(8, RECOVERY), 8)
    assert branches.chosen() == ("recovery", 8), "a tie"
    second = branches.begin(8, RECOVERY)
    branches.save(second, 9, RECOVERY)
    assert branches.chosen() == ("recovery", 9)
    recovery = str(branches.root / RECOVERY)
    older = branches.older(Found("recovery", recovery, 9, f"{recovery}/iter_0000009"))
    assert ("persistent", 8) in older


@pytest.mark.parametrize("again", ["", RECOVERY])
def test_gone_back_and_saved_once_more(branches: Branches, again: str) -> None:
    """Whatever followed the first time has been left."""
    first = branches.begin()
    for iteration in (5, 8):
        branches.save(first, iteration)
    branches.save(first, 9, "" if again else RECOVERY)
    second = branches.begin(8)
    if not again:
        shutil.rmtree(branches.root / "iter_0000008")
    branches.save(second, 8, again)
    tier, root = ("recovery", branches.root / again) if again else ("persistent", branches.root)
    assert branches.chosen() == (tier, 8)
    older = branches.older(Found(tier, str(root), 8, f"{root}/iter_0000008"))
    assert all(iteration <= 8 for _, iteration in older) and ("persistent", 5) in older


def test_back_and_forth(branches: Branches) -> None:
    """The run goes back to the branch that it had left, by naming its checkpoint."""
    first = branches.begin()
    for iteration in (5, 10):
        branches.save(first, iteration)
    branches.save(branches.begin(5), 8)
    branches.save(branches.begin(10), 11, RECOVERY)
    assert branches.chosen() == ("recovery", 11)
    branches.save(branches.begin(8), 9)
    assert branches.chosen() == ("persistent", 9)


@pytest.mark.parametrize("with_notes", [(), ("persistent",), ("recovery",)])
def test_without_notes_the_higher_iteration_counts(branches: Branches, with_notes: Iterable[str]) -> None:
    branches.save(None, 5)
    branches.save(branches.begin() if "recovery" in with_notes else None, 12, RECOVERY)
    branches.save(branches.begin() if "persistent" in with_notes else None, 8)
    assert branches.chosen() == ("recovery", 12)
    branches.save(None, 13)
    assert branches.chosen() == ("persistent", 13)


def test_another_run_in_the_same_place_counts_by_iteration(branches: Branches) -> None:
    branches.save(branches.begin(), 12, RECOVERY)
    branches.save(branches.begin(), 8)
    assert branches.chosen() == ("recovery", 12)


def test_local_ones(branches: Branches, caplog: pytest.LogCaptureFixture) -> None:
    """Of several, that of the branch that the run is on; the newest is not."""
    first, config = branches.begin(), branches.config()
    for iteration in (5, 10):
        branches.save(first, iteration)
    notes = {12: first.notes(12), 7: branches.begin(5).notes(7)}
    manager = SimpleNamespace(find_latest=lambda: 12, iterations=lambda: [12, 7], notes=lambda: notes)
    config.non_persistent_ckpt_type, context = "local", {"local_checkpoint_manager": manager}
    found = choose_checkpoint(str(branches.root), config, None, context)
    assert found == Found("local", "", 7, "")
    printed = caplog.text
    assert "the local one of iteration 12" in printed and "the persistent one of iteration 10" in printed
    assert [each.iteration for each in older_checkpoints(str(branches.root), config, found, context)] == [5]
    del manager.notes, manager.iterations  # as of nvidia-resiliency-ext
    assert choose_checkpoint(str(branches.root), config, None, context) == Found("local", "", 12, "")


def test_without_trackers_the_branch_that_was_begun_later_counts(branches: Branches) -> None:
    first = branches.begin()
    for iteration in (5, 10):
        branches.save(first, iteration)
    branches.save(branches.begin(5), 8)
    for tracker in branches.root.glob("latest_*"):
        tracker.unlink()
    found = published(str(branches.root))
    assert found.iteration == 8 and "is of iteration 8" in found.notes[0]


def test_clocks_are_those_of_the_saves() -> None:
    before = time.time()
    assert before - 1 <= Lineage().notes(1)[SAVED_AT] <= time.time() + 1
