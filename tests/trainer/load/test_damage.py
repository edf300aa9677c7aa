# SPDX-License-Identifier: Apache-2.0
"""Every small file of a run, damaged in every way: the values as saved, or the older intact checkpoint."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

from ckpt_fast.errors import DamagedFileError
from ckpt_fast.state import TrainState
from ckpt_fast.trainer.places.catalog import published
from ckpt_fast.trainer.places.trackers import (
    publish_trackers,
    read_train_state,
    snapshot_train_state,
    write_train_state,
)
from tests.helpers import run_ranks
from tests.models import Setup
from tests.trainer import training
from tests.trainer.load import damage
from tests.trainer.load.damage import Case, Damage

SETUP = Setup()
STEPS = (2, 1)
NEWEST = "iter_0000002"
TRACKERS = ["latest_train_state.pt", "latest_checkpointed_iteration.txt"]
SMALL = [f"{NEWEST}/{name}" for name in ("train_state.pt", "run_config.yaml", "metadata.json")]


@pytest.fixture(
    scope="module", params=[1, pytest.param(2, marks=pytest.mark.long)], ids=["1-rank", "2-ranks"]
)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str]:
    """Return the number of ranks, and the root of iterations 1 and 2 that they saved."""
    root = str(tmp_path_factory.mktemp("damage") / "run")
    run_ranks(training.save_steps, request.param, SETUP, root, 2, {})
    return request.param, root


def outcomes(saved: tuple[int, str], damages: list[Damage]) -> list[Case]:
    return damage.same_on_all(saved[0], SETUP, saved[1], STEPS, damages)


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_lost_or_damaged_costs_nothing(saved: tuple[int, str], name: str) -> None:
    damages = [Damage("remove", name), Damage("empty", name), Damage("cut", name, 700)]
    damages += damage.flips(saved[1], name, every=631)
    assert damage.unwanted(outcomes(saved, damages), "right") == []


@pytest.mark.parametrize("name", SMALL)
def test_a_small_file_that_is_lost_is_a_reason_to_go_back(saved: tuple[int, str], name: str) -> None:
    damages = [Damage("remove", name), Damage("empty", name)]
    if not name.endswith(".yaml"):  # a prefix of one is one
        damages.append(Damage("cut", name, 100))
    assert damage.unwanted(outcomes(saved, damages), "older") == []


@pytest.mark.parametrize("count", [8, pytest.param(24, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", SMALL)
def test_flipped_bits_of_small_files(saved: tuple[int, str], name: str, count: int) -> None:
    every = max(1, 8 * os.path.getsize(f"{saved[1]}/{name}") // count)
    assert damage.unwanted(outcomes(saved, damage.flips(saved[1], name, every)), "right", "older") == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["iter_0000002/train_state.pt", "iter_0000002/metadata.json", *TRACKERS])
def test_every_bit_of_small_files(saved: tuple[int, str], name: str) -> None:
    assert damage.unwanted(outcomes(saved, damage.flips(saved[1], name)), "right", "older") == []


def test_a_train_state_of_another_save_is_noticed(saved: tuple[int, str]) -> None:
    exchanged = Damage("exchange", f"{NEWEST}/train_state.pt", "iter_0000001/train_state.pt")
    assert [case.outcome for case in outcomes(saved, [exchanged])] == ["older"]


def write_run(root: Path) -> None:
    """Write what ``published`` looks at: trackers, and an iteration that is sealed."""
    state = snapshot_train_state(TrainState(step=2, consumed_train_samples=64), 1e15)
    publish_trackers(str(root), 2, state)
    (root / NEWEST).mkdir()
    (root / NEWEST / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    write_train_state(str(root / NEWEST / "train_state.pt"), state)


@pytest.mark.parametrize(("name", "every"), [(TRACKERS[0], 101), (TRACKERS[1], 1)])
def test_bits_of_the_trackers(tmp_path: Path, name: str, every: int) -> None:
    """Whatever is flipped, the iteration is found; if the flip is detected, it is reported."""
    write_run(tmp_path)
    tracker = tmp_path / name
    sound, noticed = tracker.read_bytes(), 0
    for flip in damage.flips(str(tmp_path), name, every):
        damage.inflict(str(tmp_path), flip)
        found = published(str(tmp_path))
        assert (found.iteration, found.is_release) == (2, False), flip
        noticed += bool(found.notes)
        tracker.write_bytes(sound)
    assert noticed > 0


def refused(path: Path, flips: list[Damage]) -> int:
    """Return how many flips of a train state are refused; the others must load what was saved."""
    sound, expected, count = path.read_bytes(), read_train_state.read(str(path)), 0
    for flip in flips:
        damage.inflict(str(path.parent), flip)
        try:
            assert read_train_state.read(str(path)) == expected, flip
        except DamagedFileError:
            count += 1
        path.write_bytes(sound)
    return count


def test_bits_of_the_train_state(tmp_path: Path) -> None:
    write_run(tmp_path)
    path = tmp_path / NEWEST / "train_state.pt"
    flips = damage.flips(str(path.parent), path.name, every=39)
    assert 0 < refused(path, flips) < len(flips)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_bit_of_the_train_state(tmp_path: Path) -> None:
    write_run(tmp_path)
    path = tmp_path / NEWEST / "train_state.pt"
    assert refused(path, damage.flips(str(path.parent), path.name)) > 0


def test_entries_of_the_archive_that_claim_to_be_directories(tmp_path: Path) -> None:
    """torch reads nothing of such an entry, and returns uninitialized memory."""
    write_run(tmp_path)
    path = tmp_path / NEWEST / "train_state.pt"
    with zipfile.ZipFile(path) as archive:
        position, flips = archive.start_dir, []
        for entry in archive.infolist():
            attributes = position + 38
            flips.append(Damage("flip", path.name, 8 * attributes + 4))
            position += 46 + len(entry.filename) + len(entry.extra) + len(entry.comment)
    assert refused(path, flips) == len(flips) > 10
