# SPDX-License-Identifier: Apache-2.0
"""``prune`` while a run that went back saves: what the trackers are about to name stays."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ckpt_fast import KeepNewest
from ckpt_fast.tools.listing import prune
from tests.cli.running import in_pipe
from tests.trainer.places.branches import RECOVERY, Branches
from tests.trainer.training import iterations


@pytest.fixture
def branches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Branches:
    """Return a run that has saved 4, 5, 9 and 10."""
    for variable in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(variable, raising=False)
    found = Branches(tmp_path)
    run = found.begin()
    for iteration in (4, 5, 9, 10):
        found.save(run, iteration)
    return found


def age(branches: Branches, iteration: int) -> None:
    directory = branches.root / f"iter_{iteration:07d}"
    for path in (directory, *directory.iterdir()):
        os.utime(path, (0, 0))


@pytest.mark.parametrize("iteration", [8, 12])
@pytest.mark.parametrize("abandoned", [False, True])
def test_between_seal_and_tracker_of_a_save_after_a_roll_back(
    branches: Branches, iteration: int, abandoned: bool
) -> None:
    branches.save(branches.begin(5), iteration, is_published=False)
    found = prune(branches.root, [KeepNewest(1)], with_abandoned=abandoned)
    assert iterations(str(branches.root)) == sorted([5, 10, iteration]), "and what it came from"
    assert [os.path.basename(path) for path in found.removed] == ["iter_0000004", "iter_0000009"]
    age(branches, iteration)
    prune(branches.root, [KeepNewest(1)], with_abandoned=True)
    left = [10] if iteration < 10 else [5, 10]
    assert iterations(str(branches.root)) == left, "the trackers never came to it"


def test_on_the_command_line(branches: Branches) -> None:
    branches.save(branches.begin(5), 8, is_published=False)
    ran = in_pipe("prune", branches.root, "--keep", 1)
    assert ran.status == 0 and iterations(str(branches.root)) == [5, 8, 10]


def test_what_a_run_has_left_goes_however_new_it_is(branches: Branches) -> None:
    branches.save(branches.begin(5), 11)
    prune(branches.root, [KeepNewest(1)])
    assert iterations(str(branches.root)) == [11]


def test_what_a_recovery_checkpoint_came_from_stays(branches: Branches) -> None:
    """The run will go on from it, and fall back to what it came from; the trackers name another branch."""
    branches.save(branches.begin(5), 7, RECOVERY)
    prune(branches.root, [KeepNewest(1)])
    assert iterations(str(branches.root)) == [5, 10]
    assert branches.chosen() == ("recovery", 7)


def test_an_older_version_noted_nothing(branches: Branches, tmp_path: Path) -> None:
    other = Branches(tmp_path / "other")
    for iteration in (5, 10):
        other.save(None, iteration)
    run: Any = other.begin(5)
    other.save(run, 8, is_published=False)
    prune(other.root, [KeepNewest(1)])
    assert iterations(str(other.root)) == [5, 8, 10]
