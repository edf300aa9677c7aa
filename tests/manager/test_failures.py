# SPDX-License-Identifier: Apache-2.0
"""``CheckpointManager``: saves that fail while training goes on."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ckpt_fast import CheckpointManager, KeepNewest
from ckpt_fast.errors import AsyncSaveError, CheckpointWriteError, RankLostError
from ckpt_fast.pipeline.save import waves
from ckpt_fast.storage import files
from tests.helpers import run_ranks
from tests.manager.ranks import error_of, state, value_of

both = pytest.mark.parametrize("world", [1, 2])


@contextmanager
def broken(where: str, error: type[Exception] = CheckpointWriteError) -> Iterator[None]:
    """A block in which saves fail on the last rank: as they are prepared, or as they are written."""

    def fail(*_: Any, **__: Any) -> Any:
        if dist.is_initialized() and dist.get_rank() < dist.get_world_size() - 1:
            return originals[where](*_, **__)
        raise error("the disk is broken", errno.EIO) if error is CheckpointWriteError else error("broken")

    originals = {"write": waves.write, "claim": files.Directory.claim}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*((waves, "write") if where == "write" else (files.Directory, "claim")), fail)
        yield


def go_on(rank: int, root: str, where: str) -> dict[str, Any]:
    """Let the saves of steps 2 and 3 fail, and that of 4 succeed."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    log, outcome = logging.getLogger("ckpt_fast.manager.failures"), {}
    log.addHandler(handler)
    options: dict[str, Any] = {"on_save_failure": "continue", "max_failed_saves": 2}
    try:
        with CheckpointManager(root, policies=[KeepNewest(2)], **options) as manager:
            manager.save(1, state(1)).result()
            with broken(where):
                futures = [manager.save(step, state(step)) for step in (2, 3)]
                manager.wait()
            outcome["failed"] = [type(each.exception()).__name__ for each in futures]
            outcome["due"] = manager.should_save(3) or manager._saved_step
            outcome["latest"] = manager.latest()
            outcome["left"] = sorted(os.listdir(root))
            manager.save(4, state(4))
            report = manager.wait()
            assert report is not None and report.directory.endswith("iter_0000004")
        found = state(-1)
        outcome["restored"] = CheckpointManager(root).restore(found), value_of(found)
    finally:
        log.removeHandler(handler)
    outcome["said"] = records
    return outcome


@both
@pytest.mark.parametrize("where", ["write", "claim"])
def test_training_goes_on(tmp_path: Path, world: int, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root, told = str(tmp_path / "run"), tmp_path / "metrics.jsonl"
    monkeypatch.setenv("CKPT_FAST_METRICS", str(told))
    outcomes = run_ranks(go_on, world, root, where)
    for rank, outcome in enumerate(outcomes):
        said = outcome.pop("said")
        assert len(said) == (2 if rank == 0 else 0)
        if rank == 0:
            assert "the disk is broken" in said[0] and "of step 1. Failed saves in a row: 1 of 2" in said[0]
            assert "Failed saves in a row: 2 of 2 allowed" in said[1]
        kind = "AsyncSaveError" if where == "write" else "CheckpointWriteError"
        assert outcome == {
            "failed": [kind, kind],
            "due": None,
            "left": ["iter_0000001", "latest_checkpointed_iteration.txt"],
            "latest": 1,
            "restored": (4, 4.0),
        }
    failed = [json.loads(line)["error"] for line in told.read_text().splitlines()]
    assert len([each for each in failed if each]) == 2 * world


def fail_too_often(rank: int, root: str) -> list[tuple[str, str]]:
    """Return the errors of four saves in a row, and of the end."""
    manager = CheckpointManager(root, on_save_failure="continue", max_failed_saves=2)
    with broken("write"):
        errors = [error_of(lambda step=step: manager.save(step, state(step))) for step in range(1, 5)]
        return [*errors, error_of(manager.close)]


@both
def test_one_failure_too_many(tmp_path: Path, world: int) -> None:
    for errors in run_ranks(fail_too_often, world, str(tmp_path)):
        assert [kind for kind, _ in errors] == ["no error"] * 3 + ["AsyncSaveError", "no error"]
        assert "3 saves in a row failed, more than max_failed_saves=2 allows. The last:" in errors[3][1]
        assert "the disk is broken" in errors[3][1]


def fail_at_the_end(rank: int, root: str, where: str) -> list[tuple[str, str]]:
    manager = CheckpointManager(root, on_save_failure="continue")
    manager.save(1, state(1)).result()
    with broken(where):
        manager.save(2, state(2))
        return [error_of(manager.wait), error_of(manager.close), error_of(manager.close)]


@both
@pytest.mark.parametrize("where", ["write", "claim"])
def test_the_last_save_is_raised_once(tmp_path: Path, world: int, where: str) -> None:
    for waited, closed, again in run_ranks(fail_at_the_end, world, str(tmp_path), where):
        assert waited[0] == again[0] == "no error" and "held up" in waited[1]
        assert closed[0] == ("AsyncSaveError" if where == "write" else "CheckpointWriteError")
        assert closed[1].startswith("the last save failed, and training went on without it: ")


def fail_with(rank: int, root: str, where: str, lost: bool) -> tuple[str, str]:
    manager = CheckpointManager(root, on_save_failure="continue")
    with broken(where, RankLostError if lost else ZeroDivisionError):
        return error_of(lambda: [manager.save(step, state(step)) for step in (1, 2)])


def test_what_no_storage_has_caused_is_raised(tmp_path: Path) -> None:
    for kind, text in run_ranks(fail_with, 2, str(tmp_path), "claim", False):
        assert kind == "CheckpointError" and "ZeroDivisionError" in text
    ((kind, _),) = run_ranks(fail_with, 1, str(tmp_path), "write", True)
    assert kind == "AsyncSaveError"


def differ(rank: int, root: str) -> tuple[str, str]:
    manager = CheckpointManager(root, on_save_failure="continue" if rank else None)
    return error_of(lambda: manager.save(1, state(1)))


def test_ranks_that_differ(tmp_path: Path) -> None:
    for kind, text in run_ranks(differ, 2, str(tmp_path)):
        assert kind == "ValueError" and "rank 0 would raise" in text and "rank 1 would go on" in text


def test_the_environment_decides_where_nothing_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPT_FAST_ON_SAVE_FAILURE", "continue")
    monkeypatch.setenv("CKPT_FAST_MAX_FAILED_SAVES", "1")
    manager = CheckpointManager(tmp_path)
    with broken("write"):
        manager.save(1, {"w": torch.ones(3)})
        manager.save(2, {"w": torch.ones(3)})
        with pytest.raises(AsyncSaveError, match="max_failed_saves=1"):
            manager.save(3, {"w": torch.ones(3)})
    monkeypatch.setenv("CKPT_FAST_MAX_FAILED_SAVES", "few")
    with pytest.raises(ValueError, match="CKPT_FAST_MAX_FAILED_SAVES"):
        CheckpointManager(tmp_path).save(1, {"w": torch.ones(3)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_save_failure": "retry"}, "on_save_failure='retry': use one of raise, continue"),
        ({"max_failed_saves": 0}, "max_failed_saves=0 is not a positive whole number"),
        ({"max_failed_saves": True}, "max_failed_saves=True is not a positive whole number"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CheckpointManager(tmp_path, **options)
