# SPDX-License-Identifier: Apache-2.0
"""The list of checkpoints to resume from: tiers, links, trackers, and which are complete."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ckpt_fast.errors import DamagedFileError
from ckpt_fast.state import TrainState
from ckpt_fast.trainer.places import catalog, trackers
from ckpt_fast.trainer.places.catalog import Found, checkpoints_in, damage_of, list_checkpoints, published

SEAL = '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'


def checkpoint(root: Path, step: int, sealed: bool = True) -> Path:
    """Make a directory that passes for a complete checkpoint of ours as far as the catalog looks."""
    directory = root / f"iter_{step:07d}"
    directory.mkdir(parents=True)
    (directory / "__0_0.distcp").write_bytes(b"data")
    (directory / "train_state.pt").write_bytes(b"state")
    if sealed:
        (directory / ".metadata").touch()
        (directory / "metadata.json").write_text(SEAL)
    return directory


def publish(root: Path, step: int) -> None:
    trackers.publish_trackers(str(root), step, trackers.snapshot_train_state(TrainState(step=step), 0))


class Manager:
    """The part of a local checkpoint manager that the catalog uses."""

    def iterations(self) -> list[int]:
        return [4, 3]


def test_one_list_of_all_tiers(tmp_path: Path) -> None:
    run, recovery = tmp_path / "run", tmp_path / "run/non_persistent"
    for root, steps in ((run, (2, 4)), (recovery, (3, 4))):
        for step in steps:
            checkpoint(root, step)
        publish(root, 4)
    found = list_checkpoints(
        {str(run): "persistent", str(recovery): "recovery"}, {"local_checkpoint_manager": Manager()}
    )
    assert [(each.iteration, each.tier) for each in found] == [
        (4, "local"),
        (4, "recovery"),
        (4, "persistent"),
        (3, "local"),
        (3, "recovery"),
        (2, "persistent"),
    ]
    assert str(found[0]) == "the local checkpoint of iteration 4"
    assert found[1] == Found("recovery", str(recovery), 4, f"{recovery}/iter_0000004")


def test_links_are_followed_and_other_names_ignored(tmp_path: Path) -> None:
    archive = checkpoint(tmp_path / "archive", 5)
    run = tmp_path / "run"
    checkpoint(run, 4)
    (run / "iter_0000005").symlink_to(archive)
    (run / "iter_0000006").symlink_to(tmp_path / "nowhere")
    (run / "iter_0000007").write_text("a file")
    for name in ("iter_best", "iter_", "release"):
        (run / name).mkdir()
    publish(run, 5)
    assert [each.iteration for each in checkpoints_in(str(run))] == [4, 5]
    assert damage_of(str(run / "iter_0000005")) is None


def test_what_was_not_published_is_marked(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint(tmp_path, step)
    publish(tmp_path, 2)
    assert [(each.iteration, each.is_published) for each in checkpoints_in(str(tmp_path))] == [
        (1, True),
        (2, True),
        (3, False),
    ]


def test_damage(tmp_path: Path) -> None:
    assert damage_of(str(tmp_path / "absent")) == f"{tmp_path}/absent does not exist"
    directory = checkpoint(tmp_path, 1)
    assert damage_of(str(directory)) is None
    (directory / ".metadata").unlink()
    assert damage_of(str(directory)) == f"{directory} has no .metadata"
    (directory / ".metadata").touch()
    (directory / "metadata.json").write_text("not JSON")
    assert "no seal" in str(damage_of(str(directory)))
    (directory / "metadata.json").unlink()
    assert damage_of(str(directory)) is None
    assert catalog.seal_of(str(directory)) == "fsdp_dtensor"
    (directory / "common.pt").touch()
    assert "no seal" in str(damage_of(str(directory)))


# --- Trackers --------------------------------------------------------------------------------------------


def test_sound_trackers_need_no_note(tmp_path: Path) -> None:
    publish(tmp_path, 7)
    assert published(str(tmp_path)) == catalog.Published(7)
    assert published(str(tmp_path / "absent")) == catalog.Published()


def test_a_checkpoint_newer_than_a_sound_tracker_is_not_taken(tmp_path: Path) -> None:
    checkpoint(tmp_path, 7)
    checkpoint(tmp_path, 8)
    publish(tmp_path, 7)
    assert published(str(tmp_path)).iteration == 7


@pytest.mark.parametrize("damage", ["remove", "empty", "garble"])
@pytest.mark.parametrize("names", [(0,), (1,), (0, 1)])
def test_trackers_that_are_lost(tmp_path: Path, names: tuple[int, ...], damage: str) -> None:
    for step in (7, 8):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 9, sealed=False)
    publish(tmp_path, 8)
    for number in names:
        path = tmp_path / ["latest_train_state.pt", "latest_checkpointed_iteration.txt"][number]
        path.unlink()
        if damage != "remove":
            path.write_bytes(b"" if damage == "empty" else b"\x80garbled")
    found = published(str(tmp_path))
    assert (found.iteration, found.is_release) == (8, False)
    # Megatron Bridge writes only the first.
    assert bool(found.notes) == (names != (1,) or damage != "remove")
    publish(tmp_path, 8)
    assert published(str(tmp_path)) == catalog.Published(8)


def test_damaged_trackers_and_nothing_whole(tmp_path: Path) -> None:
    checkpoint(tmp_path, 3, sealed=False)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("soon")
    with pytest.raises(DamagedFileError, match=r"'soon'.*No iteration in .* is whole"):
        published(str(tmp_path))
    assert [each.is_published for each in checkpoints_in(str(tmp_path))] == [False]


def test_without_trackers_a_save_that_died_before_its_counters_is_not_taken(tmp_path: Path) -> None:
    checkpoint(tmp_path, 3)
    (checkpoint(tmp_path, 4) / "train_state.pt").unlink()
    found = published(str(tmp_path))
    assert found.iteration == 3
    assert "has no trackers" in found.notes[0]


def test_a_release(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    checkpoint(tmp_path, 3)
    assert published(str(tmp_path)) == catalog.Published(0, is_release=True)
    assert [each.is_published for each in checkpoints_in(str(tmp_path))] == [False]


def test_an_older_publication_is_swept_and_one_in_progress_is_not(tmp_path: Path) -> None:
    dead = tmp_path / ".latest_train_state.pt.0badcafe.partial"
    alive = tmp_path / ".latest_train_state.pt.00c0ffee.partial"
    other = tmp_path / ".notes.00c0ffee.partial"
    for path in (dead, alive, other):
        path.touch()
    os.utime(dead, ns=(1, 1))
    os.utime(other, ns=(1, 1))
    metadata = checkpoint(tmp_path, 1) / ".metadata"
    os.utime(metadata, ns=(10**9, 10**9))
    publish(tmp_path, 1)
    assert (dead.exists(), alive.exists(), other.exists()) == (False, True, True)


# --- Nothing ---------------------------------------------------------------------------------------------


def test_why_there_is_nothing(tmp_path: Path) -> None:
    assert catalog.why_nothing(None) == "checkpoint.load is not set"
    assert catalog.why_nothing(f"{tmp_path}/absent") == f"{tmp_path}/absent does not exist"
    assert catalog.why_nothing(str(tmp_path)) == f"there is no checkpoint in {tmp_path}"
    checkpoint(tmp_path, 1, sealed=False)
    assert f"the only iteration in {tmp_path} is not whole: {tmp_path}/iter_0000001 has no seal" in (
        catalog.why_nothing(str(tmp_path))
    )
    checkpoint(tmp_path, 2, sealed=False)
    assert f"none of the 2 iterations in {tmp_path} is whole: {tmp_path}/iter_0000002" in (
        catalog.why_nothing(str(tmp_path))
    )
