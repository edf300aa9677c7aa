# SPDX-License-Identifier: Apache-2.0
"""Reading and writing train state, run config and trackers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_fast.errors import CheckpointWriteError
from ckpt_fast.state import TrainState
from ckpt_fast.trainer.contents.run_config import sanitize_run_config_object
from ckpt_fast.trainer.places import trackers
from tests.helpers import RankError, run_ranks
from tests.models import Run, Setup

TIMERS = {"_target_": "megatron.core.timers.Timers", "log_level": 0}
RECIPE = "megatron.core.quantization.quant_config.RecipeConfig"


def save_state(path: Path, step: int) -> None:
    trackers.write_train_state(str(path), trackers.snapshot_train_state(TrainState(step=step), 0))


# --- Train state -----------------------------------------------------------------------------------------


def test_train_state_round_trip(tmp_path: Path) -> None:
    state = TrainState(step=12, consumed_train_samples=1 << 40, skipped_train_samples=1, do_train=True)
    operations = 123_456_789_012_345.0
    trackers.write_train_state(
        str(tmp_path / "train_state.pt"), trackers.snapshot_train_state(state, operations)
    )
    restored = trackers.read_train_state(str(tmp_path / "train_state.pt"))
    assert restored.step == 12
    assert restored.consumed_train_samples == 1 << 40
    assert restored.do_train is True
    # float32 would have rounded this.
    assert restored.floating_point_operations_so_far == operations


def test_a_snapshot_does_not_follow_training() -> None:
    state = TrainState(step=1)
    snapshot = trackers.snapshot_train_state(state, 5)
    state.step = 2
    assert snapshot["step"].item() == 1
    assert snapshot["floating_point_operations_so_far"].dtype == torch.float64


def test_files_of_older_writers(tmp_path: Path) -> None:
    path = tmp_path / "train_state.pt"
    state = {name: value.clone() for name, value in TrainState(step=3).state_dict().items()}
    state["step"] = state["step"].to(torch.int32)
    state["floating_point_operations_so_far"] = torch.tensor(1.5e18, dtype=torch.float32)
    torch.save(state, path)
    restored = trackers.read_train_state(str(path))
    assert restored.step == 3
    assert restored.floating_point_operations_so_far == pytest.approx(1.5e18)


def test_readers_hand_out_objects_of_their_own(tmp_path: Path) -> None:
    save_state(tmp_path / "train_state.pt", 4)
    trackers.read_train_state(str(tmp_path / "train_state.pt")).step = 99
    assert trackers.read_train_state(str(tmp_path / "train_state.pt")).step == 4

    (tmp_path / "run_config.yaml").write_text("model:\n  tp: 1\n")
    trackers.read_run_config(str(tmp_path / "run_config.yaml"))["model"]["tp"] = 99
    assert trackers.read_run_config(str(tmp_path / "run_config.yaml")) == {"model": {"tp": 1}}


def test_a_file_is_read_once_until_it_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = trackers.read_file
    monkeypatch.setattr(trackers, "read_file", lambda path: (opened.append(path), real(path))[1])
    path = tmp_path / "latest_train_state.pt"
    save_state(path, 5)
    for _ in range(3):
        assert trackers.read_train_state(str(path)).step == 5
    assert len(opened) == 1

    # Same size, and even the same modification time: only the file itself is different.
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    save_state(path, 6)
    os.utime(path, ns=times)
    assert trackers.read_train_state(str(path)).step == 6
    assert len(opened) == 2

    trackers.read_train_state.cache_clear()
    trackers.read_train_state(str(path))
    assert len(opened) == 3


def test_reading_executes_no_pickled_code(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    path = tmp_path / "train_state.pt"
    torch.save({"step": Trap()}, path)
    with pytest.raises(RuntimeError, match="Unable to load train state file"):
        trackers.read_train_state(str(path))
    assert not (tmp_path / "executed").exists()


def test_unreadable_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(RuntimeError, match=r"Unable to load train state file .*missing"):
        trackers.read_train_state(str(missing))
    with pytest.raises(RuntimeError, match=r"Unable to load config file .*missing"):
        trackers.read_run_config(str(missing))
    assert str(missing) in capfd.readouterr().err
    (tmp_path / "bad.yaml").write_text("model: [")
    with pytest.raises(RuntimeError, match="Unable to load config file"):
        trackers.read_run_config(str(tmp_path / "bad.yaml"))


def read_step(rank: int, path: str) -> int:
    return trackers.read_train_state(path).step


def test_every_rank_gets_rank_0s_train_state(tmp_path: Path) -> None:
    save_state(tmp_path / "train_state.pt", 8)
    assert run_ranks(read_step, 2, str(tmp_path / "train_state.pt")) == [8, 8]


def test_a_failure_on_rank_0_reaches_every_rank(tmp_path: Path) -> None:
    with pytest.raises(RankError) as failure:
        run_ranks(read_step, 2, str(tmp_path / "missing"))
    assert failure.value.errors == {0: "DamagedFileError", 1: "DamagedFileError"}


# --- Run config ------------------------------------------------------------------------------------------


def test_run_config_is_sanitised(tmp_path: Path) -> None:
    path = tmp_path / "run_config.yaml"
    path.write_text(
        "model:\n  timers: {_target_: megatron.core.timers.Timers, log_level: 0}\n  layers: [1, 2]\n"
    )
    assert trackers.read_run_config(str(path)) == {"model": {"timers": None, "layers": [1, 2]}}
    path.write_text("")
    assert trackers.read_run_config(str(path)) is None


@pytest.mark.parametrize("content", ["- a\n", "just text", "model: 3\n", "checkpoint: [save]\n"])
def test_a_file_that_is_not_a_run_config(tmp_path: Path, content: str) -> None:
    path = tmp_path / "run_config.yaml"
    path.write_text(content)
    with pytest.raises(RuntimeError, match=r"run_config\.yaml: it is no configuration.*ckpt_step"):
        trackers.read_run_config(str(path))


def test_runtime_objects_are_removed_wherever_they_are(caplog: pytest.LogCaptureFixture) -> None:
    content = {"a": [TIMERS, {"b": TIMERS}], "c": {"_target_": "some.Other", "d": 1}}
    assert sanitize_run_config_object(content) == {
        "a": [None, {"b": None}],
        "c": {"_target_": "some.Other", "d": 1},
    }
    assert content["a"][0] is TIMERS
    assert not caplog.records

    empty, full = {"_target_": RECIPE, "_call_": True}, {"_target_": RECIPE, "recipe": 1}
    assert sanitize_run_config_object([empty, full]) == [None, full]
    assert RECIPE in caplog.text


def test_computed_fields_of_old_files_are_dropped(tmp_path: Path) -> None:
    """``init=False`` fields cannot be passed to a constructor; unknown classes are left alone."""
    path = tmp_path / "run_config.yaml"
    path.write_text(
        "a: {_target_: megatron.core.process_groups_config.ProcessGroupCollection, tp: 1, other: 2}\n"
        "b: {_target_: unknown.package.Config, tp: 1}\n"
    )
    assert trackers.read_run_config(str(path)) == {
        "a": {"_target_": "megatron.core.process_groups_config.ProcessGroupCollection", "other": 2},
        "b": {"_target_": "unknown.package.Config", "tp": 1},
    }


class Config:
    """Renders itself like a ConfigContainer."""

    step = 1

    def to_yaml(self, path: str) -> None:
        with open(path, "w") as file:
            file.write(f"step: {self.step}\n")


def test_run_config_is_written_as_it_was_when_the_save_began(tmp_path: Path) -> None:
    config = Config()
    snapshot = trackers.snapshot_run_config(config)
    config.step = 2
    (tmp_path / "run_config.yaml").write_bytes(snapshot())
    assert trackers.read_run_config(str(tmp_path / "run_config.yaml")) == {"step": 1}


def change_after_the_snapshot(_: int, directory: str) -> bytes:
    with Run(Setup(), save=directory) as run:
        cfg = run.state.cfg
        snapshot = trackers.snapshot_run_config(cfg)
        cfg.to_yaml(f"{directory}/expected.yaml")
        cfg.checkpoint.save_interval, cfg.model = 12345, None
        return snapshot()


def test_our_configuration_is_of_the_moment_too(tmp_path: Path) -> None:
    (content,) = run_ranks(change_after_the_snapshot, 1, str(tmp_path))
    assert content == (tmp_path / "expected.yaml").read_bytes()


# --- Trackers --------------------------------------------------------------------------------------------


def test_publish_trackers(tmp_path: Path) -> None:
    trackers.publish_trackers(str(tmp_path), 1000, trackers.snapshot_train_state(TrainState(step=1000), 0))
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_bytes() == b"1000"
    assert trackers.read_train_state(str(tmp_path / "latest_train_state.pt")).step == 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latest_checkpointed_iteration.txt",
        "latest_train_state.pt",
    ]


def test_an_older_save_that_is_finalized_late_leaves_the_trackers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker, root = tmp_path / "latest_checkpointed_iteration.txt", str(tmp_path)
    numbers = [trackers.number_of_save() for _ in range(3)]
    for iteration, number, tracked in ((2, numbers[1], b"2"), (1, numbers[0], b"2"), (1, numbers[2], b"1")):
        state = trackers.snapshot_train_state(TrainState(step=iteration), 0)
        trackers.publish_trackers(root, iteration, state, number)
        assert tracker.read_bytes() == tracked, "a run that goes back on purpose begins its save later"
        found = trackers.read_train_state(str(tmp_path / "latest_train_state.pt"))
        assert found.step == int(tracked)
    assert caplog.text.count("was begun before the one that the trackers name") == 1
    trackers.publish_trackers(root, 5, state)
    assert tracker.read_bytes() == b"5"


def test_trackers_keep_the_old_checkpoint_when_the_new_one_cannot_be_named(tmp_path: Path) -> None:
    first = trackers.snapshot_train_state(TrainState(step=1), 0)
    trackers.publish_trackers(str(tmp_path), 1, first)
    # A directory in the tracker's place cannot be replaced by a file.
    tracker = tmp_path / "latest_train_state.pt"
    tracker.unlink()
    (tracker / "in_the_way").mkdir(parents=True)
    with pytest.raises(CheckpointWriteError, match=r"latest_train_state\.pt"):
        trackers.publish_trackers(str(tmp_path), 2, first)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_bytes() == b"1"


@pytest.mark.parametrize(
    "text, expected", [("1000", (1000, False)), (" 7\n", (7, False)), ("release", (0, True))]
)
def test_read_metadata(tmp_path: Path, text: str, expected: tuple[int, bool]) -> None:
    tracker = tmp_path / "tracker"
    tracker.write_text(text)
    assert trackers.read_metadata(str(tracker)) == expected


@pytest.mark.parametrize("content", [b"latest", b"", b"\xff\xfe7", b"9" * 20, b"9" * 5000])
def test_read_metadata_of_garbage(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes) -> None:
    tracker = tmp_path / "tracker"
    tracker.write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        trackers.read_metadata(str(tracker))
    assert stopped.value.code == 1
    assert str(tracker) in caplog.text


@pytest.mark.parametrize("text", ["0", "-3"])
def test_an_iteration_is_positive(tmp_path: Path, text: str) -> None:
    (tmp_path / "tracker").write_text(text)
    with pytest.raises(AssertionError, match="positive"):
        trackers.read_metadata(str(tmp_path / "tracker"))


def test_a_missing_tracker(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        trackers.read_metadata(str(tmp_path / "tracker"))


def read_own_tracker(rank: int, directory: str) -> tuple[int, bool]:
    return trackers.read_metadata(os.path.join(directory, str(rank)))


@pytest.mark.parametrize("stale", ["3", "release", "garbage", None])
def test_ranks_that_see_another_tracker_follow_the_newest(tmp_path: Path, stale: str | None) -> None:
    (tmp_path / "0").write_text("12")
    if stale is not None:
        (tmp_path / "1").write_text(stale)
    assert run_ranks(read_own_tracker, 2, str(tmp_path)) == [(12, False), (12, False)]


def test_release_on_all_ranks(tmp_path: Path) -> None:
    for rank in "01":
        (tmp_path / rank).write_text("release")
    assert run_ranks(read_own_tracker, 2, str(tmp_path)) == [(0, True), (0, True)]


def test_garbage_on_all_ranks_stops_all(tmp_path: Path) -> None:
    for rank in "01":
        (tmp_path / rank).write_text("garbage")
    with pytest.raises(RankError) as failure:
        run_ranks(read_own_tracker, 2, str(tmp_path))
    assert failure.value.errors == {0: "SystemExit", 1: "SystemExit"}
