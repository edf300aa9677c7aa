# SPDX-License-Identifier: Apache-2.0
"""However a directory is named, the same checkpoint and data position are found, and all is reported."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ckpt_fast import resume_dataloader
from ckpt_fast.trainer.places.paths import settle_directories, settled
from tests.helpers import RankError, run_ranks
from tests.models import FLOPS, Run, Setup
from tests.trainer import training
from tests.trainer.training import Loader, iterator

SETUP = Setup()


def save(rank: int, root: Any) -> None:
    """Save 1 and 2 persistently and 3 for recovery; the position is 100 per step."""
    with Run(SETUP, save=root, non_persistent_ckpt_type="global") as run:
        for step in (1, 2, 3):
            run.train(1)
            loader = Loader(100 * step)
            run.save(train_data_iterator=iterator(loader), non_persistent_ckpt=step == 3)
            assert isinstance(run.checkpoint.save, str)


def resume(rank: int, directory: str, config: dict[str, Any], loader: Any = None) -> tuple[Any, int, str]:
    """Return the result of a load in a working directory, the data position, and what was printed."""
    os.chdir(directory)
    printed, loader = io.StringIO(), loader or Loader(-1)
    with Run(SETUP, **config) as run, contextlib.redirect_stdout(printed):
        context: dict[str, Any] = {}
        result = run.load(checkpointing_context=context)
        os.chdir("/")
        resume_dataloader(run.state, iterator(loader), context)
    return result, getattr(loader, "position", -1), printed.getvalue()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what was saved to a relative ``Path``."""
    directory = tmp_path_factory.mktemp("roots")
    with contextlib.chdir(directory) if hasattr(contextlib, "chdir") else contextlib.nullcontext():
        run_ranks(save, 1, directory / "run")
    return directory


@pytest.fixture
def directory(sound: Path, tmp_path: Path) -> Path:
    """Return a copy to change."""
    shutil.copytree(sound / "run", tmp_path / "run")
    return tmp_path


@pytest.mark.parametrize(
    ("inside", "load", "step"),
    [
        ("run", "iter_0000002", 2),
        ("run", "./iter_0000002", 2),
        ("run", "iter_0000002/", 2),
        ("run", Path("iter_0000001"), 1),
        ("run", ".", 2),
        (".", "run", 2),
        (".", Path("run"), 2),
        (".", "run/non_persistent", 3),
        (".", "run/non_persistent/", 3),
        (".", Path("run/non_persistent/iter_0000003"), 3),
        ("run/non_persistent", "iter_0000003", 3),
        ("run/iter_0000001", "../iter_0000002", 2),
    ],
)
def test_every_name_of_a_directory(sound: Path, inside: str, load: Any, step: int) -> None:
    ((result, position, printed),) = run_ranks(resume, 1, str(sound / inside), {"load": load})
    assert (result, position) == ((step, FLOPS), 100 * step)
    (line,) = [line for line in printed.splitlines() if "successfully loaded checkpoint" in line]
    where = line.partition("position in the data: ")[2].partition("; ")[0]
    assert os.path.realpath(where) == f"{sound}/run/energon/iter_{step:07d}"
    assert "weights, optimizer, scheduler, RNG, counters" in line


@pytest.mark.parametrize("kind", [str, Path])
def test_the_newest_recovery_checkpoint_of_a_path(sound: Path, kind: Any) -> None:
    for config in (
        {"save": kind("run"), "load": kind("run"), "non_persistent_ckpt_type": "global"},
        {"save": kind("run"), "load": kind("run/non_persistent"), "non_persistent_ckpt_type": "global"},
        {
            "save": kind("run"),
            "non_persistent_ckpt_type": "global",
            "non_persistent_global_ckpt_dir": kind("run/non_persistent"),
        },
    ):
        ((result, position, _),) = run_ranks(resume, 1, str(sound), config)
        assert (result, position) == ((3, FLOPS), 300), config


def test_an_iteration_that_was_moved_to_an_archive(directory: Path) -> None:
    (directory / "archive").mkdir()
    for root, step in (("run", 2), ("run/non_persistent", 3)):
        iteration = directory / root / f"iter_{step:07d}"
        moved = directory / f"archive/iter_{step:07d}"
        shutil.move(iteration, moved)
        iteration.symlink_to(moved)
    for config, step in (
        ({"load": str(directory / "run")}, 2),
        ({"load": "run", "save": "run", "non_persistent_ckpt_type": "global"}, 3),
        ({"load": "run/iter_0000002"}, 2),
    ):
        ((result, position, _),) = run_ranks(resume, 1, str(directory), config)
        assert (result, position) == ((step, FLOPS), 100 * step), config


# --- What is said ----------------------------------------------------------------------------------------


def test_a_lost_position_is_reported(directory: Path) -> None:
    shutil.rmtree(directory / "run/energon/iter_0000002")
    ((_, position, printed),) = run_ranks(resume, 1, str(directory), {"load": "run"})
    assert position == -1
    assert "position in the data: none was saved" in printed
    assert f"WARNING: no dataloader state in {directory}/run/energon/iter_0000002" in printed


def test_a_loader_that_cannot_restore_is_reported(sound: Path) -> None:
    ((_, _, printed),) = run_ranks(resume, 1, str(sound), {"load": "run"}, SimpleNamespace())
    assert "WARNING: the position in the data is not restored" in printed
    assert "has no restore_state" in printed


def test_parts_that_are_not_restored_are_reported(sound: Path) -> None:
    for config, restored, left in (
        ({"finetune": True}, "weights;", "optimizer (finetune), scheduler (finetune), RNG (finetune)"),
        ({"load_optim": False}, "weights, RNG, counters;", "optimizer (load_optim=False)"),
        ({"load_rng": False}, "weights, optimizer, scheduler, counters;", "RNG (load_rng=False)"),
    ):
        ((_, _, printed),) = run_ranks(resume, 1, str(sound), {"load": "run", **config})
        (line,) = [line for line in printed.splitlines() if "successfully loaded checkpoint" in line]
        assert f"(persistent): {restored}" in line
        assert left in line.partition("not restored: ")[2]


def lose_everything(directory: Path) -> None:
    for path in directory.glob("run/latest_*"):
        path.unlink()
    for path in directory.glob("run/iter_*/.metadata"):
        path.unlink()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("load", "why"),
    [
        (None, "checkpoint.load is not set"),
        ("nowhere", "{}/nowhere does not exist"),
        ("empty", "there is no checkpoint in {}/empty"),
        ("run", "none of the 2 iterations in {}/run is whole: {}/run/iter_0000002"),
    ],
)
def test_a_start_from_scratch_is_reported_once(
    directory: Path, load: str | None, why: str, ranks: int
) -> None:
    (directory / "empty").mkdir()
    lose_everything(directory)
    answers = run_ranks(resume, ranks, str(directory), {"load": load})
    assert [(result, position) for result, position, _ in answers] == [((0, 0), -1)] * ranks
    warnings = [line for _, _, printed in answers for line in printed.splitlines() if "WARNING" in line]
    assert len(warnings) == 1
    assert why.format(directory, directory) in warnings[0]
    assert "start from random" in warnings[0]
    with pytest.raises(RankError) as ended:
        run_ranks(resume, ranks, str(directory), {"load": load, "exit_on_missing_checkpoint": True})
    assert ended.value.errors == dict.fromkeys(range(ranks), "SystemExit")


def test_whole_iterations_without_trackers_are_loaded(directory: Path) -> None:
    for path in directory.glob("run/latest_*"):
        path.unlink()
    # Nor is a pretrained checkpoint used then.
    for config in ({}, {"pretrained_checkpoint": "/nowhere"}):
        ((result, position, printed),) = run_ranks(resume, 1, str(directory), {"load": "run", **config})
        assert (result, position) == ((2, FLOPS), 200)
        assert f"WARNING: {directory}/run has no trackers. The newest whole checkpoint" in printed


# --- Names -----------------------------------------------------------------------------------------------


def test_settled_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    here = str(tmp_path)
    for name, expected in (
        ("/a/b", "/a/b"),
        ("/a//b/./", "/a/b"),
        ("a/../b", f"{here}/a/../b"),
        ("./a", f"{here}/a"),
        (Path("a"), f"{here}/a"),
        ("msc://store/run/", "msc://store/run/"),
        (Path("msc://store/run"), "msc://store/run"),
    ):
        assert settled(name) == expected


def test_a_configuration_without_directories_stays_as_it_is() -> None:
    cfg = SimpleNamespace(checkpoint=SimpleNamespace(save=None, load=""), dataset=None)
    settle_directories(cfg)
    assert vars(cfg.checkpoint) == {"save": None, "load": ""}


def test_the_fixture_saves_what_it_says(sound: Path) -> None:
    assert training.iterations(str(sound / "run")) == [1, 2]
